"""The emulator runs kernels as a GPU would, in every order; what launchers and kernels must not use does not compile."""

from __future__ import annotations

import subprocess
from pathlib import Path

import planting
import pytest

SELFTEST = planting.BUILD / "simt_selftest"
SCHEDULES = ["forward", "reverse", "random:1", "random:2", "random:3"]


def selftest(program: Path, *cases: str, schedule: str = "forward") -> str:
    assert program.exists(), f"{program} is missing; run `make simt`"
    result = subprocess.run(
        [program, *cases], env={"SIMT_SCHEDULE": schedule}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{cases} {schedule}: {result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kernels(schedule):
    cases = selftest(SELFTEST).split()
    assert len(cases) >= 12
    selftest(SELFTEST, *cases, schedule=schedule)


def test_unknown_schedule():
    with pytest.raises(
        AssertionError, match="SIMT_SCHEDULE is 'sideways'; expected forward, reverse, random:SEED or mixed"
    ):
        selftest(SELFTEST, "row_sums", schedule="sideways")


def test_context_switch_of_other_machines(tmp_path):
    """Where there is no hand-written switch, ucontext serves."""
    objects = []
    for source in [planting.SIMT / "fiber.cpp", planting.SIMT / "scheduler.cpp", planting.SIMT / "selftest/main.cpp"]:
        objects.append(tmp_path / f"{source.stem}.o")
        planting.compile_kernels(source, "plain", objects[-1], flags=("-DSIMT_UCONTEXT=1",))
    planting.compile_kernels(planting.SIMT / "selftest/kernels.cu", "plain", tmp_path / "kernels.o")
    planting.link([*objects, tmp_path / "kernels.o"], "plain", tmp_path / "selftest", "-ldl")
    selftest(tmp_path / "selftest", *selftest(SELFTEST).split(), schedule="random:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("__global__ void k(int* x) { atomicAdd(x, 1); __syncthreads(); }", None),
        ("__global__ void k(float* x) { atomicAdd(x, 1.0f); }", "no matching function for call to .atomicAdd"),
        (
            "__global__ void k(short* x) { *x = __shfl_sync(~0u, *x, 0); }",
            "no matching function for call to .__shfl_sync",
        ),
        ("__global__ void k() { __shared__ int x; }", "__shared__"),
        ("struct S { S() {} }; __global__ void k() { FREEDAVE_SHARED(S, s); }", "not initialised by constructors"),
        ("void host(void** p) { cudaMalloc(p, 1); }", "cudaMalloc"),
        ("void host() { cudaDeviceSynchronize(); }", "cudaDeviceSynchronize"),
        ("__global__ void k(); void host() { k<<<1, 1>>>(); }", "expected"),
    ],
)
def test_what_compiles(tmp_path, line, message):
    """The first compiles; each of the others would allocate, wait, depend on the order of arrival, or not run here."""
    source = tmp_path / "kernel.cu"
    source.write_text(f"#include <cuda_runtime.h>\n{line}\n")
    if message is None:
        planting.compile_kernels(source, "plain", tmp_path / "kernel.o", flags=("-fsyntax-only",))
    else:
        with pytest.raises(AssertionError, match=message):
            planting.compile_kernels(source, "plain", tmp_path / "kernel.o", flags=("-fsyntax-only",))
