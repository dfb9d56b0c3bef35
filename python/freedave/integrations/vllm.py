"""vLLM: its sampler of masked-diffusion models, with our kernels in the place of its rules.

    FREEDAVE_VLLM=on vllm serve nvidia/Nemotron-Labs-Diffusion-8B

One pass over the model's own logits finds each masked position's token and confidence; vLLM computes them on a copy of all
logits in float32. Requests get the same tokens, but where two confidences, or one and the threshold, are within 1e-6 of each
other. A step in which a request draws tokens or wants log-probabilities is left to vLLM's code.

Written for `models/nemotron_dllm.py` of vLLM's main branch at 06c838a. Without the environment variable nothing changes.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from freedave_kernels import predict_tokens, select_transfer


def register() -> None:
    """What the entry point `vllm.general_plugins` calls, in every process of vLLM and before models load.

    Raises:
        ImportError: FREEDAVE_VLLM is on, but this vLLM has no masked-diffusion model.
        ValueError: FREEDAVE_VLLM is neither "on" nor "off".
    """
    wanted = os.environ.get("FREEDAVE_VLLM", "off")
    if wanted not in ("on", "off"):
        raise ValueError(f"FREEDAVE_VLLM must be 'on' or 'off', got {wanted!r}")
    if wanted == "off":
        return
    try:
        from vllm.model_executor.models.nemotron_dllm import NemotronLabsDiffusionModelState
    except ImportError as error:
        raise ImportError(
            "FREEDAVE_VLLM=on, but this vLLM has no masked-diffusion model (vllm.model_executor.models.nemotron_dllm): "
            "install one that has it, or set FREEDAVE_VLLM=off"
        ) from error
    theirs = NemotronLabsDiffusionModelState.custom_sampler
    if theirs.__module__ == __name__:  # vLLM may call this more than once
        return

    def custom_sampler(model_state: Any, sampler: Any) -> tuple[Any, Any]:
        made, rejection_sampler = theirs(model_state, sampler)
        ours = MaskedDiffusionSampler(made, model_state.selection_policy, model_state.confidence_threshold)
        return ours, rejection_sampler

    NemotronLabsDiffusionModelState.custom_sampler = custom_sampler


class MaskedDiffusionSampler:
    """vLLM's sampler of that name, which keeps the requests' states, and does all but the steps that need no draws.

    A request's canvas is denoised in steps until no mask is left, or there were `max_denoising_steps`; the step after that
    emits its tokens, while the model computes the keys and values that stay.

    Args:
        theirs: vLLM's sampler.
        selection_policy: "low_confidence" and "leftmost": as many positions as leave the same for each remaining step, the
            surest or the first ones. "confidence_threshold": those with that probability, one at least, all in the last step.
        confidence_threshold: that probability.
    """

    def __init__(self, theirs: Any, selection_policy: str, confidence_threshold: float) -> None:
        self._theirs = theirs
        self._policy = selection_policy
        self._threshold = confidence_threshold

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def __call__(self, logits: torch.Tensor, input_batch: Any, draft_logits: torch.Tensor | None = None) -> Any:
        """One step of all requests.

        Args:
            logits: `[N, V]` float32, bfloat16 or float16, of the canvases that the model has computed, one after the other.
            input_batch, draft_logits: vLLM's.
        """
        from vllm.utils.torch_utils import async_tensor_h2d

        theirs, num_reqs = self._theirs, input_batch.num_reqs
        lengths = np.diff(input_batch.cu_num_logits_np[: num_reqs + 1])
        rows = np.flatnonzero(lengths)
        if len(rows) == 0 or not self._plain(input_batch.idx_mapping_np[:num_reqs], rows):
            return theirs(logits, input_batch, draft_logits)
        if len(rows) < num_reqs:
            theirs._finish_prefills(input_batch, np.flatnonzero(lengths == 0))
        staged = np.stack([rows, lengths[rows]]).astype(np.int64)
        row, valid_length = async_tensor_h2d(staged, device=logits.device).unbind()
        slots = input_batch.idx_mapping[:num_reqs].long()
        sampled, num_sampled = theirs._sampled[:num_reqs], theirs._num_sampled[:num_reqs]
        sampled.zero_()
        num_sampled.zero_()
        canvases = self._canvases(logits, valid_length, whole=lengths[rows].min() == theirs.canvas_length)
        tokens, count = self._step(canvases, slots[row], valid_length)
        sampled[row], num_sampled[row] = tokens.to(sampled.dtype), count.to(num_sampled.dtype)
        theirs.req_states.draft_tokens[slots, : theirs.canvas_length] = theirs.diffusion_states.canvas[slots]
        return theirs._build_output(input_batch, sampled, num_sampled, lengths)

    def _plain(self, slots: np.ndarray, rows: np.ndarray) -> bool:
        """Whether no request draws tokens, leaves some out of its softmax, or wants log-probabilities."""
        settings, used = self._theirs.sampling_states, slots[rows]
        return bool(
            (settings.temperature.np[used] == 0).all()
            and (settings.top_k.np[used] >= self._theirs.vocab_size).all()
            and (settings.top_p.np[used] == 1).all()
            and settings.max_num_logprobs(slots) < 0
        )

    def _canvases(self, logits: torch.Tensor, valid_length: torch.Tensor, *, whole: bool) -> torch.Tensor:
        """The logits `[R, L, V]`; a copy where a canvas ends early, at the last position, and anything follows."""
        length = self._theirs.canvas_length
        if whole:
            return logits.view(len(valid_length), length, -1)
        begins = valid_length.cumsum(0) - valid_length
        places = begins[:, None] + torch.arange(length, device=logits.device)
        return logits[places.clamp_max(len(logits) - 1)]

    def _step(
        self, logits: torch.Tensor, slots: torch.Tensor, valid_length: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Moves the states of `slots [R]` on; returns the tokens `[R, L]` that they emit, and how many `[R]`."""
        states, mask = self._theirs.diffusion_states, self._theirs.mask_token_id
        current, step, commits = states.canvas[slots], states.step[slots], states.is_encoder_phase[slots]
        valid = torch.arange(current.shape[1], device=logits.device) < valid_length[:, None]
        masked = (current == mask) & valid

        token_ids, confidence = predict_tokens(logits, current, mask, suppress_tokens=[mask])
        reveals = self._reveals(confidence, masked, (states.max_denoising_steps - step).clamp(min=1))
        denoised = torch.where(reveals, token_ids, current)
        step = step + 1
        done = ((denoised != mask) | ~valid).all(1) | (step >= states.max_denoising_steps)
        states.canvas[slots] = torch.where(commits[:, None], mask, denoised)
        states.step[slots] = torch.where(commits, 0, step)
        states.is_encoder_phase[slots] = ~commits & done

        before_masks = (valid & ~masked).cumprod(1).sum(1)  # a canvas that ran out of steps may still hold masks
        return current * commits[:, None], before_masks * commits

    def _reveals(self, confidence: torch.Tensor, masked: torch.Tensor, steps_left: torch.Tensor) -> torch.Tensor:
        """Which masked positions `[R, L]` this step reveals."""
        if self._policy == "confidence_threshold":
            least = torch.where(steps_left == 1, 0.0, self._threshold)
            return select_transfer(confidence, masked, threshold=least)
        share = (masked.sum(1) + steps_left - 1) // steps_left
        order = "left_to_right" if self._policy == "leftmost" else "confidence"
        return select_transfer(confidence, masked, num_transfer=share, order=order)
