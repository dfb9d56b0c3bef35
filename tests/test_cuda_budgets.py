"""The CUDA kernels as nvcc compiled them into the library: every architecture, no spill, and what each may use.

Needs no GPU. The budgets stand beside those of the Triton kernels, in budgets.py.
"""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import disassembly
import pytest
from budgets import BUDGETS, CUDA_BUDGETS

from freedave_kernels import _library
from freedave_kernels._C import build
from freedave_kernels.contract import MEASURES

ARCHITECTURES = [f"sm_{name}" for name in build["cuda_architectures"]]
SOURCES = (Path(__file__).parents[1] / "csrc/cuda").glob("*.cu")
KERNELS = {name for path in SOURCES for name in re.findall(r"__global__[^;{]*?(\w+)\(const", path.read_text())}
UNALIGNED = {f"{case} unaligned" for case in CUDA_BUDGETS if case.startswith("predict_tokens")}
LOGITS = {"f": "float32", "8BFloat16": "bfloat16", "7Float16": "float16"}
ELEMENTS = 32  # that a thread takes through the hot loop of scan_chunks at once
PRODUCTS = ELEMENTS // 4 * (2 * 10 - 2)  # of Philox: two a round for four elements, of which a row has two once

pytestmark = pytest.mark.skipif(not build["cuda"], reason="the library was built without nvcc")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture: `case` as in budgets.py."""

    case: str
    resources: disassembly.Resources
    cubin: Path
    symbol: str

    def instructions(self) -> list[disassembly.Instruction]:
        return disassembled(self.cubin)[self.symbol]


@functools.cache
def disassembled(cubin: Path) -> dict[str, list[disassembly.Instruction]]:
    """A cubin holds every variant of a kernel, and takes seconds."""
    return disassembly.instructions(cubin)


def case_of(symbol: str) -> str:
    """The case of a mangled name: its kernel, and of one that is there in several forms, which it is."""
    kernel = next(name for name in KERNELS if name in symbol)
    if kernel == "keep_rows":
        return f"keep_rows {'16 bytes' if 'keep_rowsI5uint4E' in symbol else '2 bytes'}"
    if kernel == "merge_states":
        return f"merge_states{' scored' if 'merge_statesILb1E' in symbol else ''}"
    if kernel != "scan_chunks":
        return kernel
    dtype, measure, aligned, drawn = re.search(
        r"scan_chunksI(?:NS_)?(f|8BFloat16|7Float16)E?LNS_7MeasureE(\d)ELb(\d)ELb(\d)E", symbol
    ).groups()
    place = "" if aligned == "1" else " unaligned"
    return f"predict_tokens {LOGITS[dtype]} {MEASURES[int(measure)]}{' drawn' if drawn == '1' else ''}{place}"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compiled]:
    """By architecture and case."""
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run(
        [disassembly.tool("cuobjdump"), "-xelf", "all", str(_library.PATH)], cwd=folder, check=True, capture_output=True
    )
    found = {}
    for cubin in folder.glob("*.cubin"):
        architecture = re.search(r"sm_\d+", cubin.name)[0]
        for symbol, used in disassembly.resources(cubin).items():
            case = case_of(symbol)
            found[architecture, case] = Compiled(case, used, cubin, symbol)
    return found


def hot_loop(kernel: list[disassembly.Instruction]) -> list[disassembly.Instruction]:
    """The sweep over a chunk of which nothing is hidden: the shortest loop with an exponential for every element."""
    loops = [loop for loop in disassembly.loops(kernel) if count(loop, "MUFU.EX2") >= ELEMENTS]
    return min(loops, key=len)


def hot_way(loop: list[disassembly.Instruction], case: str) -> list[disassembly.Instruction]:
    """The shortest way around it that works out the exponentials, and where tokens are drawn the words of their noise:
    that of a whole sweep none of whose tokens needs a closer look.
    """
    if "neg_entropy" in case:  # every exponential has a branch of its own
        return loop
    blocks = disassembly.blocks(loop)
    wanted = {"MUFU.EX2": ELEMENTS} | ({r"IMAD\.WIDE\.U32": PRODUCTS} if case.endswith("drawn") else {})
    through = [max(blocks, key=lambda block, opcode=opcode: count(block, opcode)) for opcode in wanted]
    way = disassembly.way_around(loop, *through)
    assert all(count(way, opcode) >= least for opcode, least in wanted.items())
    return way


def count(instructions: list[disassembly.Instruction], pattern: str) -> int:
    return sum(bool(re.match(pattern, instruction.opcode)) for instruction in instructions)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_there_and_spills_nothing(compiled, architecture):
    here = [kernel for (name, _), kernel in compiled.items() if name == architecture]
    assert {kernel.case for kernel in here} == CUDA_BUDGETS.keys() | UNALIGNED
    for kernel in here:
        assert kernel.resources.stack == kernel.resources.local == 0, kernel.case


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_rows_are_read_sixteen_bytes_at_a_time(compiled, architecture):
    for dtype, loads in {"bfloat16": 4, "float16": 4, "float32": 8}.items():
        for measure in MEASURES:
            loop = hot_loop(compiled[architecture, f"predict_tokens {dtype} {measure}"].instructions())
            # None of another width, such as LDG.U16. A sweep that is not whole has loads of its own.
            assert count(loop, r"LDG") == count(loop, r"LDG.*\.128") == 2 * loads, (dtype, measure)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_copied_sixteen_bytes_at_a_time(compiled, architecture):
    """What a thread has on its way is all loaded before the first of it is stored."""
    copies = [
        re.match(r"[A-Z]+", instruction.opcode)[0]
        for instruction in compiled[architecture, "keep_rows 16 bytes"].instructions()
        if re.match(r"(LDG|STG).*\.128", instruction.opcode)
    ]
    in_flight = BUDGETS["cuda", architecture, "keep_rows 16 bytes"].vector_loads
    assert copies == ["LDG"] * in_flight + ["STG"] * in_flight


@pytest.mark.parametrize(
    ("architecture", "case"),
    [key[1:] for key in BUDGETS if key[0] == "cuda" and key[1] in ARCHITECTURES],
    ids=lambda value: value,
)
def test_budgets(compiled, architecture, case):
    budget = BUDGETS["cuda", architecture, case]
    kernel = compiled[architecture, case]
    assert kernel.resources.registers <= budget.registers
    assert kernel.resources.shared <= budget.shared
    if budget.instructions is not None:
        loop = hot_loop(kernel.instructions())
        way = hot_way(loop, case)
        assert count(way, r"LDG.*\.128") >= budget.vector_loads
        assert len(way) / ELEMENTS <= budget.instructions
        assert len(loop) - len(way) <= budget.rarely
