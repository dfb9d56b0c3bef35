"""`freedave evaluate`: tasks of lm-evaluation-harness, with what the decodes cost beside the accuracy."""

from __future__ import annotations

import argparse
import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from freedave.cli.generate import options_of
from freedave.cli.reporting import json_text, quick_interrupt, show_remarks, write, write_json

# A task's metrics as columns; the harness keeps the rest.
COSTS = {
    "tokens_per_forward": "tokens/forward",
    "tokens_per_second": "tokens/s",
    "identical_to_static": "identical to static",
}


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, report; a decode that differs from static decoding is a result here, not an error."""
    with quick_interrupt():
        evaluation = import_module("freedave.integrations.lm_eval")
    show_remarks()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its remarks are for its own command line
    results = evaluation.evaluate(
        arguments.model,
        arguments.tasks,
        include_path=arguments.include_path,
        model_args={
            "dtype": arguments.dtype,
            "device": arguments.device,
            "revision": arguments.revision,
            "batch_size": arguments.batch_size,
            "max_gen_toks": arguments.max_new_tokens,
            "check_lossless": arguments.check_lossless,
            "mc_num": arguments.mc_num,
            **options_of(arguments),
        },
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        apply_chat_template=arguments.apply_chat_template,
    )
    if arguments.output is not None:
        text = json_text(results, "utf-8", indent=2, default=str)
        Path(arguments.output).write_text(text + "\n", encoding="utf-8")
    results.pop("samples", None)
    if arguments.json:
        write_json(results, default=str)
    else:
        write(report(results))
        if arguments.output is not None:
            write(f"results: {arguments.output}")
    return 0


def report(results: dict[str, Any]) -> str:
    """One table: a row for each task and group, its own metrics first."""
    rows = [table_row(name, metrics) for name, metrics in results["results"].items()]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    costs = [column for column in COSTS.values() if column in columns]
    columns = [column for column in columns if column not in costs] + costs
    cells = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([title(results["config"]), "", *lines])


def title(config: dict[str, Any]) -> str:
    """Which model, and how it decoded."""
    settings, dtype = config["freedave"], config["model_dtype"].removeprefix("torch.")
    steps = settings["draft_steps"]
    drafts = f"{settings['drafting']} drafts" if steps == "auto" else f"{steps} {settings['drafting']} drafts"
    how = "static decoding" if steps == 1 else drafts
    return f"{settings['model']}: {settings['attention'].replace('_', '-')} attention, {dtype}, {how}"


def table_row(name: str, metrics: dict[str, Any]) -> dict[str, str]:
    """A task's cells by column; a metric of several filters has a column for each."""
    cells = {"task": name}
    if metrics.get("sample_len") is not None:
        cells["requests"] = str(metrics["sample_len"])
    for key, value in metrics.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        column = COSTS.get(metric) or (metric if filtered == "none" else f"{metric} ({filtered})")
        error = metrics.get(f"{metric}_stderr,{filtered}")
        cells[column] = formatted(metric, value) + (f" ± {error:.3f}" if isinstance(error, float) else "")
    return cells


def formatted(metric: str, value: float) -> str:
    """A number with the digits that matter."""
    if metric == "identical_to_static":
        return f"{value:.1%}"
    return f"{value:.1f}" if metric == "tokens_per_second" else f"{value:.2f}" if metric in COSTS else f"{value:.3f}"
