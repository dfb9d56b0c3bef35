"""What each GPU kernel may use, read from its binary: one table for all backends. Going over fails a test.

Spills and local memory have no column: every kernel's are 0, but for `ALLOWED_STACK`. Registers decide how many programs a
multiprocessor holds; instructions an element decide whether memory or issue limits it (bfloat16 at 3.35 TB/s leaves an H100
some 17, a B200 at 8 TB/s some 9). They are counted along the whole way of a Triton kernel, which has no loop, and once around
the loop of a CUDA kernel, in a sweep that is whole.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    registers: int
    """A thread's, at most."""
    shared: int = 0
    """Bytes a block, at most (what the driver reserves included: 1 KB a block from sm_90 on)."""
    instructions: float | None = None
    """An element, at most."""
    vector_loads: int = 0
    """16-byte loads (LDG.E.128) that a thread issues one after the other, at least."""
    rarely: int = 0
    """Instructions of a CUDA kernel's loop beside those, at most: of a sweep that is not whole; the closer look at tokens of
    which one may be drawn.
    """


# Bytes a thread, of Triton kernels that take nearly all registers: draft_attention for its sums and weights. By what their
# cases' names begin with, the longest that fits.
ALLOWED_STACK = {
    # The terms of an entropy, beside which tokens are suppressed.
    "predict_tokens bfloat16 neg_entropy scored": 40,
    "draft_attention": 16,
    # Sums of a span, while a split is attended to; still the fastest of all combinations on an H100.
    **{f"draft_attention {dtype} 128": 256 for dtype in ("bfloat16", "float16")},
    **{f"draft_attention {dtype} {size}": 192 for dtype in ("bfloat16", "float16") for size in (80, 256)},
}

# (backend, architecture, case)
BUDGETS: dict[tuple[str, str, str], Budget] = {
    # 128 registers: two programs of 256 threads a multiprocessor, so that one loads while the other computes.
    ("triton", "sm_80", "predict_tokens bfloat16 prob"): Budget(128, 1024, 9.0, 8),
    ("triton", "sm_80", "predict_tokens float16 prob"): Budget(128, 1024, 9.5, 8),
    ("triton", "sm_80", "predict_tokens float32 prob"): Budget(128, 1024, 9.0, 16),
    ("triton", "sm_90", "predict_tokens bfloat16 prob"): Budget(128, 2048, 9.25, 8),
    ("triton", "sm_90", "predict_tokens float16 prob"): Budget(128, 2048, 9.75, 8),
    ("triton", "sm_90", "predict_tokens float32 prob"): Budget(128, 2048, 9.0, 16),
    ("triton", "sm_90", "predict_tokens bfloat16 prob everything"): Budget(128, 2048, 9.5, 8),
    ("triton", "sm_90", "predict_tokens bfloat16 margin"): Budget(128, 2048, 11.5, 8),
    ("triton", "sm_90", "predict_tokens float32 margin"): Budget(128, 2048, 11.75, 16),
    ("triton", "sm_90", "predict_tokens bfloat16 neg_entropy"): Budget(255, 2048, 34.0, 8),
    ("triton", "sm_90", "predict_tokens float32 neg_entropy"): Budget(255, 2048, 34.0, 16),
    ("triton", "sm_90", "predict_tokens bfloat16 log_odds"): Budget(128, 2048, 10.25, 8),
    ("triton", "sm_90", "predict_tokens float32 log_odds"): Budget(128, 2048, 9.75, 16),
    ("triton", "sm_90", "predict_tokens bfloat16 prob drawn"): Budget(128, 2048, 31.0, 8),
    ("triton", "sm_90", "predict_tokens float32 log_odds drawn"): Budget(128, 2048, 31.25, 16),
    ("triton", "sm_100", "predict_tokens bfloat16 prob"): Budget(128, 2048, 9.0, 8),
    ("triton", "sm_100", "predict_tokens float16 prob"): Budget(128, 2048, 9.0, 8),
    ("triton", "sm_100", "predict_tokens float32 prob"): Budget(128, 2048, 9.0, 16),
    ("triton", "sm_120", "predict_tokens bfloat16 prob"): Budget(128, 2048, 9.75, 8),
    ("triton", "sm_120", "predict_tokens float16 prob"): Budget(128, 2048, 9.75, 8),
    ("triton", "sm_120", "predict_tokens float32 prob"): Budget(128, 2048, 9.5, 16),
    # A row's sums are in int64. 128 registers: two programs of 256 threads a multiprocessor.
    **{("triton", name, f"logit_floor {dtype}"): Budget(128, 1024)
       for name in ("sm_80", "sm_90", "sm_100", "sm_120") for dtype in ("bfloat16", "float32")},
    # One warp, no shared memory: every reduction stays among its lanes.
    ("triton", "sm_80", "draft_step 8x32 recycled"): Budget(96),
    ("triton", "sm_90", "draft_step 8x32 recycled"): Budget(96),
    ("triton", "sm_90", "draft_step 8x32 recycled threshold"): Budget(96),
    ("triton", "sm_90", "draft_step 8x32 nested"): Budget(96),
    ("triton", "sm_100", "draft_step 8x32 recycled"): Budget(96),
    ("triton", "sm_120", "draft_step 8x32 recycled"): Budget(96),
    # One warp as well; shared memory turns vectors over, no more. Latency counts, so all registers may be taken.
    **{("triton", name, "pooled_step 8x32 pooled"): Budget(208, 1024)
       for name in ("sm_80", "sm_90", "sm_100", "sm_120")},
    ("triton", "sm_90", "pooled_step 16x128 pipelined threshold"): Budget(248, 1024),
    ("triton", "sm_90", "pooled_step 32x1024 pipelined"): Budget(208, 1024),
    # 16 warps: 128 registers are all that a multiprocessor has for them.
    ("triton", "sm_90", "draft_step 32x1024 recycled"): Budget(128, 2048),
    ("triton", "sm_90", "draft_step 32x2048 recycled"): Budget(128, 2048),
    ("triton", "sm_90", "rank_positions 4096"): Budget(128, 2048),
    # 255 registers: one program of 256 threads a multiprocessor, or two of 128.
    **{("triton", name, f"draft_attention bfloat16 128{rows}"): Budget(255, 1024)
       for name in ("sm_80", "sm_90", "sm_100", "sm_120") for rows in ("", " many rows")},
    **{("triton", name, "draft_attention float32 128"): Budget(128, 1024)
       for name in ("sm_80", "sm_90", "sm_100", "sm_120")},
    **{("triton", name, "keep bfloat16 128"): Budget(64, 1024)
       for name in ("sm_80", "sm_90", "sm_100", "sm_120")},
}  # fmt: skip

# CUDA kernels, the same for every architecture. 64 registers: eight blocks of 128 threads a multiprocessor, six where an
# entropy or a draw needs 80. A window may be a block of 1024 threads, for which a multiprocessor has 64 registers.
CUDA_ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
CUDA_BUDGETS = {
    "predict_tokens bfloat16 prob": Budget(64, 3232, 7.0, 4, 88),
    "predict_tokens float16 prob": Budget(64, 3232, 7.0, 4, 88),
    "predict_tokens float32 prob": Budget(64, 3232, 7.0, 8, 88),
    "predict_tokens bfloat16 margin": Budget(64, 3232, 9.0, 4, 88),
    "predict_tokens float16 margin": Budget(64, 3232, 9.0, 4, 88),
    "predict_tokens float32 margin": Budget(64, 3232, 8.0, 8, 88),
    "predict_tokens bfloat16 neg_entropy": Budget(80, 3232, 46.0, 4),
    "predict_tokens float16 neg_entropy": Budget(80, 3232, 46.0, 4),
    "predict_tokens float32 neg_entropy": Budget(80, 3232, 46.0, 8),
    "predict_tokens bfloat16 log_odds": Budget(64, 3232, 7.25, 4, 88),
    "predict_tokens float16 log_odds": Budget(64, 3232, 7.25, 4, 88),
    "predict_tokens float32 log_odds": Budget(64, 3232, 6.5, 8, 88),
    **{
        f"predict_tokens {dtype} {measure} drawn": Budget(80, 3328, 20.5, loads, 392)
        for dtype, loads in (("bfloat16", 4), ("float16", 4), ("float32", 8))
        for measure in ("prob", "log_odds")
    },
    "merge_states": Budget(48),
    "merge_states scored": Budget(64),
    "merge_and_read": Budget(72),
    "find_floors": Budget(64, 5632),
    "rank_rows": Budget(64, 9216),
    "select_rows": Budget(64, 10240),
    "build_sequences": Budget(64, 2048),
    "verify_sequences": Budget(64, 2048),
    "step_sequences": Budget(64, 2176),
    "step_pooled_sequences": Budget(64, 50176),
    "keep_rows 16 bytes": Budget(48, vector_loads=4),
    "keep_rows 2 bytes": Budget(48),
}
BUDGETS |= {("cuda", name, case): budget for name in CUDA_ARCHITECTURES for case, budget in CUDA_BUDGETS.items()}
BUDGETS |= {
    ("cuda", "sm_90", case): dataclasses.replace(budget, instructions=20.0)
    for case, budget in CUDA_BUDGETS.items()
    if case.endswith("drawn")
}
BUDGETS |= {  # five and four blocks a multiprocessor, as with 80 registers it would spill
    ("cuda", architecture, case): dataclasses.replace(budget, registers=registers)
    for architecture, registers in (("sm_100", 96), ("sm_120", 128))
    for case, budget in CUDA_BUDGETS.items()
    if case.endswith("drawn")
}
BUDGETS["cuda", "sm_120", "find_floors"] = Budget(128, 5632)  # one block a multiprocessor, as with 64 it would spill
