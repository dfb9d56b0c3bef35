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
from dataclasses import asdict, dataclass

import torch

import freedave
from benchmarks.measure import Timing, timing
from benchmarks.record import Record, shape_text, time_text
from freedave.demo.tasks import TASKS, problems

MASK_TOKEN_ID = 151669  # SDAR's
SEED = 0
EMBEDDED_BUDGET, RANDOM_BUDGET, FEWEST_ROUNDS = 60.0, 60.0, 2


@dataclass(frozen=True)
class Way:
    """One way to decode; `draft_steps=1` is static decoding."""

    batch: int
    block_length: int
    draft_steps: int
    drafting: str = "recycled"
    lookahead_steps: int | None = None

    @property
    def static(self) -> Way:
        """What it is compared with."""
        return Way(self.batch, self.block_length, 1)

    @property
    def provider(self) -> str:
        if self.draft_steps == 1:
            return "static"
        return "nested" if self.drafting == "nested" else "ahead 1" if self.lookahead_steps == 1 else "freedave"


@dataclass(frozen=True)
class Workload:
    """`prompts`: by batch size, a list of `[B, P]`, decoded one after the other. `budget`: seconds after which no further
    round begins, once there were two."""

    name: str
    lm: freedave.DiffusionLM
    prompts: dict[int, list[torch.Tensor]]
    max_new_tokens: int
    rounds: int
    budget: float


@dataclass
class Decoded:
    """One pass over the prompts."""

    seconds: float = 0.0
    outside: float = 0.0
    tokens: int = 0
    forwards: int = 0
    sequences: list[torch.Tensor] | None = None


def run(record: Record, quick: bool) -> None:
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
    *_ways(4, 16, [1, 8]),
    *_ways(16, 16, [1, 8]),
]
RANDOM = [*_ways(1, 16, [1, 8]), Way(1, 16, 8, lookahead_steps=1), *_ways(4, 16, [1, 8])]
QUICK_EMBEDDED = [*_ways(1, 16, [1, 8]), *_ways(2, 16, [1, 8])]
QUICK_RANDOM = _ways(1, 4, [1, 4])


def embedded(batches: Iterable[int], rounds: int, max_new_tokens: int = 96) -> Workload:
    """Held-out problems of every task; in a batch all prompts have one length."""
    lm = freedave.load_model("demo")
    prompts = {batch: [_equal_prompts(lm, task, batch) for task in TASKS] for batch in batches}
    return Workload("embedded", lm, prompts, max_new_tokens, rounds, EMBEDDED_BUDGET)


def _equal_prompts(lm: freedave.DiffusionLM, task: str, batch: int) -> torch.Tensor:
    """`[batch, P]`: the longest prompts of the task of which there are enough."""
    by_length: dict[int, list[list[int]]] = {}
    for problem in problems(task, "test", 200, SEED):
        token_ids = lm.tokenizer(problem.prompt)["input_ids"]
        by_length.setdefault(len(token_ids), []).append(token_ids)
    longest = max(length for length, prompts in by_length.items() if len(prompts) >= batch)
    return torch.tensor(by_length[longest][:batch], dtype=torch.int64)


def random(batches: Iterable[int], rounds: int, tiny: bool = False) -> Workload:
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
    prompts = {batch: [torch.randint(0, MASK_TOKEN_ID, (batch, 32), generator=generator)] for batch in batches}
    return Workload("tiny" if tiny else "random 156 M", lm, prompts, 4 if tiny else 16, rounds, RANDOM_BUDGET)


def decode(workload: Workload, way: Way) -> Decoded:
    """Every prompt of the batch size, one call each."""
    result = Decoded(sequences=[])
    for prompt in workload.prompts[way.batch]:
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
        result.seconds += time.perf_counter() - began
        result.outside += out.stats.other_seconds
        result.tokens += out.stats.tokens
        result.forwards += out.num_forwards
        assert result.sequences is not None
        result.sequences.append(out.sequences)
    return result


def measure(record: Record, workload: Workload, ways: Sequence[Way]) -> dict[Way, float]:
    """Returns the share of time outside the forward, by way. A batch that the decoder refuses is listed with its reason."""
    refused: dict[int, str] = {}
    for batch in dict.fromkeys(way.batch for way in ways):
        try:
            freedave.generate(workload.lm, workload.prompts[batch][0], max_new_tokens=2, draft_steps=2)  # and warms up
        except (ValueError, NotImplementedError) as error:
            refused[batch] = str(error)
    for way in ways:
        if way.batch in refused:
            record.absent(way.provider, refused[way.batch], f"decode {workload.name}", _shape(way))
    ways = [way for way in ways if way.batch not in refused]
    samples: dict[Way, list[Decoded]] = {way: [] for way in ways}
    began = time.perf_counter()
    for done in range(workload.rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - began > workload.budget:
            break
        for way in ways:
            samples[way].append(decode(workload, way))
    timings = {way: timing([sample.seconds for sample in samples[way]]) for way in ways}
    return {way: _row(record, workload, way, samples, timings) for way in ways}


def _row(
    record: Record,
    workload: Workload,
    way: Way,
    samples: dict[Way, list[Decoded]],
    timings: dict[Way, Timing],
) -> float:
    last, taken, baseline = samples[way][-1], timings[way], way.static
    outside = statistics.median(sample.outside / sample.seconds for sample in samples[way])
    ratio = timings[baseline].median / taken.median if baseline in timings else None
    identical = _identical(last, samples[baseline][-1]) if baseline in samples else None
    values = asdict(taken) | {
        "tokens": last.tokens,
        "forwards": last.forwards,
        "tokens_per_second": last.tokens / taken.median,
        "tokens_per_forward": last.tokens / last.forwards,
        "baseline": "static",
        "ratio": ratio,
        "forwards_ratio": samples[baseline][-1].forwards / last.forwards if baseline in samples else None,
        "identical_to_static": identical,
        "share_outside_forward": outside,
    }
    text = (
        f"{workload.name:<14}{way.provider:<10}{shape_text(_shape(way)):<34}{time_text(taken.median):>10}"
        f"{values['tokens_per_second']:>10.1f}{last.forwards:>10}{values['tokens_per_forward']:>9.2f}"
        f"{'' if ratio is None else f'{ratio:.2f}':>10}{outside:>9.1%}{'' if identical else '  DIFFERS FROM STATIC'}"
    )
    record.put("decode", text, model=workload.name, provider=way.provider, shape=_shape(way), **values)
    return outside


def _identical(one: Decoded, other: Decoded) -> bool:
    assert one.sequences is not None and other.sequences is not None
    return all(torch.equal(a, b) for a, b in zip(one.sequences, other.sequences, strict=True))


def _shape(way: Way) -> dict[str, int]:
    return {"B": way.batch, "K": way.draft_steps, "block": way.block_length}
