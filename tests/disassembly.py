"""What is in a cubin: each kernel's resources and instructions, its loops, and what one way through it executes.

Reads what NVIDIA's cuobjdump and nvdisasm print, which needs no GPU.
"""

from __future__ import annotations

import collections
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import util
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    registers: int
    """A thread's."""
    stack: int
    """Bytes a thread: where registers are spilled to, and arrays that are indexed."""
    local: int
    shared: int
    """Bytes a block."""


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    """As in "@!P0", or "" where it always runs."""
    opcode: str
    """With its modifiers, as in "LDG.E.128"."""
    target: int | None
    """Where a branch goes."""


def tool(name: str) -> str:
    """The path of a CUDA binary utility: from its wheel where that is installed, else from PATH."""
    nvidia = util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or []) if nvidia else []:
        for path in sorted(Path(folder).glob(f"cu*/bin/{name}")):
            return str(path)
    path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} not found; install it with: pip install nvidia-cuda-{name}")
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: Path) -> dict[str, Resources]:
    """By kernel name."""
    found = {}
    lines = _run(tool("cuobjdump"), "--dump-resource-usage", str(cubin)).splitlines()
    for name_line, line in itertools.pairwise(lines):
        name = re.match(r"\s*Function (\S+):", name_line)
        if name:
            used = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}
            found[name[1]] = Resources(used["REG"], used["STACK"], used["LOCAL"], used["SHARED"])
    return found


INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.]*)(.*)")
LABEL = re.compile(r"(\.L_x_\d+):")


def instructions(cubin: Path) -> dict[str, list[Instruction]]:
    """By kernel name, in address order. The padding after a kernel's last instruction is left out."""
    kernels: dict[str, list[tuple[int, str, str, str]]] = {}
    labels: dict[str, dict[str, int]] = {}
    name = ""
    pending: list[str] = []
    for line in _run(tool("nvdisasm"), "--print-code", str(cubin)).splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            name, pending = section[1], []
            kernels[name], labels[name] = [], {}
        elif label := LABEL.match(line):
            pending.append(label[1])
        elif name and (match := INSTRUCTION.match(line)):
            address = int(match[1], 16)
            labels[name] |= dict.fromkeys(pending, address)
            pending = []
            kernels[name].append((address, match[2] or "", match[3], match[4]))
    return {name: _resolve(lines, labels[name]) for name, lines in kernels.items()}


def _resolve(lines: Iterable[tuple[int, str, str, str]], labels: dict[str, int]) -> list[Instruction]:
    found = []
    for address, predicate, opcode, operands in lines:
        branches = opcode.split(".")[0] in ("BRA", "BRX", "JMP", "CALL")
        label = re.search(r"\.L_x_\d+", operands) if branches else None
        target = labels.get(label[0]) if label else None
        if target == address:  # the trap behind the last instruction
            break
        found.append(Instruction(address, predicate, opcode, target))
    return found


def loops(kernel: list[Instruction]) -> list[list[Instruction]]:
    """The instructions between a backward branch and where it goes, for each; nested loops appear in their outer ones."""
    return [
        [other for other in kernel if last.target <= other.address <= last.address]
        for last in kernel
        if last.target is not None and last.target <= last.address
    ]


def blocks(kernel: list[Instruction]) -> list[list[Instruction]]:
    """Runs of instructions that no branch enters or leaves in between."""
    targets = {instruction.target for instruction in kernel}
    found: list[list[Instruction]] = [[]]
    for instruction in kernel:
        if found[-1] and (instruction.address in targets or _leaves(found[-1][-1])):
            found.append([])
        found[-1].append(instruction)
    return found


def fewest_executed(kernel: list[Instruction], through: list[Instruction]) -> int:
    """How many instructions the shortest way from the entry through the block `through` to an exit executes.

    An instruction that its predicate turns off is executed all the same.
    """
    first, last = kernel.index(through[0]), kernel.index(through[-1])
    before = _way(kernel, 0, lambda place: place == first)
    after = _way(kernel, last, lambda place: kernel[place].opcode == "EXIT")
    return len(before) + len(through) + len(after)


def way_around(loop: list[Instruction], *through: list[Instruction]) -> list[Instruction]:
    """What the shortest way once around a loop executes that comes through these blocks of it, one after another."""
    places, here = [], 0
    for block in through:
        first, last = loop.index(block[0]), loop.index(block[-1])
        places += [*_way(loop, here, lambda place, first=first: place == first), *range(first, last)]
        here = last
    places += [*_way(loop, here, lambda place: place == len(loop) - 1), len(loop) - 1]
    return [loop[place] for place in places]


def _leaves(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("BRA", "BRX", "JMP", "EXIT", "RET")


def _always_leaves(instruction: Instruction) -> bool:
    """BRA.DIV does so only where a warp's lanes are at different places."""
    return _leaves(instruction) and instruction.predicate == "" and instruction.opcode != "BRA.DIV"


def _way(code: list[Instruction], begin: int, reached: Callable[[int], bool]) -> list[int]:
    """The places of the shortest way from one instruction to the nearest that `reached` accepts, which is not among them."""
    place_of = {instruction.address: place for place, instruction in enumerate(code)}
    came_from: dict[int, int | None] = {}
    queue: collections.deque[tuple[int, int | None]] = collections.deque([(begin, None)])
    while queue:
        place, before = queue.popleft()
        if place in came_from:
            continue
        came_from[place] = before
        if reached(place):
            way = []
            while (earlier := came_from[place]) is not None:
                way.append(earlier)
                place = earlier
            return way[::-1]
        here = code[place]
        if not _always_leaves(here) and place + 1 < len(code):
            queue.append((place + 1, place))
        if here.target in place_of:
            queue.append((place_of[here.target], place))
    raise ValueError(f"no way from {code[begin]} to where it should lead")
