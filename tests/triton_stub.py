"""Triton without a GPU: compiles for an architecture that is not there, and records launches instead of running them.

Run as a program, it calls every op on the shapes that decoders use and writes what Triton made of their kernels:
`python tests/triton_stub.py FOLDER sm_90 gfx942`. It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from freedave_kernels.contract import MEASURES, PoolLayout
from freedave_kernels.triton import launch
from freedave_kernels.triton.build_drafts import build_drafts, build_sequence
from freedave_kernels.triton.draft_attention import attend, draft_attention, merge_parts
from freedave_kernels.triton.draft_step import draft_step, step_sequence
from freedave_kernels.triton.keep import keep, keep_rows
from freedave_kernels.triton.logit_floor import find_floor, logit_floor
from freedave_kernels.triton.merge_predictions import merge_predictions, merge_states
from freedave_kernels.triton.partial_predictions import partial_predictions
from freedave_kernels.triton.pooled_step import pooled_step, step_pooled
from freedave_kernels.triton.predict_tokens import predict_tokens
from freedave_kernels.triton.rank_positions import rank_positions, rank_tile
from freedave_kernels.triton.scan_logits import scan_chunk
from freedave_kernels.triton.select_transfer import select_row, select_transfer
from freedave_kernels.triton.verify_drafts import verify_drafts, verify_sequence

KERNELS = [
    scan_chunk, merge_states, find_floor, rank_tile, select_row, build_sequence, verify_sequence,
    step_sequence, step_pooled, attend, merge_parts, keep_rows,
]  # fmt: skip
MASK = 9


class StubDriver:
    """What Triton asks of a driver, for a GPU on which launching does nothing. CPU tensors live on its device -1."""

    def __init__(self, architecture: str) -> None:
        amd = architecture.startswith("gfx")
        self.target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
        self.grids: list[tuple[int, ...]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 2**20},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *call: self.grids.append(call[:3])

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def use(architecture: str) -> StubDriver:
    stub = StubDriver(architecture)
    driver.set_active(stub)
    torch.cuda.current_device = stub.get_current_device
    launch.ROCM = architecture.startswith("gfx")
    launch.architecture.cache_clear()
    for kernel in KERNELS:
        kernel.compiled.clear()
        kernel.function.device_caches.clear()
    return stub


def predict(dtype: torch.dtype, measure: str, vocab: int = 151936, offset: int = 0, **extra: Any) -> Callable[[], Any]:
    """One masked row; `offset` elements past an aligned address."""
    logits = torch.zeros(vocab + offset, dtype=dtype)[offset:].view(1, vocab)
    suppress, shift = extra.get("suppress"), extra.get("shift", False)
    drawn = extra.get("drawn", False)
    temperature, seed = (torch.tensor([0.7]), torch.tensor([1])) if drawn else (None, None)
    rest = (measure, suppress, shift, temperature, seed, seed, extra.get("floor"))
    rest += (extra.get("scored"), extra.get("suppression", "exclude"))
    return lambda: predict_tokens(logits, torch.tensor([MASK]), MASK, extra.get("mask"), *rest)


def partial(dtype: torch.dtype, measure: str) -> Callable[[], Any]:
    """One masked row and eight chunks of the vocabulary."""
    logits, suppress = torch.zeros(1, 32768, dtype=dtype), torch.tensor([5])
    rest = (None, measure, suppress, False, None, None, None, None)
    return lambda: partial_predictions(logits, torch.tensor([MASK]), MASK, 4096, *rest)


def floors(dtype: torch.dtype, everything: bool = True) -> Callable[[], Any]:
    """Everything that may be given, or nothing beside the truncations."""
    logits = torch.zeros(1, 151936, dtype=dtype)
    given = (torch.tensor([0.7]), torch.tensor([True]), torch.tensor([5])) if everything else (None, None, None)
    return lambda: logit_floor(logits, 50, 0.9, 0.01, *given)


def drafts(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.full((1, count, length), MASK)
    return ids, ids, torch.zeros(1, count, length), torch.full((1,), count, dtype=torch.int32)


def step(
    count: int, length: int, drafting: str, threshold: float | None = None, bounded: str = "threshold"
) -> Callable[[], Any]:
    rule = (1, None, threshold, None, bounded, "confidence", 32, drafting, "exact", 2, None, None, None)
    return lambda: draft_step(*drafts(count, length), MASK, count, *rule)


def pooled(
    count: int,
    length: int,
    states: int,
    drafting: str,
    batch: int = 1,
    threshold: float | None = None,
    bounded: str = "threshold",
) -> Callable[[], Any]:
    """Everything that may be given."""
    ids, _, confidence, num_drafts = (tensor.expand(batch, *tensor.shape[1:]) for tensor in drafts(count, length))
    pool = torch.zeros(batch, PoolLayout.of(states, length).width, dtype=torch.int64)
    number, flag = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.bool)
    rule = (1, number, threshold, number.double(), bounded, "confidence", 32, drafting, 2, number)
    of_pool = (number, number, number, ids[:, :, 0], number, flag)
    return lambda: pooled_step(ids, ids, confidence, num_drafts, pool, states, length, MASK, count, *rule, *of_pool)


def attention(dtype: torch.dtype, size: int, batch: int, count: int, length: int, heads: int = 32) -> Callable[[], Any]:
    """Eight groups, 8,192 stored positions, everything that may be given; projections as a model makes them."""

    def projection(of: int) -> torch.Tensor:
        return torch.empty(batch, count, of, length, size, dtype=dtype).transpose(2, 3)

    query, window = projection(heads), projection(8)
    stored = torch.empty(batch, 8192, 8, size, dtype=dtype)
    numbers = torch.zeros(batch, dtype=torch.int64)
    ranges = torch.zeros(batch, 2, 2, dtype=torch.int32)
    return lambda: draft_attention(query, window, window, stored, stored, ranges, *[numbers] * 4, 4)


def kept() -> Callable[[], Any]:
    window, stored = torch.empty(2, 1, 8, 20, 8, 128).bfloat16(), torch.empty(2, 1, 64, 8, 128).bfloat16()
    numbers = torch.zeros(1, dtype=torch.int64)
    return lambda: keep(window, window, *[numbers] * 3, stored, stored, numbers)


def cases(architecture: str) -> dict[str, Callable[[], Any]]:
    """By name; the names are those of tests/budgets.py."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    confidence, masked = torch.zeros(1, 32), torch.ones(1, 32, dtype=torch.bool)
    ids = torch.full((1, 32), MASK)
    states = torch.zeros(1, 38, 6, dtype=torch.float64)
    everywhere = {
        "predict_tokens bfloat16 prob": predict(bf16, "prob"),
        "predict_tokens float16 prob": predict(fp16, "prob"),
        "predict_tokens float32 prob": predict(fp32, "prob"),
        "partial_predictions bfloat16 prob": partial(bf16, "prob"),
        "merge_predictions prob": lambda: merge_predictions(states, torch.tensor([MASK]), "prob", False),
        "logit_floor bfloat16": floors(bf16),
        "logit_floor float32": floors(fp32),
        "draft_step 8x32 recycled": step(8, 32, "recycled"),
        "pooled_step 8x32 pooled": pooled(8, 32, 24, "pooled"),
        "rank_positions 32": lambda: rank_positions(confidence, masked, "confidence", None),
        "select_transfer 32": lambda: select_transfer(
            confidence, masked, 1, None, 0.9, None, "threshold", "top", "confidence", 32
        ),
        "build_drafts 32": lambda: build_drafts(
            ids, ids, confidence, MASK, 8, 1, None, None, None, "threshold", "confidence", 32
        ),
        "verify_drafts 8x32": lambda: verify_drafts(drafts(8, 32)[0], drafts(8, 32)[0], None, "exact", None),
        "draft_attention bfloat16 128": attention(bf16, 128, 1, 8, 20),
        "draft_attention bfloat16 128 many rows": attention(bf16, 128, 4, 8, 20),
        "draft_attention bfloat16 256": attention(bf16, 256, 1, 8, 20),
        "draft_attention float32 128": attention(fp32, 128, 1, 2, 4),
        "keep bfloat16 128": kept(),
    }
    if architecture != "sm_90":
        return everywhere
    extra = {"mask": torch.tensor([True]), "suppress": torch.tensor([1]), "shift": True}
    return everywhere | {
        **{f"predict_tokens {name} {measure}": predict(dtype, measure)
           for name, dtype in (("bfloat16", bf16), ("float16", fp16), ("float32", fp32))
           for measure in ("margin", "neg_entropy", "log_odds")},
        "predict_tokens bfloat16 prob everything": predict(bf16, "prob", **extra),
        "logit_floor bfloat16 alone": floors(bf16, everything=False),
        **{f"predict_tokens bfloat16 {measure} scored, forbidden": predict(
            bf16, measure, suppress=torch.tensor([1]), suppression="forbid", scored=torch.tensor([5]))
           for measure in MEASURES},
        "predict_tokens bfloat16 prob drawn": predict(bf16, "prob", drawn=True),
        "predict_tokens float32 log_odds drawn": predict(fp32, "log_odds", drawn=True),
        "predict_tokens bfloat16 prob drawn above a floor": predict(bf16, "prob", drawn=True, floor=torch.zeros(1)),
        "merge_predictions log_odds drawn": lambda: merge_predictions(states, torch.tensor([MASK]), "log_odds", True),
        "predict_tokens bfloat16 prob 4 bytes": predict(bf16, "prob", offset=2),
        "predict_tokens bfloat16 prob 2 bytes": predict(bf16, "prob", offset=1),
        "predict_tokens float32 prob 4 bytes": predict(fp32, "prob", offset=1),
        **{f"partial_predictions float32 {measure}": partial(fp32, measure)
           for measure in ("margin", "neg_entropy", "log_odds")},
        "merge_predictions prob scored, forbidden": lambda: merge_predictions(
            torch.zeros(1, 38, 8, dtype=torch.float64), torch.tensor([MASK]), "prob", False
        ),
        **{f"merge_predictions {measure}": functools.partial(merge_predictions, states, torch.tensor([MASK]), measure, False)
           for measure in ("margin", "neg_entropy", "log_odds")},
        "draft_step 8x32 nested": step(8, 32, "nested"),
        "draft_step 8x32 recycled threshold": step(8, 32, "recycled", 0.9),
        "draft_step 8x32 recycled factor": step(8, 32, "recycled", 1.0, "factor"),
        "draft_step 8x32 recycled entropy bound": step(8, 32, "recycled", 0.35, "entropy_bound"),
        "draft_step 32x1024 recycled": step(32, 1024, "recycled"),
        "draft_step 32x2048 recycled": step(32, 2048, "recycled"),
        "pooled_step 16x128 pipelined threshold": pooled(16, 128, 96, "pipelined", threshold=0.9),
        "pooled_step 16x128 pipelined factor": pooled(16, 128, 96, "pipelined", threshold=1.0, bounded="factor"),
        "pooled_step 32x1024 pipelined": pooled(32, 1024, 192, "pipelined"),
        **{f"draft_attention {name} {size}": attention(dtype, size, 1, 2, 4)
           for name, dtype in (("bfloat16", bf16), ("float16", fp16), ("float32", fp32)) for size in (64, 80, 256)},
        **{f"draft_attention {name} {size} many rows": attention(dtype, size, 4, 8, 20)
           for name, dtype, size in (("bfloat16", bf16, 64), ("bfloat16", bf16, 256), ("float32", fp32, 128))},
        "draft_attention bfloat16 128 one draft": attention(bf16, 128, 1, 1, 1024),
        "rank_positions 4096": lambda: rank_positions(
            torch.zeros(1, 4096), torch.ones(1, 4096, dtype=torch.bool), "confidence", None
        ),
    }  # fmt: skip


def write(folder: Path, architecture: str) -> None:
    """FOLDER/ARCHITECTURE/CASE.KERNEL.SUFFIX for every stage of every kernel that a case launches."""
    folder = folder / architecture
    folder.mkdir(parents=True)
    for name, call in cases(architecture).items():
        stub = use(architecture)
        call()
        launched = [(kernel, compiled) for kernel in KERNELS for compiled in kernel.compiled.values()]
        assert len(launched) == len(stub.grids), "a kernel was compiled more than once, or not at all"
        for _, compiled in launched:
            stem = f"{name}.{compiled.name}"
            for suffix in {"ttgir", "ptx", "cubin", "amdgcn", "hsaco"} & set(compiled.asm):
                content = compiled.asm[suffix]
                (folder / f"{stem}.{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
            facts = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared}
            (folder / f"{stem}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        write(Path(sys.argv[1]), wanted)
