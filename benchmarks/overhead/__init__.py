"""`python -m benchmarks overhead`: what a call of the Triton ops costs on the host, which is all that batch 1 may notice.

Everything is there but the GPU: argument checks, torch's dispatcher, the launcher, Triton's own launch code, compiled against
a driver library (cuda_stub.c) whose calls do nothing. A real driver adds the time of its cuLaunchKernelEx.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import freedave_kernels as fk
from benchmarks import scenes
from benchmarks.measure import CannotMeasureError, interleaved
from benchmarks.record import Record
from benchmarks.scenes import MASK

ARCHITECTURE = (9, 0)
LIMIT = 60e-6  # seconds a launch


def run(record: Record, quick: bool) -> bool:
    """Returns whether every op stays below `LIMIT` a launch; a smoke run judges nothing."""
    rounds = 3 if quick else 30
    with tempfile.TemporaryDirectory() as folder:
        launches = pretend_to_have_a_gpu(Path(folder))
        with fk.use_backend("triton"):
            calls = operations()
            counts = {name: counted(call, launches) for name, call in calls.items()}
            timings = interleaved(calls | {"torch.empty": lambda: torch.empty(64)}, rounds)
    empty = timings.pop("torch.empty")
    record.add("torch.empty", {}, "", {"cpu": empty})
    for name, timing in timings.items():
        record.add(name, {"launches": counts[name]}, "", {"triton": timing})
        record.add(name, {"launches": 1}, "", {"triton, a launch": timing.per(counts[name])})
    # The best round is what the host takes when left alone, which neighbours on this machine cannot shorten.
    worst = max(timing.best / counts[name] for name, timing in timings.items())
    held = worst < LIMIT
    record.note(
        f"\nat most {worst * 1e6:.1f} us a launch, everything included (best of {rounds} rounds); the limit is "
        f"{LIMIT * 1e6:.0f}",
        us_a_launch=worst * 1e6,
        held=held,
    )
    return held or quick


def operations() -> dict[str, Callable[[], object]]:
    """Every op on the shapes of a decoder at batch 1 with 8 drafts."""
    scene = scenes.drafts(1, 8, 32)
    logits = torch.zeros(1, 8, 32, 1000, dtype=torch.bfloat16)
    state, tokens, confidence = scene.drafts[:, 0], scene.token_ids[:, 0], scene.confidence[:, 0]
    masked = state == MASK
    suppress = [3, 5]
    states = torch.zeros(1, 8, 32, 38, 6, dtype=torch.float64)
    predictions = (scene.drafts, scene.token_ids, scene.confidence, scene.num_drafts)
    return {
        "predict_tokens": lambda: fk.predict_tokens(logits, scene.drafts, MASK, suppress_tokens=suppress),
        "partial_predictions": lambda: fk.partial_predictions(logits, scene.drafts, MASK, suppress_tokens=suppress),
        "merge_predictions": lambda: fk.merge_predictions(states, scene.drafts),
        "logit_floor": lambda: fk.logit_floor(logits, top_k=50, top_p=0.9, suppress_tokens=suppress),
        "rank_positions": lambda: fk.rank_positions(confidence, masked),
        "select_transfer": lambda: fk.select_transfer(confidence, masked, num_transfer=2),
        "build_drafts": lambda: fk.build_drafts(state, tokens, confidence, MASK, 8),
        "verify_drafts": lambda: fk.verify_drafts(scene.drafts, scene.drafts),
        "draft_step": lambda: fk.draft_step(*predictions, MASK, 8, block_length=32),
    }


def counted(call: Callable[[], object], launches: Callable[[], int]) -> int:
    call()
    before = launches()
    call()
    return launches() - before


def pretend_to_have_a_gpu(folder: Path) -> Callable[[], int]:
    """Makes Triton launch CPU tensors on a GPU that is not there, and returns a count of what it launched.

    Must run before triton is imported, and ruins this process for any other use of Triton.
    """
    if fk.triton.interpreting():
        raise CannotMeasureError("TRITON_INTERPRET is set, and the interpreter launches nothing; unset it")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotMeasureError("the driver stub needs a C compiler; install one (Debian/Ubuntu: apt install gcc)")
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("cuda_stub.c")
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)], check=True
    )
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: -1  # where CPU tensors say that they are
    reason = fk.available_backends()["triton"]
    if reason is not None:
        raise CannotMeasureError(reason)

    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    from freedave_kernels.triton import registration

    launched = 0

    class Launcher(CudaLauncher):
        def __call__(self, *arguments: object) -> None:
            nonlocal launched
            launched += 1
            super().__call__(*arguments)

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = Launcher
            self.get_device_capability = lambda device: ARCHITECTURE
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0

    driver.set_active(Driver())
    registration.DEVICE = "cpu"
    return lambda: launched
