"""`freedave evaluate`: tasks of lm-evaluation-harness, with what the decodes cost beside the accuracy."""

from __future__ import annotations

import argparse
import json
import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from freedave.cli.decoding_options import add_decoding_options, add_model_options, settings_of

# A task's metrics as columns; the harness keeps the rest.
COSTS = {
    "tokens_per_forward": "tokens/forward",
    "tokens_per_second": "tokens/s",
    "identical_to_static": "identical to static",
}


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help="accuracy and speed on tasks of lm-evaluation-harness",
        description="Evaluate on tasks of lm-evaluation-harness: accuracy, and beside it what the decodes cost. Needs "
        "pip install 'freedave-kernels[lm-eval]'.",
        epilog="example: freedave evaluate demo --limit 10 --check-lossless. The harness's own command line, with all its "
        "options: python -m freedave.integrations.lm_eval --model freedave --model_args pretrained=demo --tasks gsm8k",
    )
    add_model_options(parser)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        default=["freedave_demo"],
        metavar="TASK",
        help="names, or YAML files (default: freedave_demo, the embedded model's four)",
    )
    tasks.add_argument("--include-path", metavar="DIR", help="a folder with task files of your own")
    tasks.add_argument("--limit", type=int, metavar="N", help="requests a task (default: all)")
    tasks.add_argument(
        "--num-fewshot", type=int, metavar="N", help="worked examples in the prompt (default: the task's)"
    )
    tasks.add_argument("--apply-chat-template", action="store_true", help="prompts as conversations, for chat models")
    tasks.add_argument(
        "--mc-num", type=int, default=128, metavar="N", help="noise samples of a likelihood (default: 128)"
    )
    add_decoding_options(parser, max_new_tokens="where a task does not say (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="prompts a batch (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--check-lossless",
        nargs="?",
        type=float,
        const=1.0,
        default=0.0,
        metavar="SHARE",
        help="also decode statically and compare; 0.1: every tenth request (default without a number: all)",
    )
    output.add_argument("--output", metavar="FILE", help="write the harness's results, every answer included, as JSON")
    output.add_argument(
        "--json", action="store_true", help="the results without answers on standard output, and nothing else"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, report; a decode that differs from static decoding is a result here, not an error."""
    check_output(arguments)
    evaluation = harness()
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
            **settings_of(arguments),
        },
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        apply_chat_template=arguments.apply_chat_template,
    )
    if arguments.output is not None:
        Path(arguments.output).write_text(as_json(results, indent=2) + "\n", encoding="utf-8")
    results.pop("samples", None)
    if arguments.json:
        print(as_json(results))
    else:
        print(report(results))
        if arguments.output is not None:
            print(f"results: {arguments.output}")
    return 0


def check_output(arguments: argparse.Namespace) -> None:
    """An evaluation may take hours: what cannot be written is said first."""
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.output is not None and not Path(arguments.output).absolute().parent.is_dir():
        raise ValueError(f"cannot write {arguments.output!r}: there is no such folder")


def harness() -> Any:
    """The integration; lm-evaluation-harness is an optional extra.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("freedave.integrations.lm_eval")
    except ImportError as error:
        raise ImportError(f"{error}: `freedave evaluate` needs pip install 'freedave-kernels[lm-eval]'") from error


def as_json(results: dict[str, Any], indent: int | None = None) -> str:
    """The harness's results as JSON; it puts functions of the tasks among them, which are shown by name."""
    return json.dumps(results, ensure_ascii=False, indent=indent, default=str)


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
    how = "static decoding" if steps == 1 else f"{steps} {settings['drafting']} drafts"
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
