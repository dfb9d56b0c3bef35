"""Runs the harness with the model, and puts what its decodes cost beside the metrics of the tasks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
from lm_eval.tasks import TaskManager

from freedave.integrations.lm_eval.model import FreeDaveLM
from freedave.integrations.lm_eval.tally import METRICS, DecodingTally
from freedave.models.diffusion_lm import DiffusionLM

TASKS = Path(__file__).parent / "tasks"
"""The embedded model's tasks, for the harness's `--include_path`; `evaluate` knows them."""


def evaluate(
    pretrained: str | DiffusionLM,
    tasks: Sequence[Any] = ("freedave_demo",),
    *,
    include_path: str | Path | None = None,
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on tasks of the harness.

    Args:
        pretrained: as `FreeDaveLM` takes it.
        tasks: names or configurations of tasks; the embedded model's are `freedave_demo`, a group of four.
        include_path: a folder with task files of your own.
        model_args: further arguments of `FreeDaveLM`.
        options: of `lm_eval.simple_evaluate`: limit, num_fewshot, apply_chat_template, ...

    Returns the harness's results, with the metrics of the decodes beside those of the tasks.
    """
    task_manager = _task_manager(tasks, include_path)  # first: a model may take minutes to load
    model = FreeDaveLM(pretrained, **(model_args or {}))
    with quiet_git(), readable_tasks():
        results = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=task_manager, **options)
    assert results is not None  # only in processes beside the first, of which there are none
    results["config"]["model"] = "freedave"
    results["config"]["model_args"] = {"pretrained": model.lm.name, **(model_args or {})}
    add_decoding_metrics(results)
    return results


def _task_manager(tasks: Sequence[Any], include_path: str | Path | None) -> TaskManager:
    """Knows the harness's tasks only where they are asked for: finding its thousands takes many seconds.

    Raises:
        ValueError: no such folder, or a task that nobody knows.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"no folder with task files at {include_path}")
    paths = [str(TASKS), *([str(include_path)] if include_path is not None else [])]
    names = {task for task in tasks if isinstance(task, str)}
    manager = TaskManager(include_path=paths, include_defaults=False)
    if names <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=paths)
    unknown = sorted(name for name in names if not manager.match_tasks([name]) and not Path(name).exists())
    if unknown:
        raise ValueError(f"unknown tasks: {', '.join(unknown)}; `lm-eval ls tasks` lists those of the harness")
    return manager


def add_decoding_metrics(results: dict[str, Any]) -> None:
    """Puts what the decodes cost, which `get_model_info` left in "config", beside the metrics of tasks and groups."""
    tallies = {
        task: DecodingTally.from_json(costs)
        for task, costs in results["config"].get("freedave", {}).get("decoding", {}).items()
    }
    for name, metrics in results["results"].items():
        members = list(_tasks_of(name, results.get("group_subtasks", {})))
        tally = sum((tallies[task] for task in members if task in tallies), DecodingTally())
        for metric, value in tally.metrics().items():
            metrics[f"{metric},none"] = value
            results["higher_is_better"].setdefault(name, {})[metric] = METRICS[metric]
        if name in results.get("groups", {}):
            results["groups"][name] |= {f"{metric},none": value for metric, value in tally.metrics().items()}


def _tasks_of(name: str, subtasks: dict[str, list[str]]) -> Iterator[str]:
    """The tasks of a group, through groups of groups; of a task, itself."""
    members = subtasks.get(name)
    if not members:
        yield name
    for member in members or ():
        yield from _tasks_of(member, subtasks)


@contextmanager
def readable_tasks() -> Iterator[None]:
    """A task's file can hold anything: what the harness stumbles over in it is bad input, and names the tasks."""
    manager_class = lm_eval.evaluator.TaskManager
    load = manager_class.load

    def checked(manager: TaskManager, tasks: Any) -> Any:
        try:
            return load(manager, tasks)
        except (TypeError, AttributeError, KeyError) as error:
            names = tasks if isinstance(tasks, str) else ", ".join(task for task in tasks if isinstance(task, str))
            raise ValueError(
                f"tasks {names or 'given'}: the harness cannot read the task ({type(error).__name__}: {error}); a field of "
                "its file has a wrong type or is missing"
            ) from error

    manager_class.load = checked
    try:
        yield
    finally:
        manager_class.load = load


@contextmanager
def quiet_git() -> Iterator[None]:
    """The harness notes the commit of the folder that it runs in; outside a repository git would complain to the user."""
    noisy = lm_eval.evaluator.get_git_commit_hash

    def commit() -> str | None:
        try:
            described = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False)
        except OSError:  # no git
            return None
        return described.stdout.strip() or None

    lm_eval.evaluator.get_git_commit_hash = commit
    try:
        yield
    finally:
        lm_eval.evaluator.get_git_commit_hash = noisy


@contextmanager
def decoding_metrics_in_results() -> Iterator[None]:
    """`lm_eval.simple_evaluate` returns the decodes' metrics too: the harness's command line prints and saves them."""
    simple_evaluate = lm_eval.simple_evaluate

    def with_metrics(*arguments: Any, **options: Any) -> Any:
        results = simple_evaluate(*arguments, **options)
        if results is not None:
            add_decoding_metrics(results)
        return results

    lm_eval.simple_evaluate = with_metrics
    try:
        yield
    finally:
        lm_eval.simple_evaluate = simple_evaluate
