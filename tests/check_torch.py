"""What `make check-torch` and `check-cuda-torch` run first under each torch: the installed package loads and computes.

Needs no GPU. Usage: check_torch.py FOLDER [cuda], where FOLDER holds the installed package and `cuda` says that this torch
and the package must have been built with CUDA.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

folder = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(folder))

import torch  # noqa: E402

import freedave_kernels as fk  # noqa: E402
from freedave_kernels import _C, _library  # noqa: E402
from freedave_kernels.contract import OPS  # noqa: E402


def results_of_every_op() -> dict[str, object]:
    random = torch.Generator().manual_seed(0)
    mask = 7
    logits, drafts = torch.randn(2, 1, 8, 5000, generator=random), torch.full((2, 1, 8), mask)
    token_ids, confidence = fk.predict_tokens(logits, drafts, mask)
    states = fk.partial_predictions(logits, drafts, mask)
    ids, tokens, sure = drafts[:, 0], token_ids[:, 0], confidence[:, 0]
    next_drafts, num_drafts = fk.build_drafts(ids, tokens, sure, mask, 4)
    step = fk.draft_step(drafts, token_ids, confidence, torch.ones(2, dtype=torch.int32), mask, 4)
    pooled = fk.draft_step(
        drafts, token_ids, confidence, num_drafts, mask, 4, drafting="pooled", pool=fk.draft_pool(2, 4, 8)
    )
    windows, stored = torch.randn(2, 3, 2, 1, 8, 2, 16, generator=random), torch.zeros(2, 3, 2, 20, 2, 16)
    fk.keep(*windows, *torch.tensor([[0, 0], [0, 15], [8, 4]]), *stored)
    return {
        "predict_tokens": (token_ids, confidence),
        "partial_predictions": states,
        "merge_predictions": fk.merge_predictions(states, drafts),
        "logit_floor": fk.logit_floor(logits, top_k=50, top_p=0.9, min_p=0.01),
        "rank_positions": fk.rank_positions(sure, ids == mask),
        "select_transfer": fk.select_transfer(sure, ids == mask, threshold=0.001),
        "build_drafts": (next_drafts, num_drafts),
        "verify_drafts": fk.verify_drafts(next_drafts, next_drafts.roll(-1, 1), num_drafts=num_drafts),
        "draft_step": (step.counters, step.token_ids, step.drafts, step.step_map, step.confidence),
        "pooled_step": (pooled.counters, pooled.token_ids, pooled.drafts, pooled.step_map, pooled.confidence),
        "keep": stored,
    }


def main() -> None:
    cuda_torch, cuda_kernels = torch.version.cuda is not None, bool(_C.build["cuda"])
    if "cuda" in sys.argv[2:]:
        assert cuda_torch and cuda_kernels, f"torch {torch.__version__} and {_C.build} must both be CUDA builds"
    assert Path(fk.__file__).is_relative_to(folder), f"imported {fk.__file__}, not the package in {folder}"
    assert _library.LOAD_ERROR is None, _library.LOAD_ERROR

    for op, rooms in OPS.items():
        on_gpu = cuda_kernels and bool({"cuda", "triton"} & {*rooms.native, *rooms.python})
        for key in ("CPU", "CUDA") if on_gpu else ("CPU",):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"freedave::{op}", key), f"{op}: nothing for {key}"
    if cuda_kernels:
        library = ctypes.CDLL(str(_library.PATH))
        library.freedave_finds_cuda_streams.restype = ctypes.c_bool
        assert library.freedave_finds_cuda_streams() == cuda_torch

    results = {}
    for backend in ("cpu", "reference"):
        with fk.use_backend(backend):
            results[backend] = results_of_every_op()
    for op, ours in results["cpu"].items():
        torch.testing.assert_close(
            ours, results["reference"][op], rtol=1e-5, atol=0, msg=lambda text, op=op: f"{op}: {text}"
        )
    missing = set(_C.contract["ops"]) - results["cpu"].keys()
    assert not missing, f"not tried: {missing}"

    architectures = ", ".join(_C.build["cuda_architectures"]) or "none"
    print(
        f"torch {torch.__version__}: {_library.PATH.name} loads, kernels of {len(OPS)} ops registered "
        f"(CUDA architectures: {architectures}), CPU ops right"
    )


main()
