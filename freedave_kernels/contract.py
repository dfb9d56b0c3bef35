"""What several rooms of this package state alike: its ops, the words they take, the shapes of what they return, limits.

The native library states some of it in C++; `_library` compares the two when it is loaded.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot serve a call here; the message says why and what to do."""


class Op(NamedTuple):
    """Where an op's kernels are. A backend may lack an op."""

    native: tuple[str, ...] = ("cpu", "cuda")
    """Backends whose kernel is in the native library."""
    python: tuple[str, ...] = ("reference", "triton")
    """Backends whose kernel is the function `freedave_kernels.<backend>.<op>.<op>`."""
    written: tuple[str, ...] = ()
    """The arguments that it writes to; it leaves all others alone."""
    called_by: str | None = None
    """The public function that calls it, where that is not the one of its own name."""


OPS = {
    "predict_tokens": Op(),
    "partial_predictions": Op(),
    "merge_predictions": Op(),
    "logit_floor": Op(),
    "rank_positions": Op(),
    "select_transfer": Op(),
    "build_drafts": Op(),
    "verify_drafts": Op(),
    "draft_step": Op(),
    "pooled_step": Op(
        written=("pool",),
        called_by="draft_step",
    ),
    "draft_attention": Op(native=(), python=("reference", "cpu", "triton")),
    "keep": Op(written=("stored_key", "stored_value")),
}

NATIVE_OPS = tuple(op for op, rooms in OPS.items() if rooms.native)

MEASURES = ("prob", "margin", "neg_entropy", "log_odds")
DRAWN_MEASURES = ("prob", "log_odds")  # of tokens that are drawn with a temperature
SUPPRESSIONS = ("exclude", "forbid")  # of suppressed tokens: out of the softmax, or in it and only never chosen
RANK_DTYPES = ("float32", "logits")  # of confidences: to which dtype they are rounded
LARGEST_LOG_ODDS = 64.0  # of the measure; what is more certain counts as this
RULES = ("threshold", "strict", "factor", "entropy_bound")  # what a threshold bounds
ORDERS = ("confidence", "left_to_right")
MATCHES = ("exact", "subset")
DRAFTINGS = ("recycled", "nested")
POOLED_DRAFTINGS = ("pooled", "pipelined")
FALLBACKS = ("top", "top_if_fewer", "top_always")

# Of the CUDA kernels: a window is one block of threads, what drafts agree with each other is one word of bits, and a lane
# keeps three known states.
MAX_LENGTH = 1024
MAX_DRAFTS = 32
MAX_POOL_STATES = 64

TOKENS_PER_STATE = 4096  # neighbouring logits that a state of `partial_predictions` tells of
STATE_FIELDS = 6  # max, second, token, ties, rest, weighted

MOST_SUMMED_TOKENS = 2**23 - 1  # of `logit_floor`: so many weights of at most 2^40 have a sum of 63 bits

MAX_RANGES = 2  # of stored positions that a row of `draft_attention` sees

# The leading columns of `DraftStep.record`.
COUNTERS = (
    "accepted",
    "steps",
    "tokens_committed",
    "masked_in_block",
    "masked_in_window",
    "prefix_length",
    "forward_drafts",
    "finished",
    "non_finite",
    "num_drafts",
    "ended",
)


class RecordLayout(NamedTuple):
    """Where things stand in the record of a sequence with a window of L positions and K next drafts."""

    counters: slice
    token_ids: slice
    step_map: slice
    drafts: slice
    confidence: slice

    @property
    def width(self) -> int:
        """Integers in the record."""
        return self.confidence.stop

    @classmethod
    def of(cls, length: int, draft_steps: int) -> RecordLayout:
        ends = list(itertools.accumulate([len(COUNTERS), length, length, draft_steps * length, (length + 1) // 2]))
        return cls(*map(slice, [0, *ends[:-1]], ends))


class PoolLayout(NamedTuple):
    """Where things stand in the pool of a sequence, of P states in windows of at most C positions."""

    states: slice
    token_ids: slice
    computed: slice
    age: slice
    start: slice
    confidence: slice

    @property
    def width(self) -> int:
        """Integers in the pool."""
        return self.confidence.stop

    @classmethod
    def of(cls, states: int, length: int) -> PoolLayout:
        size = states * length
        sizes = [size, size, states, states, 1, (size + 1) // 2]
        ends = list(itertools.accumulate(sizes))
        return cls(*map(slice, [0, *ends[:-1]], ends))


# What C++ states as well, by the names that it has in `_C.contract`.
STATED_IN_CPP: dict[str, Any] = {
    "ops": list(NATIVE_OPS),
    "measures": list(MEASURES),
    "suppressions": list(SUPPRESSIONS),
    "rules": list(RULES),
    "orders": list(ORDERS),
    "matches": list(MATCHES),
    "draftings": list(DRAFTINGS),
    "pooled_draftings": list(POOLED_DRAFTINGS),
    "fallbacks": list(FALLBACKS),
    "counters": list(COUNTERS),
    "max_length": MAX_LENGTH,
    "max_drafts": MAX_DRAFTS,
    "max_pool_states": MAX_POOL_STATES,
    "tokens_per_state": TOKENS_PER_STATE,
    "state_fields": STATE_FIELDS,
    "largest_log_odds": LARGEST_LOG_ODDS,
    "most_summed_tokens": MOST_SUMMED_TOKENS,
}
