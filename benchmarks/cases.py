"""What is timed: one op on one shape, as every provider computes it; the same cases on a CPU and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

import freedave_kernels as fk
from benchmarks import eager, roofline, scenes, vectorised
from benchmarks.compiled import compiled
from benchmarks.measure import Calls, Timing, readers
from benchmarks.record import Record
from benchmarks.scenes import MASK
from freedave_kernels.contract import STATE_FIELDS, TOKENS_PER_STATE

Call = Callable[[], object]
MEMORY = 2**25  # bytes; a cache may hold less, and then the bandwidth of memory is no limit
SEQUENCES, SCENE_BYTES = 256, 2**22  # distinct sequences to go through, as long as they stay in a cache
COUNT_TRANSFERRED = 2
TOP_K, TOP_P = 50, 0.9
MOST_PROJECTED, SLICE_BYTES = 512, 2**22  # rows and bytes of logits that a decoder makes at a time on a CPU


class Machine(Protocol):
    """A CPU (`Processor`) or a GPU."""

    @property
    def device(self) -> torch.device: ...
    @property
    def backends(self) -> list[str]: ...
    @property
    def absent(self) -> dict[str, str]: ...
    @property
    def compiler(self) -> str: ...
    @property
    def dynamic(self) -> bool: ...
    def times(self, calls: Calls) -> dict[str, Timing]: ...
    def free_memory(self) -> int: ...


@dataclass(frozen=True)
class Shapes:
    """`rows`: all and masked ones of `predict_tokens`; `drafts`, `lengths`, `batches`: K, L and B of the other ops."""

    vocabularies: list[int]
    rows: list[tuple[int, int]]
    dtypes: list[torch.dtype]
    drafts: list[int]
    lengths: list[int]
    batches: list[int]


ROWS = [(1, 1), (32, 32), (256, 32), (256, 160), (256, 256), (2048, 2048)]
FULL = Shapes(
    [32000, 126464, 151936, 262144],
    ROWS,
    [torch.float32, torch.bfloat16],
    [1, 4, 8, 16, 32],
    [4, 32, 64, 256],
    [1, 8, 32],
)
QUICK = Shapes([1000], [(1, 1), (32, 20)], [torch.float32, torch.bfloat16], [1, 4], [8], [1, 2])


@dataclass(frozen=True)
class Case:
    """`ours`: calls by variant ("" is the op's default). `arguments` gives `vectorised` its next arguments. `num_bytes`: what
    must be moved. `memory`: what must be read, where that is much. `needed`: bytes beside the inputs that providers take."""

    op: str
    shape: dict[str, int]
    dtype: str
    num_bytes: int
    ours: dict[str, Call]
    eager: Call
    vectorised: Callable[..., object]
    arguments: Callable[[], tuple[Any, ...]]
    memory: torch.Tensor | None = None
    needed: int = 0


def measure(record: Record, machine: Machine, case: Case, bandwidth: float | None = None) -> dict[str, Timing] | None:
    """Times every provider of the case in the same rounds. `bandwidth`: the machine's, if it was measured before; else it is
    that of the best reader in these rounds."""
    free = machine.free_memory()
    if case.needed > free:
        reason = (
            f"the providers need {case.needed / 2**30:.1f} GiB beside the inputs, and {free / 2**30:.1f} GiB are free"
        )
        record.absent("all", reason, case.op, case.shape)
        return None
    calls: dict[str, Call] = {}
    if bandwidth is None and case.memory is not None and case.num_bytes > MEMORY:
        # First: who reads after eager, which leaves no page table in a cache, pays for that, and one of four readers may.
        calls |= readers(case.memory)
    reading = list(calls)
    for backend in machine.backends:
        for variant, call in case.ours.items():
            name = f"{backend}, {variant}" if variant else backend
            calls[name] = call if machine.device.type == "cpu" and backend == "cpu" else on(backend, call)
    calls["eager"] = case.eager
    if "compiled" not in machine.absent:
        function = compiled(case.vectorised, machine.compiler, machine.dynamic)
        calls["compiled"] = lambda: function(*case.arguments())
    timings = machine.times(calls)
    if reading:
        assert case.memory is not None
        bandwidth = case.memory.nbytes / min(timings[name].median for name in reading)
    limited = bandwidth if case.num_bytes > MEMORY else None
    record.add(case.op, case.shape, case.dtype, timings, num_bytes=case.num_bytes, bandwidth=limited)
    return timings


def on(backend: str, call: Call) -> Call:
    def run() -> object:
        with fk.use_backend(backend):
            return call()

    return run


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prediction_cases(shapes: Shapes, machine: Machine) -> Iterator[Case | tuple[dict[str, int], str]]:
    """`predict_tokens` on every shape; a shape whose logits do not fit comes with the reason instead."""
    most = max(rows for rows, _ in shapes.rows)
    for vocab, dtype in itertools.product(shapes.vocabularies, shapes.dtypes):
        fitting = min(most, int(machine.free_memory() * 0.4) // (vocab * 4))
        memory = scenes.rows_of_logits(fitting, vocab, dtype, machine.device)
        for rows, masked in shapes.rows:
            if rows > fitting:
                yield {"V": vocab, "rows": rows, "masked": masked}, f"only {fitting} rows of logits fit in free memory"
            else:
                yield prediction(memory[:rows], masked)


def prediction(logits: torch.Tensor, masked: int, which: torch.Tensor | None = None) -> Case:
    """`masked` of the rows of `logits [rows, V]`, in drafts of 32: rows `which`, or any."""
    rows, vocab = logits.shape
    which = torch.randperm(rows)[:masked] if which is None else which
    input_ids = scenes.masked_ids(rows, which, logits.device)
    inputs = (logits.view(*input_ids.shape, vocab), input_ids, MASK)
    return Case(
        "predict_tokens",
        {"V": vocab, "rows": rows, "masked": masked},
        dtype_name(logits.dtype),
        roofline.predict_tokens(rows, masked, vocab, logits.itemsize),
        {"": partial(fk.predict_tokens, *inputs)},
        partial(eager.predict_tokens, *inputs),
        vectorised.predict_tokens,
        lambda: inputs,
        memory=logits[:masked],
        needed=3 * masked * vocab * logits.itemsize,  # the gather, its softmax, and what either needs on the way
    )


def drawing(rows: int, device: torch.device) -> dict[str, Any]:
    """What makes `predict_tokens` draw the tokens of so many rows, each with a key of its own."""
    seed = torch.arange(rows, device=device)
    return {"temperature": 1.0, "seed": seed, "positions": seed}


def record_drawn(
    record: Record, shape: dict[str, int], dtype: torch.dtype, timings: dict[str, Timing], op: str = "drawn tokens"
) -> None:
    """What drawing tokens takes beside the greedy call of the same backend and rounds: `timings` of "cpu", "cpu, drawn"..."""
    for backend in [name for name in timings if f"{name}, drawn" in timings]:
        pair = {name: timings[name] for name in (backend, f"{backend}, drawn")}
        record.add(op, shape, dtype_name(dtype), pair, baseline=backend)


def part_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """`partial_predictions` of slices of a vocabulary, as they come out of a projection, and `merge_predictions` of all."""
    for rows in sorted({rows for rows, _ in shapes.rows if rows <= MOST_PROJECTED}):
        for dtype in shapes.dtypes:
            tokens = max(
                TOKENS_PER_STATE, SLICE_BYTES // (rows * dtype.itemsize) // TOKENS_PER_STATE * TOKENS_PER_STATE
            )
            for vocab in sorted({TOKENS_PER_STATE, min(tokens, max(shapes.vocabularies))}):
                if vocab % TOKENS_PER_STATE == 0:
                    yield partial_predictions(scenes.rows_of_logits(rows, vocab, dtype, device))
        for vocab in shapes.vocabularies:
            yield merge_predictions(rows, vocab, device)


def floor_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """`logit_floor` with both of what is asked for most, of so many rows as a decoder projects at a time."""
    for rows, vocab, dtype in itertools.product((1, 32), shapes.vocabularies, shapes.dtypes):
        yield logit_floor(scenes.rows_of_logits(rows, vocab, dtype, device))


def logit_floor(logits: torch.Tensor) -> Case:
    rows, vocab = logits.shape
    return Case(
        "logit_floor",
        {"V": vocab, "rows": rows},
        dtype_name(logits.dtype),
        roofline.logit_floor(rows, vocab, logits.itemsize),
        {"": partial(fk.logit_floor, logits, top_k=TOP_K, top_p=TOP_P)},
        partial(eager.logit_floor, logits, TOP_K, TOP_P),
        vectorised.logit_floor,
        lambda: (logits, TOP_K, TOP_P),
    )


def partial_predictions(logits: torch.Tensor) -> Case:
    """Every row of `logits [rows, V]` masked."""
    rows, vocab = logits.shape
    inputs = (logits, torch.full((rows,), MASK, device=logits.device), MASK)
    return Case(
        "partial_predictions",
        {"V": vocab, "rows": rows},
        dtype_name(logits.dtype),
        roofline.partial_predictions(rows, rows, vocab, logits.itemsize),
        {"": partial(fk.partial_predictions, *inputs)},
        partial(eager.partial_predictions, *inputs),
        vectorised.partial_predictions,
        lambda: inputs,
    )


def merge_predictions(rows: int, vocab: int, device: torch.device) -> Case:
    count = -(-vocab // TOKENS_PER_STATE)
    states = torch.rand(rows, count, STATE_FIELDS, dtype=torch.float64, device=device)
    states[..., 2] = (states[..., 2] * TOKENS_PER_STATE + torch.arange(count, device=device) * TOKENS_PER_STATE).floor()
    inputs = (states, torch.full((rows,), MASK, device=device))
    return Case(
        "merge_predictions",
        {"V": vocab, "rows": rows},
        "",
        roofline.merge_predictions(rows, vocab),
        {"": partial(fk.merge_predictions, *inputs)},
        partial(eager.merge_predictions, *inputs),
        vectorised.merge_predictions,
        lambda: inputs,
    )


def window_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """The ops over drafts, on every batch, number of drafts and window."""
    for batch, length in itertools.product(shapes.batches, shapes.lengths):
        for count in shapes.drafts:
            scene = scenes.drafts(_sequences(batch, count, length), count, length, device)
            if count == shapes.drafts[0]:
                yield rank_positions(scene, batch)
                yield select_transfer(scene, batch)
            yield build_drafts(scene, batch)
            yield verify_drafts(scene, batch)
            yield draft_step(scene, batch)


def keep_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """`keep` of some drafts of a block, as the layers of a model make them, on every batch."""
    for batch in shapes.batches:
        yield keep(batch, min(4, max(shapes.drafts)), min(32, max(shapes.lengths)), device)


def keep(batch: int, count: int, length: int, device: torch.device) -> Case:
    """Half of a draft of each sequence."""
    layers, groups, size, dtype = 4, 8, 128, torch.bfloat16
    windows = torch.randn(2, layers, batch, count, length, groups, size, device=device).to(dtype)
    stored = torch.zeros(2, layers, batch, 4 * length, groups, size, dtype=dtype, device=device)
    accepted, start = torch.arange(batch, device=device) % count, torch.arange(batch, device=device) % length
    kept = torch.full_like(start, length // 2)
    inputs = (*windows, accepted, start, kept, *stored)
    return Case(
        "keep",
        {"B": batch, "K": count, "L": length, "layers": layers},
        dtype_name(dtype),
        roofline.keep(layers, batch, length // 2, groups, size, dtype.itemsize),
        {"": partial(fk.keep, *inputs)},
        partial(eager.keep, *inputs),
        vectorised.keep,
        lambda: inputs,
    )


def step_case(batch: int, count: int, length: int, device: torch.device) -> Case:
    return draft_step(scenes.drafts(_sequences(batch, count, length), count, length, device), batch)


def _sequences(batch: int, count: int, length: int) -> int:
    """How many distinct sequences a case goes through: whole batches, in a cache as a decoder's are."""
    most = min(SEQUENCES, SCENE_BYTES // (count * length * 20))
    return max(batch, most // batch * batch)


def draft_step(scene: scenes.DraftScene, batch: int) -> Case:
    """Ours recycles by default, which eager does not; `nested` is the same work as eager's."""
    _, count, length = scene.drafts.shape
    parts = list(scene.parts(batch))
    full = [(p.drafts, p.token_ids, p.confidence, p.num_drafts, MASK, count) for p in parts]
    plain = [(p.drafts, p.token_ids, p.confidence, MASK, count) for p in parts]
    ours = {"": _cycled(fk.draft_step, full), "nested": _cycled(partial(fk.draft_step, drafting="nested"), full)}
    shape = {"B": batch, "K": count, "L": length}
    return _window_case("draft_step", shape, roofline.draft_step(batch, count, length), ours, plain)


def build_drafts(scene: scenes.DraftScene, batch: int) -> Case:
    _, count, length = scene.drafts.shape
    arguments = [
        (p.drafts[:, 0].contiguous(), p.token_ids[:, 0].contiguous(), p.confidence[:, 0].contiguous(), MASK, count)
        for p in scene.parts(batch)
    ]
    shape = {"B": batch, "K": count, "L": length}
    ours = {"": _cycled(fk.build_drafts, arguments)}
    return _window_case("build_drafts", shape, roofline.build_drafts(batch, count, length), ours, arguments)


def verify_drafts(scene: scenes.DraftScene, batch: int) -> Case:
    """The targets of the first half of the chain are the next drafts; then they are not."""
    _, count, length = scene.drafts.shape
    arguments = []
    for part in scene.parts(batch):
        targets = part.drafts.roll(-1, 1)
        targets[:, count // 2 :, 0] += 1
        arguments.append((part.drafts, targets))
    shape = {"B": batch, "K": count, "L": length}
    ours = {"": _cycled(fk.verify_drafts, arguments)}
    return _window_case("verify_drafts", shape, roofline.verify_drafts(batch, count, length), ours, arguments)


def rank_positions(scene: scenes.DraftScene, batch: int) -> Case:
    arguments = list(_ranked(scene, batch))
    length = scene.drafts.shape[2]
    shape = {"B": batch, "L": length}
    ours = {"": _cycled(fk.rank_positions, arguments)}
    return _window_case("rank_positions", shape, roofline.rank_positions(batch, length), ours, arguments)


def select_transfer(scene: scenes.DraftScene, batch: int) -> Case:
    arguments = list(_ranked(scene, batch))
    length = scene.drafts.shape[2]
    shape = {"B": batch, "L": length}
    ours = {"": _cycled(partial(fk.select_transfer, num_transfer=COUNT_TRANSFERRED), arguments)}
    counted = [(*pair, COUNT_TRANSFERRED) for pair in arguments]
    return _window_case("select_transfer", shape, roofline.select_transfer(batch, length), ours, counted)


def _ranked(scene: scenes.DraftScene, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for part in scene.parts(batch):
        yield part.confidence[:, 0].contiguous(), part.drafts[:, 0] == MASK


def _window_case(
    op: str, shape: dict[str, int], num_bytes: int, ours: dict[str, Call], arguments: list[tuple[Any, ...]]
) -> Case:
    """`arguments`: those of the eager and the vectorised form, a tuple a batch of sequences."""
    following = itertools.cycle(arguments)
    baseline = _cycled(getattr(eager, op), arguments)
    return Case(op, shape, "", num_bytes, ours, baseline, getattr(vectorised, op), lambda: next(following))


def _cycled(function: Callable[..., object], arguments: Iterable[tuple[Any, ...]]) -> Call:
    """Each call takes the next arguments: a decoder never sees the same sequences twice, and a branch predictor that does
    learns a small batch by heart."""
    following = itertools.cycle(arguments)
    return lambda: function(*next(following))
