"""dInfer: a parallel decoder for its `BlockWiseDiffusionLLM` and the like, with our kernels in the place of its rule.

    from freedave.integrations.dinfer import ThresholdParallelDecoder

    llm = BlockWiseDiffusionLLM(model, ThresholdParallelDecoder(0, threshold=0.9), BlockIteratorFactory())

One pass over the logits of the masked positions finds what the published decoder finds in an arg max, a softmax of all logits
in float32 and a gather. Tokens are the same, but where a confidence is within rounding of the threshold, or of 1e-5 below the
largest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from freedave_kernels import predict_tokens


class ThresholdParallelDecoder:
    """Fills in every masked position of a block whose prediction is sure enough, in place; see dInfer's class of that name.

    A sequence of which no position is fills in its surest one, with those that are at most 1e-5 less sure. Positions whose
    arg max is the mask itself stay masked.

    Args:
        temperature, remasking: greedy and by confidence, as they are by default; others are refused.
        threshold: the least confidence, at most 1.
        mask_id, eos_id: those of LLaDA by default. An end token ends nothing here: dInfer looks for it itself.
        use_float64: refused where it is true; float32 confidences are within 1e-6 of float64's.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        temperature: float,
        threshold: float,
        remasking: str = "low_confidence",
        mask_id: int = 126336,
        eos_id: int = 126081,
        use_float64: bool = False,
    ) -> None:
        given = {"temperature": temperature, "remasking": remasking, "use_float64": use_float64}
        for (name, value), served in zip(given.items(), (0, "low_confidence", False), strict=True):
            if value != served:
                raise ValueError(f"dinfer.ThresholdParallelDecoder: {name} must be {served!r}, got {value!r}")
        self.temperature = temperature
        self.threshold = threshold
        self.remasking = remasking
        self.mask_id = mask_id
        self.eos_id = eos_id
        self.use_float64 = use_float64

    def block_init(self, block_x: torch.Tensor, block_id: int) -> None:
        """Called as a block begins; there is nothing to prepare."""

    def decode(
        self, logits: torch.Tensor, block_start: int, block_end: int, x: Any, iter_threshold: float | None = None
    ) -> None:
        """One step of a block that begins at the same position in all sequences.

        Args:
            logits: `[B, block_end - block_start, V]` float32, bfloat16 or float16, of the positions themselves.
            x: dInfer's `TokenArray`, or a tensor `[B, T]` int64, written to.
            iter_threshold: the threshold of this step.
        """
        block = x[:, block_start:block_end]
        x[:, block_start:block_end] = self._filled(logits, block, iter_threshold)
        _as_the_first_process(x.data)

    def batch_decode(
        self,
        logits: torch.Tensor,
        block_start: torch.Tensor,
        x: Any,
        block_length: int,
        iter_threshold: float | None = None,
    ) -> None:
        """One step of blocks that begin at `block_start [B]` int64, and logits as long; the rest as in `decode`."""
        places = block_start[:, None] + torch.arange(block_length, device=block_start.device)
        x.data.scatter_(1, places, self._filled(logits, x.data.gather(1, places), iter_threshold))
        _as_the_first_process(x.data)

    def _filled(self, logits: torch.Tensor, block: torch.Tensor, threshold: float | None) -> torch.Tensor:
        """The tokens `[B, L]` of the block after the step."""
        token_ids, confidence = predict_tokens(logits, block, self.mask_id)
        sure = confidence.masked_fill(token_ids == self.mask_id, float("-inf"))  # also where nothing was masked
        most = self.threshold if threshold is None else threshold
        least = (sure.amax(1, keepdim=True) - 1e-5).clamp(-1000, most)
        return torch.where(sure >= least, token_ids, block)


def _as_the_first_process(tokens: torch.Tensor) -> None:
    """Gives the first process's tokens to all: none decides otherwise by a rounding."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast(tokens, src=0)
