"""What the CUDA kernels can serve: a window is one block of threads, and the agreement of drafts is one word of bits."""

from __future__ import annotations

from typing import Any

MAX_LENGTH = 1024
MAX_DRAFTS = 32


def beyond_limits(op: str, call: tuple[Any, ...]) -> str | None:
    """Why the CUDA kernels cannot serve a call (the op's arguments by position, checked already), or None if they can."""
    if op in ("predict_tokens", "partial_predictions", "merge_predictions"):
        return None
    length = call[0].shape[-1]
    if length > MAX_LENGTH:
        return f"windows of at most {MAX_LENGTH} positions, got {length}"
    drafts = {
        "build_drafts": lambda: call[4],
        "verify_drafts": lambda: call[0].shape[1],
        "draft_step": lambda: max(call[0].shape[1], call[5]),
    }.get(op, lambda: 0)()
    if drafts > MAX_DRAFTS:
        return f"at most {MAX_DRAFTS} drafts, got {drafts}"
    return None
