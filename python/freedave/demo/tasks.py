"""Small verifiable tasks with scratchpads: what the demo model is trained on and measured with.

Each task turns a random number generator into problems: a prompt, and the full response that the model should write.

    addition        48392+7715=         2+5+0:07 9+1+0:10 3+7+1:11 8+7+1:16 4+0+1:05 #056107
    subtraction     7042-658=           2-8-0:14 4-5-1:18 0-6-1:13 7-0-1:06 #6384
    multiplication  48392*7=            2*7+0:14 9*7+1:64 3*7+6:27 8*7+2:58 4*7+5:33 #338744
    sorting         sorted([5,2,9,1])=  5:5 2:25 9:259 1:1259 #[1,2,5,9]

The arithmetic scratchpads go through the columns from the right; a column repeats both digits and the carry (or
borrow), and after the colon writes the next carry and the result digit. The sorting scratchpad is insertion sort: the
item, and the sorted list so far. The answer follows the "#"; a number has one digit a column (and the last carry), so
zeros may lead.

A problem belongs to the test split if the CRC-32 of its prompt falls in one of `TEST_BUCKETS` buckets out of `BUCKETS`.
Training never generates such a prompt, whatever its seed.
"""

from __future__ import annotations

import ast
import operator
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "test"]

BUCKETS = 16
TEST_BUCKETS = 1

MAX_DIGITS = 6
MIN_ITEMS, MAX_ITEMS = 3, 8
# The weights of number lengths 1 .. MAX_DIGITS: long numbers are the interesting ones, and there are few short ones.
LENGTH_WEIGHTS = (1, 2, 3, 4, 5, 6)

ARITHMETIC: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Problem:
    """A prompt of one task and the response that solves it."""

    task: str
    prompt: str
    response: str

    def check(self, text: str) -> bool:
        """Whether the final answer in `text` (a decoded response, cut at its first <eos>) is right."""
        return TASKS[self.task].check(self.prompt, text)


@dataclass(frozen=True)
class Task:
    """A family of problems.

    `draw` makes a random prompt, `solve` writes the response to a prompt, and `check` judges any response by its final
    answer alone, with Python's own arithmetic rather than the scratchpad's.
    """

    name: str
    draw: Callable[[Random], str]
    solve: Callable[[str], str]
    check: Callable[[str, str], bool]


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, the same on every machine and in every process."""
    return "test" if zlib.crc32(prompt.encode()) % BUCKETS < TEST_BUCKETS else "train"


def stream(name: str, split: Split, seed: int) -> Iterator[Problem]:
    """Endless problems of one task and split, determined by the seed; short prompts may repeat."""
    task = TASKS[name]
    rng = Random(f"{name}/{split}/{seed}")
    while True:
        prompt = task.draw(rng)
        if split_of(prompt) == split:
            yield Problem(name, prompt, task.solve(prompt))


def problems(name: str, split: Split, count: int, seed: int) -> list[Problem]:
    """`count` different problems of one task and split, determined by the seed."""
    distinct: dict[str, Problem] = {}
    for problem in stream(name, split, seed):
        if len(distinct) == count:
            break
        distinct.setdefault(problem.prompt, problem)
    return list(distinct.values())


def draw_number(rng: Random) -> int:
    """A number without leading zeros, of one to `MAX_DIGITS` digits."""
    length = rng.choices(range(1, MAX_DIGITS + 1), weights=LENGTH_WEIGHTS)[0]
    return rng.randrange(10 ** (length - 1), 10**length)


def draw_addition(rng: Random) -> str:
    """An addition of two numbers."""
    return f"{draw_number(rng)}+{draw_number(rng)}="


def draw_subtraction(rng: Random) -> str:
    """A subtraction with a result of at least zero."""
    smaller, larger = sorted((draw_number(rng), draw_number(rng)))
    return f"{larger}-{smaller}="


def draw_multiplication(rng: Random) -> str:
    """A multiplication of a number by one digit."""
    return f"{draw_number(rng)}*{rng.randrange(2, 10)}="


def draw_sorting(rng: Random) -> str:
    """A list of `MIN_ITEMS` to `MAX_ITEMS` digits to sort, repeats allowed."""
    items = rng.choices(range(10), k=rng.randint(MIN_ITEMS, MAX_ITEMS))
    return f"sorted([{','.join(map(str, items))}])="


def operands(prompt: str) -> tuple[int, str, int]:
    """The two numbers of an arithmetic prompt and the operator between them."""
    match = re.fullmatch(r"(\d+)([-+*])(\d+)=", prompt)
    if match is None:
        raise ValueError(f"not an arithmetic prompt: {prompt!r}")
    return int(match[1]), match[2], int(match[3])


def items_of(prompt: str) -> list[int]:
    """The list of a sorting prompt."""
    match = re.fullmatch(r"sorted\((\[\d(?:,\d)*\])\)=", prompt)
    if match is None:
        raise ValueError(f"not a sorting prompt: {prompt!r}")
    return list(ast.literal_eval(match[1]))


def solve_addition(prompt: str) -> str:
    """Each column: both digits, the carry into it, and its sum as two digits."""
    left, _, right = operands(prompt)
    columns, digits, carry = [], "", 0
    for a, b in digit_columns(left, right):
        total = a + b + carry
        columns.append(f"{a}+{b}+{carry}:{total:02d}")
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
    return f"{' '.join(columns)} #{carry}{digits}"


def solve_subtraction(prompt: str) -> str:
    """Each column: both digits, the borrow from it, the next borrow and the digit."""
    left, _, right = operands(prompt)
    columns, digits, borrow = [], "", 0
    for a, b in digit_columns(left, right):
        difference = a - b - borrow
        next_borrow, digit = int(difference < 0), difference % 10
        columns.append(f"{a}-{b}-{borrow}:{next_borrow}{digit}")
        borrow, digits = next_borrow, f"{digit}{digits}"
    return f"{' '.join(columns)} #{digits}"


def solve_multiplication(prompt: str) -> str:
    """Each column: the digit, the factor, the carry into it, and the result as two digits."""
    left, _, factor = operands(prompt)
    columns, digits, carry = [], "", 0
    for a, _ in digit_columns(left, 0):
        total = a * factor + carry
        columns.append(f"{a}*{factor}+{carry}:{total:02d}")
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
    return f"{' '.join(columns)} #{carry}{digits}"


def solve_sorting(prompt: str) -> str:
    """Each step of insertion sort: the item, and the sorted list that now contains it."""
    so_far: list[int] = []
    steps = []
    for item in items_of(prompt):
        so_far = sorted([*so_far, item])
        steps.append(f"{item}:{''.join(map(str, so_far))}")
    return f"{' '.join(steps)} #[{','.join(map(str, so_far))}]"


def digit_columns(left: int, right: int) -> Iterator[tuple[int, int]]:
    """The digits of two numbers in pairs, units first, the shorter number filled with zeros."""
    width = max(len(str(left)), len(str(right)))
    for a, b in zip(reversed(f"{left:0{width}d}"), reversed(f"{right:0{width}d}"), strict=True):
        yield int(a), int(b)


def check_arithmetic(prompt: str, text: str) -> bool:
    """Whether the number after the "#" that ends `text` is the result."""
    left, symbol, right = operands(prompt)
    answer = re.fullmatch(r".*#(\d+)", text)
    return answer is not None and int(answer[1]) == ARITHMETIC[symbol](left, right)


def check_sorting(prompt: str, text: str) -> bool:
    """Whether the list after the "#" that ends `text` is the sorted list."""
    answer = re.fullmatch(r".*#\[(\d(?:,\d)*)\]", text)
    return answer is not None and [int(item) for item in answer[1].split(",")] == sorted(items_of(prompt))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("addition", draw_addition, solve_addition, check_arithmetic),
        Task("subtraction", draw_subtraction, solve_subtraction, check_arithmetic),
        Task("multiplication", draw_multiplication, solve_multiplication, check_arithmetic),
        Task("sorting", draw_sorting, solve_sorting, check_sorting),
    )
}
