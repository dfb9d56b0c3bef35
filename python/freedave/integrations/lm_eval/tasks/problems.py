"""Documents and scores of the embedded model's tasks; the YAML files beside this one name these functions."""

from __future__ import annotations

import functools
from typing import Any

from datasets import Dataset

from freedave.demo.tasks import Problem, problems

PROBLEMS = 100
SEED = 0  # the problems of `freedave demo`, and further ones


def documents(task: str, **_: Any) -> dict[str, Dataset]:
    """Held-out problems of one task; the harness passes its metadata, which is not needed."""
    return {"test": Dataset.from_list([vars(problem) for problem in problems(task, "test", PROBLEMS, SEED)])}


addition = functools.partial(documents, "addition")
subtraction = functools.partial(documents, "subtraction")
multiplication = functools.partial(documents, "multiplication")
sorting = functools.partial(documents, "sorting")


def score(document: dict[str, str], answers: list[str]) -> dict[str, float]:
    """Whether the final answer is right, whatever the scratchpad says."""
    return {"exact_match": float(Problem(**document).check(answers[0]))}
