"""What `make check-torch` and `check-cuda-torch` run under each torch: an installed freedave_kernels must load and compute.

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
from freedave_kernels import _C, _library, backends  # noqa: E402


def main() -> None:
    cuda_torch, cuda_kernels = torch.version.cuda is not None, bool(_C.build["cuda"])
    if "cuda" in sys.argv[2:]:
        assert cuda_torch and cuda_kernels, f"torch {torch.__version__} and {_C.build} must both be CUDA builds"
    assert Path(fk.__file__).is_relative_to(folder), f"imported {fk.__file__}, not the package in {folder}"
    assert _library.LOAD_ERROR is None, _library.LOAD_ERROR

    for op in backends.OPS:
        for key in ("CPU", "CUDA") if cuda_kernels else ("CPU",):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"freedave::{op}", key), f"{op}: nothing for {key}"
    if cuda_kernels:
        library = ctypes.CDLL(str(_library.PATH))
        library.freedave_finds_cuda_streams.restype = ctypes.c_bool
        assert library.freedave_finds_cuda_streams() == cuda_torch

    logits, drafts = torch.randn(2, 1, 8, 1000), torch.full((2, 1, 8), 7)
    results = {}
    for backend in ("cpu", "reference"):
        with fk.use_backend(backend):
            token_ids, confidence = fk.predict_tokens(logits, drafts, 7)
            step = fk.draft_step(drafts, token_ids, confidence, torch.ones(2, dtype=torch.int32), 7, 4)
            results[backend] = (token_ids, step.counters, step.drafts, step.step_map, step.confidence)
    for ours, theirs in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)

    architectures = ", ".join(_C.build["cuda_architectures"]) or "none"
    print(
        f"torch {torch.__version__}: {_library.PATH.name} loads, kernels of {len(backends.OPS)} ops registered "
        f"(CUDA architectures: {architectures}), CPU ops right"
    )


main()
