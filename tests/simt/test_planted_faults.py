"""Faults planted in the emulator's own small kernels, one of each kind: each must be caught, and called by its name.

A kernel takes one fault at a time, but faults of different kernels go into one copy of the file, so there are few to compile.
"""

from __future__ import annotations

import subprocess

import planting
import pytest
from planting import Fault

KERNELS = "tests/simt/selftest/kernels.cu"


def fault(
    name: str, case: str, old: str, new: str, show: str, build: str = "plain", schedule: str = "forward"
) -> Fault:
    """Caught by the selftest's `case` in this order of threads."""
    return Fault(name, build, KERNELS, {old: new}, show, f"{case} {schedule}")


NEXT_ROW = "    __syncthreads();  // the next row uses the same partials\n"
WARP_BARRIER = "        __syncwarp();\n      }\n"
WAIT = "  cudaGridDependencySynchronize();\n"
SUM = "const int sum = __reduce_add_sync(kAll, squares[blockIdx.x * 32 + threadIdx.x]);\n"
FAULTS = [
    # Order
    fault("removed barrier", "row_tops", NEXT_ROW, "", "row_tops: wrong", schedule="reverse"),
    fault("removed barrier", "row_tops", NEXT_ROW, "", "data race .*row_tops_kernel", build="thread"),
    fault("removed warp barrier", "sort_rows", WARP_BARRIER, "}\n", "sort_rows: wrong order", schedule="reverse"),
    fault("removed warp barrier", "sort_rows", WARP_BARRIER, "}\n", "data race .*sort_rows_kernel", build="thread"),
    fault(
        "blocks race",
        "histogram",
        "atomicAdd(&counts[bin], block_counts[bin]);",
        "counts[bin] += block_counts[bin];",
        "data race .*histogram_kernel",
        build="thread",
    ),
    fault(
        "previous kernel not waited for",
        "squares_then_sums",
        "__global__ void sums_kernel(const int* squares, int* sums) {\n  cudaGridDependencySynchronize();\n",
        "__global__ void sums_kernel(const int* squares, int* sums) {\n",
        "sums_kernel.*: launched with programmatic serialization, but no thread calls cudaGridDependencySynchronize",
    ),
    fault(
        "previous kernel waited for too late",
        "squares_then_sums",
        f"{WAIT}  {SUM}",
        f"  {SUM}{WAIT}",
        "data race .*sums_kernel",
        build="thread",
    ),
    # Memory
    fault(
        "store out of bounds",
        "double_all",
        "if (i >= n) return;\n  const float4 v",
        "if (i > n) return;\n  const float4 v",
        "heap-buffer-overflow .*double_all_kernel",
        build="address",
    ),
    fault(
        "shared store out of bounds",
        "row_sums",
        "partial[warp] = sum;",
        "(&partial[warp])[1] = sum;",
        "use-after-poison .*row_sums_kernel",
        build="address",
    ),
    fault(
        "shared store out of bounds",
        "row_sums",
        "partial[warp] = sum;",
        "(&partial[warp])[1] = sum;",
        r"row_sums_kernel.*: block \(0, 0, 0\), wrote beyond the end of shared variable 'partial'",
    ),
    fault(
        "misaligned vector load",
        "double_all",
        "reinterpret_cast<const float4*>(x + i)",
        "reinterpret_cast<const float4*>(x + (i > 0 ? i - 1 : i))",
        "misaligned address .* for type 'const struct float4', which requires 16 byte alignment",
        build="address",
    ),
    fault("misaligned atomic", "histogram", "atomicMax(largest + 1, key)",
          "atomicMax(reinterpret_cast<unsigned long long*>(reinterpret_cast<char*>(largest) + 4), key)",
          "histogram_kernel.*: misaligned atomic at 0x"),
    fault("uninitialised shared memory", "histogram", "block_counts[bin] = 0;", ";", "histogram: wrong counts"),
    fault("uninitialised variable", "row_sums", "  float sum = 0.0f;\n", "  float sum;\n", "row_sums: wrong sum"),
    # Meetings
    fault(
        "divergent shuffle",
        "row_sums",
        "offset /= 2) sum += __shfl_down_sync",
        "offset /= 2) if (lane < offset) sum += __shfl_down_sync",
        r"deadlock, no thread can go on; warp 0: lanes 0x0000ffff wait in __shfl_down_sync with mask 0xffffffff "
        r"\(\S*kernels.cu:\d+\) lanes 0xffff0000 wait in __syncthreads \(\S*kernels.cu:\d+\)",
    ),
    fault("mask names an exited lane", "suffix_sums", "lanes == 32 ? kAll : (1u << lanes) - 1", "kAll",
          "names exited lanes 0xffffe000", schedule="reverse"),
    fault("exit of a lane that is waited for", "suffix_sums", "lanes == 32 ? kAll : (1u << lanes) - 1", "kAll",
          "exits while lanes 0x00001fff wait for it in __shfl_sync with mask 0xffffffff"),
    fault("mask names an absent lane", "reverse", "  shared[i] = x[i];\n", "  shared[i] = x[i];\n  __syncwarp();\n",
          "thread 96 .*: __syncwarp: mask 0xffffffff names absent lanes 0xfffffff0"),
    fault("mask without the caller", "votes", "__syncwarp(~even)", "__syncwarp(even)",
          "mask 0x[0-9a-f]{8} does not name the calling lane"),
    fault("deadlock", "votes", "__syncwarp(~even)", "__syncwarp()",
          "deadlock, no thread can go on; warp 0: .* wait in __syncwarp with mask 0xffffffff .* wait in __syncwarp"),
    fault("shuffle reads a lane outside its mask", "suffix_sums", " && lane + offset < lanes", "",
          "__shfl_sync: reads lane 13, which mask 0x00001fff does not name"),
    fault("width that is no power of two", "suffix_sums", "lane + delta, 8)", "lane + delta, 7)", "width 7 is not a power"),
    fault(
        "divergent barrier",
        "row_tops",
        "if (lane == 0) partial[warp] = top;\n    __syncthreads();\n",
        "if (lane == 0) {\n partial[warp] = top;\n __syncthreads();\n} else {\n __syncthreads();\n}\n",
        "divergent barrier: comes to __syncthreads while 1 threads wait in __syncthreads",
    ),
    fault("barrier that some do not come to", "sort_rows", "if (i < j) {", "if (i < j) {\n__syncthreads();",
          "deadlock|divergent barrier"),
    # Answers
    fault("wrong tie order", "row_tops", "a.index < b.index", "a.index > b.index", "row_tops: wrong index"),
]  # fmt: skip


def rounds() -> list[list[Fault]]:
    """The faults in groups that share one copy of the file: one build, and no kernel twice."""
    groups: list[list[Fault]] = []
    for each in FAULTS:
        for group in groups:
            if group[0].build == each.build and all(other.run.split()[0] != each.run.split()[0] for other in group):
                group.append(each)
                break
        else:
            groups.append([each])
    return groups


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The selftest program that contains a fault, for every fault."""
    found = {}
    mains = {}
    for group in rounds():
        folder, build = tmp_path_factory.mktemp("planted"), group[0].build
        text = (planting.ROOT / KERNELS).read_text()
        for each in group:
            text = planting.patched(text, each.changes, KERNELS)
        (folder / "kernels.cu").write_text(text)
        planting.compile_kernels(folder / "kernels.cu", build, folder / "kernels.o")
        if build not in mains:
            mains[build] = tmp_path_factory.mktemp("main") / "main.o"
            planting.compile_kernels(planting.SIMT / "selftest/main.cpp", build, mains[build])
        planting.link([folder / "kernels.o", mains[build]], build, folder / "selftest", "-ldl")
        found |= dict.fromkeys(group, folder / "selftest")
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}-{fault.build}".replace(" ", "_"))
def test_caught(fault, programs):
    case, schedule = fault.run.split()
    command = [str(programs[fault]), case]
    result = subprocess.run(
        planting.unrandomised(command) if fault.build == "thread" else command,
        env=planting.ENVIRONMENT | {"SIMT_SCHEDULE": schedule},
        capture_output=True,
        text=True,
        check=False,
    )
    planting.expect_shown(fault, result.returncode, result.stdout + result.stderr)
