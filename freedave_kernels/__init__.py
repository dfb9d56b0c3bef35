"""Kernels for lossless parallel decoding of masked-diffusion language models.

Everything a decoder does between two forwards, as a handful of batch-invariant ops. A whole decode of ``window [B, L]``,
which holds the mask where a token is wanted, with a model that returns logits ``[B, K, L, V]`` for drafts ``[B, K, L]``::

    import freedave_kernels as fk

    drafts, num_drafts = window[:, None], torch.ones(len(window), dtype=torch.int64, device=window.device)
    while True:
        token_ids, confidence = fk.predict_tokens(model(drafts), drafts, mask_token_id, suppress_tokens=[mask_token_id])
        step = fk.draft_step(drafts, token_ids, confidence, num_drafts, mask_token_id, draft_steps=8)
        drafts, num_drafts = step.drafts, step.num_drafts
        if step.finished.all():
            break
        if ((step.steps == 0) & (step.finished == 0)).any():  # nor would anything change in the next step
            raise RuntimeError(f"nothing to commit; without a prediction: positions {step.non_finite.tolist()}")

The same ops are registered with the dispatcher as ``torch.ops.freedave.*``.
"""

from freedave_kernels import _library
from freedave_kernels.backends import available_backends, use_backend
from freedave_kernels.contract import TOKENS_PER_STATE, BackendUnavailableError
from freedave_kernels.ops.build_drafts import build_drafts
from freedave_kernels.ops.draft_attention import draft_attention
from freedave_kernels.ops.draft_step import DraftStep, draft_step
from freedave_kernels.ops.keep import keep
from freedave_kernels.ops.logit_floor import logit_floor
from freedave_kernels.ops.merge_predictions import merge_predictions
from freedave_kernels.ops.partial_predictions import partial_predictions
from freedave_kernels.ops.pooled_step import DraftPool, draft_pool
from freedave_kernels.ops.predict_tokens import predict_tokens
from freedave_kernels.ops.rank_positions import rank_positions
from freedave_kernels.ops.select_transfer import select_transfer
from freedave_kernels.ops.verify_drafts import verify_drafts

__version__ = _library.VERSION

__all__ = [
    "TOKENS_PER_STATE",
    "BackendUnavailableError",
    "DraftPool",
    "DraftStep",
    "available_backends",
    "build_drafts",
    "draft_attention",
    "draft_pool",
    "draft_step",
    "keep",
    "logit_floor",
    "merge_predictions",
    "partial_predictions",
    "predict_tokens",
    "rank_positions",
    "select_transfer",
    "use_backend",
    "verify_drafts",
]
