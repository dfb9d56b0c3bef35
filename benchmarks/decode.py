"""Whole decodes, statically and with FreeDave: what a user gets of it.

Two models: the embedded one, which is trained, so that its drafts are accepted as those of a real model are; and a random
one of the published shape (Qwen3, V=151936, 156 M parameters), whose forward is as large as a CPU bears, and whose accepted
lengths mean nothing. Ways to decode take turns in every round; each is compared with static decoding of the same block length
and batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

import freedave
from benchmarks.measure import Timing, timing
from benchmarks.record import Record, shape_text, time_text
from freedave.demo.tasks import TASKS, problems

MASK_TOKEN_ID = 151669  # SDAR's
SEED = 0
EMBEDDED_BUDGET, RANDOM_BUDGET, FEWEST_ROUNDS = 75.0, 60.0, 3


@dataclass(frozen=True)
class Way:
    """One way to decode; `draft_steps=1` is static decoding, "auto" chooses for each forward."""

    batch: int
    block_length: int
    draft_steps: int | Literal["auto"]
    drafting: str = "recycled"
    lookahead_steps: int | None = None

    @property
    def static(self) -> Way:
        """What it is compared with."""
        return Way(self.batch, self.block_length, 1)

    @property
    def provider(self) -> str:
        if self.draft_steps in (1, "auto"):
            return "static" if self.draft_steps == 1 else "auto"
        return "nested" if self.drafting == "nested" else "ahead 1" if self.lookahead_steps == 1 else "freedave"


@dataclass(frozen=True)
class Measured:
    """`outside`: the share of time outside the forward."""

    seconds: float
    outside: float


@dataclass(frozen=True)
class Chosen:
    """Tokens a second of "auto" against static decoding's, and against the best fixed setting's (static among them)."""

    against_static: float
    against_best: float
    best: Way


@dataclass(frozen=True)
class Workload:
    """`prompts`: by batch size, a list of `[B, P]`, decoded one after the other. `budget`: seconds after which no further
    round begins, once there were three."""

    name: str
    lm: freedave.DiffusionLM
    prompts: dict[int, list[torch.Tensor]]
    max_new_tokens: int
    rounds: int
    budget: float


@dataclass(frozen=True)
class Decoded:
    """One prompt's (or batch of prompts') decode."""

    seconds: float
    outside: float
    tokens: int
    forwards: int
    sequences: torch.Tensor


Samples = dict[Way, list[list[Decoded]]]  # by prompt, the rounds


def run(record: Record, quick: bool, only: Sequence[str] = ("ways",)) -> None:
    if "ways" in only:
        _all_ways(record, quick)
    if "choices" in only:
        for model in ("embedded", "random"):
            for batch, block_length in QUICK_CELLS if quick else CELLS:
                measure_choice(record, model, batch, block_length, quick)


def _all_ways(record: Record, quick: bool) -> None:
    print(
        f"{'model':<12}{'way':<46}{'seconds':>10}{'tokens/s':>10}{'forwards':>10}{'tok/fwd':>9}{'x static':>10}{'outside':>9}"
    )
    ways = QUICK_EMBEDDED if quick else EMBEDDED
    measure(
        record,
        embedded({way.batch for way in ways}, rounds=2 if quick else 5, max_new_tokens=16 if quick else 96),
        ways,
    )
    ways = QUICK_RANDOM if quick else RANDOM
    measure(record, random({way.batch for way in ways}, rounds=2 if quick else 3, tiny=quick), ways)


def _ways(batch: int, block_length: int, draft_steps: Iterable[int]) -> list[Way]:
    return [Way(batch, block_length, steps) for steps in draft_steps]


EMBEDDED = [
    *_ways(1, 16, [1, 2, 4, 8, 16, 32]),
    *(Way(1, 16, steps, "nested") for steps in (4, 8, 16)),
    *(Way(1, 16, steps, lookahead_steps=1) for steps in (4, 8, 16)),
    *_ways(1, 4, [1, 8, 16]),
    *_ways(1, 8, [1, 8, 16]),
    *_ways(1, 32, [1, 8, 16]),
    *(way for batch in (4, 16) for way in (*_ways(batch, 16, [1, 8]), Way(batch, 16, 8, lookahead_steps=1))),
]
RANDOM = [*_ways(1, 16, [1, 8]), Way(1, 16, 8, lookahead_steps=1), *_ways(4, 16, [1, 8])]
QUICK_EMBEDDED = [*_ways(1, 16, [1, 8]), *_ways(2, 16, [1, 8])]
QUICK_RANDOM = _ways(1, 4, [1, 4])


# Where "auto" has to be as fast as the best fixed setting: sequences and block lengths.
CELLS = [(batch, block_length) for batch in (1, 4, 16, 32) for block_length in (4, 16, 32)]
QUICK_CELLS = [(2, 4)]
CELLS_OF_CHECK = [(1, 4), (1, 16), (4, 16), (16, 4)]
# Forwards of more tokens are not tried as fixed settings: on a CPU they take longer than the static steps that they spare.
MOST_TOKENS = 2048
LEARNT = 100  # tokens
POOLED = "pooled"  # as drafts are where nothing else is asked for


def choices(batch: int, block_length: int) -> list[Way]:
    """Static decoding, "auto", and the fixed settings that it is compared with."""
    fixed = [Way(batch, block_length, steps, POOLED, ahead) for steps in (2, 4, 8, 16) for ahead in (1, None)]
    small = [way for way in fixed if _most_tokens(way) <= MOST_TOKENS]
    return [Way(batch, block_length, 1), Way(batch, block_length, "auto", POOLED), *small]


def _most_tokens(way: Way) -> int:
    """Of a forward with a fixed number of drafts, about."""
    assert way.draft_steps != "auto"
    ahead = way.draft_steps if way.lookahead_steps is None else way.lookahead_steps
    return way.batch * way.draft_steps * (1 + ahead // way.block_length) * way.block_length


def measure_choice(record: Record, model: str, batch: int, block_length: int, quick: bool) -> Chosen:
    """Interleaved, once what is learnt of the model has been learnt."""
    sets = 2 if quick or batch >= 16 else 5 if batch == 1 and model == "embedded" else 3
    rounds = 2 if sets > 2 and model == "embedded" else 1
    if model == "embedded":
        workload = embedded({batch}, rounds, max_new_tokens=16 if quick else 96, sets=sets)
    else:  # where forwards take seconds, fewer tokens take as long
        workload = random({batch}, rounds, tiny=quick, sets=sets)
        workload = replace(workload, max_new_tokens=min(max(64 // batch, 4), workload.max_new_tokens))
    ways, prompts = choices(batch, block_length), workload.prompts[batch]
    learnt = 0
    while learnt < LEARNT:  # the promise begins after a hundred tokens
        learnt += sum(decode(workload, ways[1], prompt).tokens for prompt in prompts[: len(prompts) // sets])
    samples = sample(workload, ways)
    chosen = weigh(samples, sets)
    text = (
        f"{workload.name} B={batch}, block {block_length}: auto {chosen.against_static:.2f} x static, "
        f"{chosen.against_best:.2f} x the best fixed setting ({_name(chosen.best)})"
    )
    static = [rounds[-1].sequences for rounds in samples[ways[0]]]
    record.put(
        "choice",
        text,
        model=workload.name,
        shape={"B": batch, "block": block_length},
        against_static=chosen.against_static,
        against_best=chosen.against_best,
        best=_name(chosen.best),
        rounds=rounds,
        prompts=len(prompts),
        ways=[_speed(way, samples[way], static) for way in ways],
    )
    return chosen


def weigh(samples: Samples, sets: int) -> Chosen:
    """How fast "auto" is, where prompts come in `sets`, one set after the other.

    Of settings that are nearly alike, one is the fastest on these prompts by chance. So which is the best is told for each
    set by the others, as a user who tried them before would have found, and what it took for this set is what counts.
    """
    seconds = {way: _of_sets(found, sets) for way, found in samples.items()}
    (auto,) = (way for way in samples if way.draft_steps == "auto")
    fixed = [way for way in samples if way is not auto]
    of_best = 0.0
    for this in range(sets):
        best = min(fixed, key=lambda way: sum(seconds[way]) - seconds[way][this])
        of_best += seconds[best][this]
    took = sum(seconds[auto])
    return Chosen(sum(seconds[auto.static]) / took, of_best / took, min(fixed, key=lambda way: sum(seconds[way])))


def _of_sets(rounds: list[list[Decoded]], sets: int) -> list[float]:
    """Seconds of each set of prompts, by the faster round of each prompt: neighbours slow a machine down for moments."""
    best = [min(one.seconds for one in prompt) for prompt in rounds]
    size = len(best) // sets
    return [sum(best[this * size : (this + 1) * size]) for this in range(sets)]


def _name(way: Way) -> str:
    if way.draft_steps in (1, "auto"):
        return way.provider
    return f"K={way.draft_steps}{', lookahead 1' if way.lookahead_steps == 1 else ''}"


def _speed(way: Way, rounds: list[list[Decoded]], static: list[torch.Tensor]) -> dict[str, Any]:
    last = [prompt[-1] for prompt in rounds]
    tokens = sum(one.tokens for one in last)
    return {
        "way": _name(way),
        "tokens_per_second": tokens / sum(_of_sets(rounds, 1)),
        "tokens": tokens,
        "forwards": sum(one.forwards for one in last),
        "identical_to_static": all(torch.equal(one.sequences, other) for one, other in zip(last, static, strict=True)),
    }


def embedded(batches: Iterable[int], rounds: int, max_new_tokens: int = 96, sets: int = 1) -> Workload:
    """Held-out problems: in each set some of every task; in a batch all prompts have one length."""
    lm = freedave.load_model("demo")
    prompts = {}
    for batch in batches:
        of_tasks = [_equal_prompts(lm, task, batch, sets) for task in TASKS]
        prompts[batch] = [of_task[this] for this in range(sets) for of_task in of_tasks]
    return Workload("embedded", lm, prompts, max_new_tokens, rounds, EMBEDDED_BUDGET)


def _equal_prompts(lm: freedave.DiffusionLM, task: str, batch: int, sets: int) -> list[torch.Tensor]:
    """`sets` times `[batch, P]`: the longest prompts of the task of which there are enough."""
    by_length: dict[int, list[list[int]]] = {}
    for problem in problems(task, "test", 400, SEED):
        token_ids = lm.tokenizer(problem.prompt)["input_ids"]
        by_length.setdefault(len(token_ids), []).append(token_ids)
    enough = max(length for length, prompts in by_length.items() if len(prompts) >= sets * batch)
    prompts = by_length[enough]
    return [torch.tensor(prompts[this * batch : (this + 1) * batch], dtype=torch.int64) for this in range(sets)]


def random(batches: Iterable[int], rounds: int, tiny: bool = False, sets: int = 1) -> Workload:
    """A random model of Qwen3's architecture and vocabulary, and random prompts of 32 tokens."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=16 if tiny else 640,
        num_hidden_layers=1 if tiny else 12,
        intermediate_size=16 if tiny else 1920,
        num_attention_heads=1 if tiny else 10,
        num_key_value_heads=1 if tiny else 5,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(SEED)
    with torch.inference_mode(False):
        model = Qwen3ForCausalLM(config).float()
    lm = freedave.DiffusionLM(model, MASK_TOKEN_ID, attention="block_causal", block_length=16)
    prompts = {
        batch: [torch.randint(0, MASK_TOKEN_ID, (batch, 32), generator=generator) for _ in range(sets)]
        for batch in batches
    }
    return Workload("tiny" if tiny else "random 156 M", lm, prompts, 4 if tiny else 16, rounds, RANDOM_BUDGET)


def decode(workload: Workload, way: Way, prompt: torch.Tensor) -> Decoded:
    began = time.perf_counter()
    out = freedave.generate(
        workload.lm,
        prompt,
        max_new_tokens=workload.max_new_tokens,
        draft_steps=way.draft_steps,
        block_length=way.block_length,
        drafting=way.drafting,
        lookahead_steps=way.lookahead_steps,
    )
    seconds = time.perf_counter() - began
    return Decoded(seconds, out.stats.other_seconds, out.stats.tokens, out.num_forwards, out.sequences)


def measure(record: Record, workload: Workload, ways: Sequence[Way]) -> dict[Way, Measured]:
    """A row for each way."""
    samples = sample(workload, ways)
    timings = {way: _summed([timing([one.seconds for one in rounds]) for rounds in samples[way]]) for way in ways}
    return {way: _row(record, workload, way, samples, timings) for way in ways}


def sample(workload: Workload, ways: Sequence[Way]) -> Samples:
    """Every way in turn, on every prompt, in every round."""
    for batch in dict.fromkeys(way.batch for way in ways):
        freedave.generate(workload.lm, workload.prompts[batch][0], max_new_tokens=2, draft_steps=2)  # warms up
    samples: Samples = {way: [[] for _ in workload.prompts[way.batch]] for way in ways}
    began = time.perf_counter()
    for done in range(workload.rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - began > workload.budget:
            break
        for index in range(max(len(prompts) for prompts in workload.prompts.values())):
            for way in ways:
                samples[way][index].append(decode(workload, way, workload.prompts[way.batch][index]))
    return samples


def _summed(timings: list[Timing]) -> Timing:
    """Of the prompts one after the other: a slow moment falls on one decode of one prompt, and its median forgets it."""
    sums = {name: sum(getattr(one, name) for one in timings) for name in ("median", "lower", "upper", "best")}
    return Timing(**sums, rounds=timings[0].rounds, of_rounds=timings[0].of_rounds)


def _row(record: Record, workload: Workload, way: Way, samples: Samples, timings: dict[Way, Timing]) -> Measured:
    last = [rounds[-1] for rounds in samples[way]]
    tokens, forwards = sum(one.tokens for one in last), sum(one.forwards for one in last)
    outside = statistics.median(one.outside / one.seconds for rounds in samples[way] for one in rounds)
    ratio = forwards_ratio = identical = None
    if way.static in timings:
        static = [rounds[-1] for rounds in samples[way.static]]
        ratio = timings[way.static].median / timings[way].median
        forwards_ratio = sum(one.forwards for one in static) / forwards
        identical = all(torch.equal(one.sequences, other.sequences) for one, other in zip(last, static, strict=True))
    values = asdict(timings[way]) | {
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_second": tokens / timings[way].median,
        "tokens_per_forward": tokens / forwards,
        "baseline": "static",
        "ratio": ratio,
        "forwards_ratio": forwards_ratio,
        "identical_to_static": identical,
        "share_outside_forward": outside,
    }
    text = (
        f"{workload.name:<14}{way.provider:<10}{shape_text(_shape(way)):<34}{time_text(timings[way].median):>10}"
        f"{values['tokens_per_second']:>10.1f}{forwards:>10}{values['tokens_per_forward']:>9.2f}"
        f"{'' if ratio is None else f'{ratio:.2f}':>10}{outside:>9.1%}{'  DIFFERS FROM STATIC' if identical is False else ''}"
    )
    record.put("decode", text, model=workload.name, provider=way.provider, shape=_shape(way), **values)
    return Measured(timings[way].median, outside)


def _shape(way: Way) -> dict[str, int | str]:
    return {"B": way.batch, "K": way.draft_steps, "block": way.block_length}
