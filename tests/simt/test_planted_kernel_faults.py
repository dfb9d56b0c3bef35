"""Faults planted in copies of the real kernels: the contract tests, run on the emulator, must catch every one.

A kernel that has changed so that a patch no longer applies fails its test: then plant the fault anew.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import planting
import pytest
from planting import Fault


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of the kernels in which the faults are planted together; each is caught by a test of its own."""

    kernels: str  # the file of csrc/cuda that is compiled, without its suffix
    build: str
    faults: list[Fault]


def plant(kernels: str, build: str, *faults: tuple[str, str, str, str, str], file: str = "") -> Copy:
    """Faults (name, old text, new text, what is shown, test) in `file`: where none is given, in the kernels' own."""
    path = f"csrc/cuda/{file or kernels + '.cu'}"
    return Copy(
        kernels, build, [Fault(name, build, path, {old: new}, show, run) for name, old, new, show, run in faults]
    )


WRONG = r"\bE (AssertionError: )?assert |Tensor-likes are not"
LONG = "test_long_windows.py::"
COPIES = [
    # predict_tokens, whose kernels stand in scan_logits.cu and merge_predictions.cu
    plant(
        "scan_logits",
        "plain",
        (
            "wrong tie order",
            "token = token < scratch.token[w] ? token : scratch.token[w];",
            "token = token > scratch.token[w] && scratch.token[w] != kNone ? token : scratch.token[w];",
            WRONG,
            "test_predict_tokens.py::test_ties_go_to_the_lower_token",
        ),
        (
            "draws of a row are held to the bar of the row before",
            "if (threadIdx.x == 0) scratch.bar = ",
            "if (threadIdx.x == 0 && row == blockIdx.y) scratch.bar = ",
            WRONG,
            "test_drawn_tokens.py::test_example",
        ),
        (
            "rows without a temperature are drawn",
            "Drawn::kLowestBar : Drawn::kNoToken;",
            "Drawn::kLowestBar : Drawn::kLowestBar;",
            WRONG,
            "test_drawn_tokens.py::test_each_position_has_its_temperature",
        ),
        (
            "tokens within the largest noise are left out",
            "largest + kLargestNoise",
            "largest + kLargestNoise - 1e-3f",
            WRONG,
            "test_draw_bounds.py::test_the_largest_noise_decides",
        ),
        (
            "the chosen token among its others",
            "static_cast<uint32_t>(first + i) == token ? -INFINITY : x[i]",
            "x[i]",
            WRONG,
            "test_predict_tokens.py::test_very_confident_rows_keep_their_digits and log_odds",
        ),
        (
            "uninitialised shared memory",
            "bits[i] = 0;",
            "(void)bits[i];",
            WRONG,
            "test_predict_tokens.py::test_suppressed_tokens_leave_the_softmax",
        ),
        (
            "states of rows that are not masked left as they were",
            "store_state(empty_softmax(), state_of(candidate));",
            "(void)state_of(candidate);",
            WRONG,
            "test_partial_predictions.py::test_example",
        ),
    ),
    plant(
        "scan_logits",
        "plain",
        (
            "the bar of draws is too high",
            "fabsf(noisy) * 0x1p-22f + 1e-4f",
            "-0.5f",
            WRONG,
            "test_drawn_tokens.py::test_every_token_has_its_own_noise",
        ),
        file="draw_token.cuh",
    ),
    plant(
        "scan_logits",
        "thread",
        (
            "removed barrier",
            "  if (lane_id() == 0) scratch.max[warp_id()] = warp_top;\n  __syncthreads();\n",
            "  if (lane_id() == 0) scratch.max[warp_id()] = warp_top;\n",
            "data race .* scan_chunk",
            "test_predict_tokens.py::test_example",
        ),
    ),
    plant(
        "merge_predictions",
        "plain",
        (
            "reads before the previous kernel is complete",
            "merge_states(const __grid_constant__ MergePredictionsParams p, uint32_t rows) {\n"
            "  let_next_kernel_launch();\n  wait_for_previous_kernel();\n",
            "merge_states(const __grid_constant__ MergePredictionsParams p, uint32_t rows) {\n"
            "  let_next_kernel_launch();\n",
            "merge_states.* but no thread calls cudaGridDependencySynchronize",
            "test_predict_tokens.py::test_example",
        ),
    ),
    plant(
        "scan_logits",
        "address",
        (
            "misaligned vector load",
            "reinterpret_cast<uintptr_t>(logits) % 16 == 0 && vocab",
            "vocab",
            "misaligned address 0x[0-9a-f]+ for type",
            "test_predict_tokens.py::test_rows_that_start_anywhere and bfloat16",
        ),
        file="logit_groups.cuh",
    ),
    # logit_floor
    plant(
        "logit_floor",
        "plain",
        (
            "what is suppressed is looked up by its mark alone",
            "if (place >= 0 && place < kGroup) bits |= 1u << place;",
            "bits |= 1u << ((place % kGroup + kGroup) % kGroup);",
            WRONG,
            "test_logit_floor.py::test_suppressed_tokens_are_no_candidates",
        ),
        (
            "a pivot's own key counts as above it",
            "mine[j] += part > pivot[j] ? weighs : 0;",
            "mine[j] += part >= pivot[j] ? weighs : 0;",
            WRONG,
            "test_logit_floor.py::test_example",
        ),
    ),
    plant(
        "logit_floor",
        "thread",
        (
            "removed barrier",
            "sums[j] += scratch_.sums[w][j];\n    }\n    __syncthreads();\n",
            "sums[j] += scratch_.sums[w][j];\n    }\n",
            "data race .* find_floors",
            "test_logit_floor.py::test_example",
        ),
    ),
    # rank_positions
    plant(
        "rank_positions",
        "plain",
        ("removed barrier", "kNoKey;\n  __syncthreads();\n", "kNoKey;\n", WRONG, LONG + "test_rank_positions"),
    ),
    plant(
        "rank_positions",
        "thread",
        (
            "removed barrier",
            "kNoKey;\n  __syncthreads();\n",
            "kNoKey;\n",
            "data race .* rank_rows|data race .* rank_in_block",
            LONG + "test_rank_positions and 33",
        ),
    ),
    plant(
        "rank_positions",
        "plain",
        (
            "uninitialised shared memory",
            "keys[i] = ranked ? position_key(p.order, p.confidence.at(row, i), i) : kNoKey;",
            "if (ranked) keys[i] = position_key(p.order, p.confidence.at(row, i), i);",
            WRONG,
            "test_rank_positions.py::test_agrees_with_the_oracle",
        ),
    ),
    plant(
        "rank_positions",
        "address",
        (
            "store out of bounds",
            "  if (!inside) return;\n",
            "",
            "heap-buffer-overflow .* rank_rows",
            "test_rank_positions.py::test_example",
        ),
    ),
    plant(
        "rank_positions",
        "thread",
        (
            "blocks write the same place",
            "p.rank[row * length + i] = rank;",
            "p.rank[row * (length - 1) + i] = rank;",
            "data race .* rank_rows",
            LONG + "test_rank_positions and 33",
        ),
    ),
    # window.cuh, in build_drafts
    plant(
        "build_drafts",
        "plain",
        (
            "wrong tie order",
            "__ffs(static_cast<int>(tied)) - 1)",
            "31 - __clz(static_cast<int>(tied)))",
            WRONG,
            "test_build_drafts.py::test_agrees_with_the_oracle",
        ),
        file="window.cuh",
    ),
    plant(
        "build_drafts",
        "plain",
        (
            "divergent shuffle",
            "    return reduce(theirs);\n",
            "    return answered ? reduce(theirs) : theirs;\n",
            r"build_drafts: .*build_sequences\(.*deadlock, no thread can go on; warp 0: .* wait in __reduce_\w+_sync "
            r"with mask 0xffffffff \(csrc/cuda/window.cuh:\d+\)",
            LONG + "test_build_drafts",
        ),
        file="window.cuh",
    ),
    plant(
        "build_drafts",
        "plain",
        (
            "mask that does not name the caller",
            "__ballot_sync(kFullWarp, mine.block == block && mine.key == key)",
            "__ballot_sync(kFullWarp >> 1, mine.block == block && mine.key == key)",
            r"lane 31\) at csrc/cuda/window.cuh:\d+: __ballot_sync: mask 0x7fffffff does not name the calling lane",
            "test_build_drafts.py::test_example",
        ),
        file="window.cuh",
    ),
    plant(
        "build_drafts",
        "plain",
        (
            "divergent barrier",
            "if (lane_id() == 0) answers_.candidate[turn_][warp_id()] = mine;\n    __syncthreads();\n",
            "if (warp_id() == 0) __syncthreads();\n"
            "if (lane_id() == 0) answers_.candidate[turn_][warp_id()] = mine;\nif (warp_id() != 0) __syncthreads();\n",
            r"divergent barrier: comes to __syncthreads while \d+ threads wait in __syncthreads \(csrc/cuda/window.cuh:\d+\)",
            LONG + "test_build_drafts",
        ),
        file="window.cuh",
    ),
    plant(
        "build_drafts",
        "plain",
        (
            "threads without a position exit before the warp's collectives",
            "  const int i = window.position;\n",
            "  const int i = window.position;\n  if (!window.inside) return;\n",
            "names exited lanes 0x|exits while lanes 0x[0-9a-f]* wait for it",
            "test_build_drafts.py::test_example",
        ),
    ),
    plant(
        "build_drafts",
        "thread",
        (
            "one set of answers",
            "    turn_ ^= 1;\n    return warp_first(mine);\n",
            "    return warp_first(mine);\n",
            "data race .*Window::(warp_)?first",
            LONG + "test_build_drafts and 33",
        ),
        file="window.cuh",
    ),
    # verify_drafts
    plant(
        "verify_drafts",
        "plain",
        (
            "previous kernel not waited for",
            "  wait_for_previous_kernel();\n",
            "",
            "verify_sequences.*launched with programmatic serialization, but no thread calls cudaGridDependencySynchronize",
            "test_verify_drafts.py::test_example",
        ),
    ),
    # draft_step
    plant(
        "draft_step",
        "plain",
        (
            "uninitialised shared memory",
            "if (window.position < kMaxDrafts) counts[window.position] = 0;",
            "",
            WRONG,
            "test_draft_step.py::test_agrees_with_the_oracle",
        ),
    ),
    plant(
        "draft_step",
        "thread",
        (
            "removed barrier",
            "    __syncthreads();\n    mine_ = counts[lane_id()];\n",
            "    mine_ = counts[lane_id()];\n",
            "data race .* Distances ",
            "test_draft_step.py::test_long_windows_and_many_drafts and 64-9 and recycled",
        ),
    ),
    plant(
        "draft_step",
        "thread",
        (
            "addition that is not atomic",
            "atomicAdd(&counts[j], static_cast<uint32_t>(__popc(static_cast<int>(differing))));",
            "counts[j] += static_cast<uint32_t>(__popc(static_cast<int>(differing)));",
            "data race .* Distances ",
            "test_draft_step.py::test_long_windows_and_many_drafts and 64-9 and recycled",
        ),
    ),
    plant(
        "draft_step",
        "address",
        (
            "store out of bounds",
            "    if (window.inside) drafts[k",
            "    drafts[k",
            "heap-buffer-overflow .* (step_sequences|chain_drafts)",
            "test_draft_step.py::test_example",
        ),
    ),
    # pooled_step
    plant(
        "pooled_step",
        "plain",
        (
            "uninitialised shared memory",
            "        clear(k, c);\n",
            "        (void)c;\n",
            WRONG,
            "test_pooled_step.py::test_long_windows_and_many_drafts and 40-45",
        ),
        file="known_states.cuh",
    ),
    plant(
        "pooled_step",
        "plain",
        (
            "states that go are still met",
            "tally_[g] -= tally_[g] % kOlder;",
            "(void)tally_[g];",
            WRONG,
            "test_pooled_step.py::test_a_state_that_was_known_once_is_forwarded_again",
        ),
        file="known_states.cuh",
    ),
    plant(
        "pooled_step",
        "plain",
        (
            "effect of what the state has filled",
            "filled_ && known.state(k, adds_) == known.mask()",
            "filled_",
            WRONG,
            "test_pooled_step.py::test_agrees_with_the_oracle",
        ),
        file="known_states.cuh",
    ),
    plant(
        "pooled_step",
        "plain",
        (
            "effect of two positions taken for that of one",
            "changes / kConflict == 1",
            "changes >= kConflict",
            WRONG,
            "test_pooled_step.py::test_measured_effects",
        ),
        file="known_states.cuh",
    ),
    plant(
        "pooled_step",
        "plain",
        (
            "candidate that is as good and later",
            "lane_id() < count_ && score_ >= score",
            "lane_id() < count_ && score_ > score",
            WRONG,
            "test_pooled_step.py::test_ties_go_to_the_earlier_draft",
        ),
    ),
    plant(
        "pooled_step",
        "plain",
        (
            "previous kernel not waited for",
            "  wait_for_previous_kernel();\n",
            "",
            "step_pooled_sequences.*launched with programmatic serialization, but no thread calls",
            "test_pooled_step.py::test_example",
        ),
    ),
    plant(
        "pooled_step",
        "thread",
        (
            "removed barrier",
            "    __syncthreads();  // entries that go",
            "    // entries that go",
            "data race .* (write_pool|KnownStates)",
            "test_pooled_step.py::test_long_windows_and_many_drafts and 200-230 and not pipelined and factor and left_to",
        ),
    ),
    plant(
        "pooled_step",
        "thread",
        (
            "sums read before all have added to them",
            "      __syncthreads();\n      changes = of_drafts",
            "      changes = of_drafts",
            "data race .*::compare_with_first",
            "test_pooled_step.py::test_long_windows_and_many_drafts and 64-64-9",
        ),
        file="known_states.cuh",
    ),
    plant(
        "pooled_step",
        "address",
        (
            "store out of bounds",
            "      if (window_.inside)\n        record().drafts",
            "        record().drafts",
            "heap-buffer-overflow .* (step_pooled_sequences|write_drafts|Sequence)",
            "test_pooled_step.py::test_a_swap_that_rejoins",
        ),
    ),
    # keep
    plant(
        "keep",
        "plain",
        (
            "copies beyond what is kept",
            "      if (unit >= units) continue;\n",
            "",
            WRONG,
            "test_keep.py::test_agrees_with_the_definition",
        ),
    ),
    plant(
        "keep",
        "plain",
        (
            "previous kernel not waited for",
            "  wait_for_previous_kernel();\n",
            "",
            "keep_rows.*launched with programmatic serialization, but no thread calls cudaGridDependencySynchronize",
            "test_keep.py::test_example",
        ),
    ),
    plant(
        "keep",
        "address",
        (
            "misaligned vector load",
            "return all % 16 == 0;",
            "return p.group_bytes % 16 == 0;",
            "misaligned address 0x[0-9a-f]+ for type",
            "test_keep.py::test_addresses",
        ),
    ),
    plant(
        "keep",
        "thread",
        (
            "threads write the same place",
            "const uint32_t unit = first + n * together;",
            "const uint32_t unit = first + n;",
            "data race .* keep_rows",
            "test_keep.py::test_example",
        ),
    ),
]
# No fault: it refuses to work out what the kernel should leave out where it can, in all sweeps but a thread's first.
LEAVES_OUT = plant(
    "scan_logits",
    "plain",
    (
        "no noise after the first sweep",
        "  float most[kQuadsAhead];\n",
        "  if (sweep > 0) __syncwarp(0);\n  float most[kQuadsAhead];\n",
        "scan_chunks.*mask 0x0+ does not name the calling lane",
        "test_draw_bounds.py::test_rows_of_which_much_or_little_might_win",
    ),
)
COPIES.append(LEAVES_OUT)
FAULTS = [pytest.param(copy, fault, id=f"{copy.kernels}-{fault.name}-{copy.build}".replace(" ", "_"))
          for copy in COPIES for fault in copy.faults]  # fmt: skip


class Runner:
    """One process a build, started when first needed."""

    def __init__(self, build: str) -> None:
        command, environment = planting.python_command(build)
        self.process = subprocess.Popen(
            [*command, str(planting.SIMT / "contract_runner.py")],
            env=environment, cwd=planting.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, job: dict) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def runners():
    started: dict[str, Runner] = {}
    yield started
    for runner in started.values():
        runner.close()


def faulty_library(copy: Copy, folder: Path) -> str:
    """The emulated ops with one kernel compiled from a copy that has the faults."""
    name = copy.faults[0].file
    text = (planting.ROOT / name).read_text()
    for fault in copy.faults:
        text = planting.patched(text, fault.changes, name)
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    own = f"csrc/cuda/{copy.kernels}.cu"
    flags = (f"-fmacro-prefix-map={folder}/=", f"-fmacro-prefix-map={planting.ROOT}/=")
    source = path if name == own else planting.ROOT / own
    planting.compile_kernels(source, copy.build, folder / "kernel.o", folder / "csrc", flags=flags)
    parts = planting.parts()
    planting.link(
        [folder / "kernel.o", parts["ops"], parts["kernels"]], copy.build, folder / "libplanted.so",
        "-shared", f"{parts['torch']}/libtorch_cpu.so", f"{parts['torch']}/libc10.so",
    )  # fmt: skip
    return str(folder / "libplanted.so")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    made: dict[Copy, str] = {}

    def of(copy: Copy) -> str:
        if copy not in made:
            made[copy] = faulty_library(copy, tmp_path_factory.mktemp("planted"))
        return made[copy]

    return of


def run_contract(run: str, copy: Copy, libraries, runners, output: Path) -> int:
    if copy.build not in runners:
        runners[copy.build] = Runner(copy.build)
    file, _, name = run.partition("::")
    tests = [f"tests/{file}", "-k", f"{name} and cuda_emulated"]
    return runners[copy.build].run({"library": libraries(copy), "tests": tests, "output": str(output)})


@pytest.mark.parametrize(("copy", "fault"), FAULTS)
def test_caught(copy, fault, libraries, runners, tmp_path):
    output = tmp_path / "output.txt"
    status = run_contract(fault.run, copy, libraries, runners, output)
    planting.expect_shown(fault, status, output.read_text())


def test_noise_of_hopeless_tokens_is_left_out(libraries, runners, tmp_path):
    output = tmp_path / "output.txt"
    assert run_contract("test_draw_bounds.py::test_hopeless_tokens", LEAVES_OUT, libraries, runners, output) == 0, (
        output.read_text()
    )
