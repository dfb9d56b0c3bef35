"""`freedave demo`: the embedded model answers held-out problems, statically and with FreeDave."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from tqdm import tqdm

from freedave.cli.generate import costs
from freedave.cli.machine import machine
from freedave.cli.reporting import write, write_json
from freedave.decode.output import DecodeOutput
from freedave.demo.comparison import (
    DRAWN_SEED,
    MAX_NEW_TOKENS,
    STATIC,
    TEMPERATURE,
    Comparison,
    DemoSettings,
    Mode,
    Tally,
    WorkedExample,
    compare,
    prompt_ids,
    response_text,
)
from freedave.demo.tasks import TASKS
from freedave.models.checkpoint import load_model
from freedave.models.diffusion_lm import DiffusionLM
from freedave.picture import Trace, decode_picture, first_block_of, token_texts

SMALL_MODEL = """\
This is a small model, and the format tokens of its scratchpads are easy, so many are accepted at once:
do not expect as many tokens per forward from a large model on open text. That the tokens are those of
static decoding does not depend on the model."""
# Full attention has no exact cache; "none" is the only policy that approximates nothing.
CACHES = {"block_causal": "auto", "full": "none"}


def run(arguments: argparse.Namespace) -> int:
    """Decode, report, draw; the exit code says whether FreeDave was lossless."""
    settings = DemoSettings(
        problems_per_task=arguments.problems,
        draft_steps=tuple(dict.fromkeys(arguments.draft_steps)),
        block_length=arguments.block_length,
        cache=CACHES[arguments.attention],
    )
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    lm = embedded_model(arguments.attention, settings)
    with DecodesBar(len(TASKS) * settings.problems_per_task * len(settings.modes)) as bar:
        result = compare(lm, settings, on_decode=bar)
    for picture in arguments.picture:
        draw(picture, lm, result)
    if arguments.json:
        write_json(as_json(lm, result, arguments.picture))
    else:
        write(report(lm, result, arguments.picture))
    return 0 if result.lossless else 1


class DecodesBar:
    """A bar over all decodes, with the tokens per forward so far; shown only on a terminal."""

    def __init__(self, decodes: int) -> None:
        self._tokens: dict[bool, int] = {True: 0, False: 0}  # by whether the mode is static
        self._forwards: dict[bool, int] = {True: 0, False: 0}
        self._bar = tqdm(
            total=decodes,
            desc="decoding",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} decodes [{elapsed}<{remaining}{postfix}]",
            disable=None,  # tqdm's word for "where it is not a terminal"
            leave=False,
            dynamic_ncols=True,
        )

    def __call__(self, mode: Mode, output: DecodeOutput) -> None:
        self._tokens[mode.is_static] += output.stats.tokens
        self._forwards[mode.is_static] += output.num_forwards
        static, fast = (self._tokens[kind] / max(self._forwards[kind], 1) for kind in (True, False))
        self._bar.set_postfix_str(f"tokens per forward: static {static:.1f}, FreeDave {fast:.1f}", refresh=False)
        self._bar.update()

    def __enter__(self) -> DecodesBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def embedded_model(attention: str, settings: DemoSettings) -> DiffusionLM:
    """The embedded model under one of the two attentions it was trained for."""
    lm = load_model("demo")
    if attention == lm.attention:
        return lm
    return DiffusionLM(
        lm.model,
        lm.mask_token_id,
        attention=attention,
        block_length=settings.block_length,
        eos_token_id=lm.eos_token_ids,
        tokenizer=lm.tokenizer,
        name=lm.name,
    )


def draw(picture: str, lm: DiffusionLM, result: Comparison) -> None:
    """The worked example as a picture: static decoding and the fastest mode."""
    settings, problem = result.settings, result.example.problem
    prompt = prompt_ids(lm, problem)[0].tolist()
    decode_picture(
        picture,
        [trace(lm, result.example, STATIC), trace(lm, result.example, result.fastest)],
        prompt_tokens=token_texts(lm, prompt),
        first_block=first_block_of(lm, len(prompt), settings.block_length),
        block_length=settings.block_length,
        title=problem.task,
    )


def trace(lm: DiffusionLM, example: WorkedExample, mode: Mode) -> Trace:
    """One mode's decode of the worked example, as a picture shows it."""
    drafts = f"{mode.drafting} drafts" if mode.draft_steps == "auto" else f"{mode.draft_steps} {mode.drafting} drafts"
    name = "static decoding" if mode.is_static else f"FreeDave, {drafts}"
    return Trace.of(name, lm, example.outputs[mode])


def report(lm: DiffusionLM, result: Comparison, pictures: list[str]) -> str:
    """Everything the demo says."""
    settings = result.settings
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    lines = [
        f"{lm.name}: {parameters / 1e6:.1f} million parameters, {lm.attention.replace('_', '-')} attention, "
        f"block length {settings.block_length}, float32",
        f"{machine()}; {settings.problems_per_task} held-out problems a task",
        "",
    ]
    for task, tallies in result.tallies.items():
        lines += [*table(task, tallies), ""]
    if len(result.tallies) > 1:
        lines += [*table("all tasks", result.totals), ""]
    shares = ", ".join(f"{mode.name} {tally.other_share:.0%}" for mode, tally in result.totals.items())
    lines += [f"Share of the time outside the model's forward: {shares}.", ""]
    lines += [*worked_example(lm, result), "", *drawn_example(lm, result), ""]
    freedave_decodes = sum(tally.problems for mode, tally in result.totals.items() if not mode.is_static)
    different = freedave_decodes - sum(tally.identical for mode, tally in result.totals.items() if not mode.is_static)
    lines += [
        f"All {freedave_decodes} FreeDave decodes committed the tokens of static decoding, at the same steps."
        if not different
        else f"NOT LOSSLESS: {different} of {freedave_decodes} FreeDave decodes differ from static decoding.",
        SMALL_MODEL,
        f"Pictures of the worked example: {', '.join(pictures)}",
    ]
    return "\n".join(lines)


def table(title: str, tallies: dict[Mode, Tally]) -> list[str]:
    """One table: a row for each mode, accuracy beside speed."""
    static = tallies[STATIC]
    lines = [f"{title:<26}   right  identical  forwards  tokens/forward  seconds  fewer forwards  speed-up"]
    for mode, tally in tallies.items():
        line = f"  {mode.name:<24} {f'{tally.right}/{tally.problems}':>7}  {identical_cell(mode, tally):>9}"
        line += f"  {tally.forwards:>8}  {tally.tokens_per_forward:>14.1f}  {tally.seconds:>7.2f}"
        if not mode.is_static:
            line += f"  {static.forwards / tally.forwards:>13.1f}x  {static.seconds / tally.seconds:>7.1f}x"
        lines.append(line)
    return lines


def identical_cell(mode: Mode, tally: Tally) -> str:
    """Whether a mode was lossless, in a word."""
    if mode.is_static:
        return "-"
    return "yes" if tally.all_identical else f"NO ({tally.problems - tally.identical})"


def worked_example(lm: DiffusionLM, result: Comparison) -> list[str]:
    """One problem in full, and where its time goes."""
    example = result.example
    problem, static = example.problem, example.outputs[STATIC]
    lines = [
        f"Worked example, {problem.task}",
        f"  prompt   {problem.prompt}",
        f"  output   {response_text(lm, static)}",
    ]
    for mode, output in example.outputs.items():
        stats = output.stats
        total, inside, outside = (1000 * s for s in (stats.total_seconds, stats.forward_seconds, stats.other_seconds))
        lines.append(
            f"  {mode.name:<24} {output.num_forwards:>3} forwards {total:>6.0f} ms: "
            f"{inside:.1f} ms in the model's forward, {outside:.1f} ms outside it ({outside / total:.0%})"
        )
    accepted = example.outputs[result.fastest].stats.accepted_lengths
    lines.append(f"  {result.fastest.name}, steps accepted by each forward: {' '.join(map(str, accepted))}")
    return lines


def drawn_example(lm: DiffusionLM, result: Comparison) -> list[str]:
    """The same problem, answered with a temperature."""
    drawn = result.drawn
    fewer = drawn.static.num_forwards / drawn.output.num_forwards
    return [
        f"The same, drawn with temperature {TEMPERATURE} and seed {DRAWN_SEED}",
        f"  output   {response_text(lm, drawn.output)}",
        f"  static sampling {drawn.static.num_forwards} forwards, {drawn.mode.name} {drawn.output.num_forwards} "
        f"({fewer:.1f}x fewer); identical, tokens and steps: {'yes' if drawn.identical else 'NO'}",
    ]


def as_json(lm: DiffusionLM, result: Comparison, pictures: list[str]) -> dict[str, Any]:
    """The same, for programs."""
    settings, example, drawn = result.settings, result.example, result.drawn
    return {
        "model": lm.name,
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "attention": lm.attention,
        "machine": machine(),
        "settings": {**dataclasses.asdict(settings), "max_new_tokens": MAX_NEW_TOKENS},
        "lossless": result.lossless,
        "tasks": {task: rows(tallies) for task, tallies in result.tallies.items()},
        "total": rows(result.totals),
        "example": {
            "task": example.problem.task,
            "prompt": example.problem.prompt,
            "output": response_text(lm, example.outputs[STATIC]),
            "decodes": [{**dataclasses.asdict(mode), **costs(output)} for mode, output in example.outputs.items()],
        },
        "drawn": {
            "temperature": TEMPERATURE,
            "seed": DRAWN_SEED,
            "output": response_text(lm, drawn.output),
            "identical": drawn.identical,
            "decodes": [
                {**dataclasses.asdict(mode), **costs(output)}
                for mode, output in ((STATIC, drawn.static), (drawn.mode, drawn.output))
            ],
        },
        "pictures": pictures,
    }


def rows(tallies: dict[Mode, Tally]) -> list[dict[str, Any]]:
    """One dictionary for each mode, static decoding first."""
    static = tallies[STATIC]
    return [
        {
            "mode": mode.name,
            **dataclasses.asdict(mode),
            **dataclasses.asdict(tally),
            "tokens_per_forward": tally.tokens_per_forward,
            "other_share": tally.other_share,
            "fewer_forwards": static.forwards / tally.forwards,
            "speed_up": static.seconds / tally.seconds,
        }
        for mode, tally in tallies.items()
    ]
