"""draft_attention: the contract, on every backend that has it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, INTERPRETED, on_backend
from states import generator

import freedave_kernels as fk
from freedave_kernels.registry import backends_with

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[name for name in BACKENDS if name in backends_with("draft_attention")])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from on_backend(request.param)


def test_example(backend):
    """Two drafts of a sequence whose first three positions are stored, in place 1 of 2."""
    random = generator(0)
    query = torch.randn(1, 2, 4, 4, 16, generator=random)  # 1 sequence, 2 drafts, 4 positions, 4 heads
    key, value = torch.randn(2, 1, 2, 4, 2, 16, generator=random)  # 2 groups of heads
    stored_key, stored_value = torch.randn(2, 2, 10, 2, 16, generator=random)
    ranges = torch.tensor([[[0, 3]]], dtype=torch.int32)
    start, slots = torch.tensor([3]), torch.tensor([1])
    out = fk.draft_attention(query, key, value, stored_key, stored_value, ranges, window_start=start, slots=slots)
    for draft in range(2):
        keys = torch.cat([stored_key[1, :3], key[0, draft]]).transpose(0, 1)
        values = torch.cat([stored_value[1, :3], value[0, draft]]).transpose(0, 1)
        queries = query[0, draft].transpose(0, 1)
        expected = F.scaled_dot_product_attention(queries[None], keys[None], values[None], enable_gqa=True)[0]
        torch.testing.assert_close(out[0, draft], expected.transpose(0, 1))


def call(dtype, *, ranges, drafts=3, length=6, heads=4, groups=2, size=16, capacity=None, seed=0, **more):
    """Arguments by name. The projections of a model are `[B K, H, L, D]`, and seen as the op wants them. Windows begin
    behind all ranges, unless `window_start` says where.
    """
    random = generator(seed)
    ranges = torch.as_tensor(ranges).int()
    batch = len(ranges)
    slots = more.pop("slots", None)
    capacity = max(int(ranges.max()) if ranges.numel() else 0, 1) + 3 if capacity is None else capacity

    def projection(count):
        made = torch.randn(batch * drafts, count, length, size, generator=random).to(dtype)
        return made.view(batch, drafts, count, length, size).transpose(2, 3)

    stored = torch.randn(2, batch + 2 if slots else batch, capacity, groups, size, generator=random).to(dtype)
    made = {"query": projection(heads) * 2, "key": projection(groups), "value": projection(groups)}
    made |= {"stored_key": stored[0], "stored_value": stored[1], "ranges": ranges}
    starts = more.pop("window_start", ranges[..., 1].amax(1).tolist() if ranges.numel() else None)
    made["window_start"] = None if starts is None else torch.tensor(starts)
    if slots:
        made["slots"] = torch.tensor(slots)
    for name in ("num_drafts", "window_lengths"):
        if name in more:
            made[name] = torch.tensor(more.pop(name), dtype=torch.int32)
    return made | more


def by_definition(attention, arguments):
    """`attention(query, key, value, mask, scale)`, called for one draft after the other, `[H or G, T, D]`."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    batch, drafts, length = query.shape[:3]
    out = torch.zeros(query.shape, dtype=torch.float64)
    scale = arguments.get("scale") or query.shape[-1] ** -0.5
    for b in range(batch):
        slot = arguments["slots"][b] if "slots" in arguments else b
        exist = int(arguments["window_lengths"][b]) if "window_lengths" in arguments else length
        active = int(arguments["num_drafts"][b]) if "num_drafts" in arguments else drafts
        spans = [slice(*span) for span in arguments["ranges"][b].tolist()]
        for k in range(active if exist else 0):
            keys = torch.cat([*(arguments["stored_key"][slot, span] for span in spans), key[b, k, :exist]])
            values = torch.cat([*(arguments["stored_value"][slot, span] for span in spans), value[b, k, :exist]])
            block = torch.arange(exist) // (arguments.get("block_length") or length)
            own = block[:, None] >= block
            mask = torch.cat([torch.ones(exist, len(keys) - exist, dtype=torch.bool), own], dim=1)
            heads_first = (x.transpose(0, 1) for x in (query[b, k, :exist], keys, values))
            out[b, k, :exist] = attention(*heads_first, mask, scale).transpose(0, 1)
    return out


def exact(query, key, value, mask, scale):
    key, value = (x.double().repeat_interleave(len(query) // len(x), 0) for x in (key, value))
    scores = (query.double() @ key.mT * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def fused(query, key, value, mask, scale):
    """On a GPU where there is one, as its sums have another order."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
    query, key, value, mask = (x[None].to(there) for x in (query, key, value, mask))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[0].cpu()


def assert_as_exact_as_fused(out, arguments):
    """At most twice the error of PyTorch's fused attention in the same type, and one ulp."""
    truth = by_definition(exact, arguments)
    assert not out.isnan().any()
    allowed = 2 * (by_definition(fused, arguments) - truth).abs().max()
    allowed += torch.finfo(out.dtype).eps * truth.abs().max()
    assert out.shape == truth.shape and out.is_contiguous()
    assert (out.double() - truth).abs().max() <= allowed


EMPTY = [[0, 0], [0, 0]]
CASES = {
    "nothing stored": {"ranges": [EMPTY]},
    "no ranges": {"ranges": torch.zeros(1, 0, 2), "capacity": 5},
    "one range": {"ranges": [[[0, 7]], [[2, 3]]]},
    "one stored position, then the last": {"ranges": [[[3, 4], [40, 41]]], "capacity": 41},
    "prefix and suffix": {"ranges": [[[0, 33], [70, 131]], [[5, 5], [6, 90]], [[1, 65], [65, 65]]],
                          "window_start": [33, 90, 65]},
    "several splits": {"ranges": [[[500, 530], [1100, 1101]]], "window_start": [530], "drafts": 1, "length": 3},
    "a gap of a split": {"ranges": [[[0, 10], [1030, 1090]]], "window_start": [511], "drafts": 2, "length": 2,
                         "block_length": 1},
    "blocks": {"ranges": [[[0, 20]], [[0, 0]]], "length": 11, "block_length": 4},
    "a window of one block": {"ranges": [[[0, 20]]], "length": 4, "block_length": 4},
    "window of one": {"ranges": [[[0, 20]]], "length": 1, "block_length": 4},
    "one draft": {"ranges": [[[0, 20]]], "drafts": 1, "length": 70, "block_length": 32},
    "many drafts": {"ranges": [[[0, 5]]], "drafts": 17, "length": 2},
    "one group": {"ranges": [[[0, 9]], [[3, 4]]], "groups": 1},
    "every head its own": {"ranges": [[[0, 9]], [[3, 4]]], "groups": 4},
    "as many rows as groups": {"ranges": [[[0, 9]], [[3, 40]]], "block_length": 2},
    "odd heads": {"ranges": [[[0, 9]]], "heads": 9, "groups": 3},
    "slots": {"ranges": [[[0, 9]], [[3, 40]], EMPTY[:1]], "slots": [4, 1, 0]},
    "some drafts": {"ranges": [[[0, 9]], [[3, 40]], [[0, 2]]], "num_drafts": [3, 1, 0]},
    "some positions": {"ranges": [[[0, 9]], [[3, 40]], [[0, 2]]], "window_lengths": [6, 0, 5], "block_length": 2},
    "everything": {"ranges": [[[0, 9], [12, 30]], EMPTY], "slots": [3, 0], "num_drafts": [3, 2], "window_lengths": [6, 3],
                   "block_length": 2, "scale": 0.4},
    "80 features": {"ranges": [[[0, 40]]], "size": 80, "length": 3},
    "256 features": {"ranges": [[[0, 40]]], "size": 256, "length": 3},
    "20 features": {"ranges": [[[0, 40]]], "size": 20, "length": 3},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(backend, case, dtype):
    arguments = call(dtype, **CASES[case])
    assert_as_exact_as_fused(fk.draft_attention(**arguments), arguments)


@pytest.mark.parametrize("size", [64, 96, 128])
def test_sizes_of_heads(backend, size):
    arguments = call(torch.bfloat16, ranges=[[[1, 40]]], size=size, length=5)
    assert_as_exact_as_fused(fk.draft_attention(**arguments), arguments)


def test_long_windows(backend):
    """As a prompt's: alone, block-causal, after what another prompt has stored."""
    length = 300 if backend == "triton" and INTERPRETED else 1024
    arguments = call(torch.float32, ranges=[[[0, 20]]], drafts=1, length=length, heads=2, groups=1, block_length=32)
    assert_as_exact_as_fused(fk.draft_attention(**arguments), arguments)


def test_windows_beyond_1024(backend):
    if backend == "triton" and INTERPRETED:
        pytest.skip("minutes in the interpreter")
    arguments = call(torch.float32, ranges=[EMPTY], drafts=1, length=1500, heads=2, groups=1)
    assert_as_exact_as_fused(fk.draft_attention(**arguments), arguments)


def row_alone(arguments, row, draft):
    """The same draft: alone, as the first one, in another slot of a longer buffer."""
    alone = dict(arguments)
    for name in ("query", "key", "value"):
        alone[name] = arguments[name][row : row + 1, draft : draft + 1].clone()
    slot = int(arguments["slots"][row]) if "slots" in arguments else row
    for name in ("stored_key", "stored_value"):
        stored = arguments[name][slot]
        longer = torch.full((4, stored.shape[0] + 700, *stored.shape[1:]), math.nan, dtype=stored.dtype)
        longer[2, : stored.shape[0]] = stored
        alone[name] = longer
    alone["slots"] = torch.tensor([2])
    alone["ranges"] = arguments["ranges"][row : row + 1]
    if alone["window_start"] is not None:
        alone["window_start"] = arguments["window_start"][row : row + 1]
    if "num_drafts" in alone:
        alone["num_drafts"] = torch.tensor([1])
    if "window_lengths" in alone:
        alone["window_lengths"] = arguments["window_lengths"][row : row + 1]
    return alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["prefix and suffix", "several splits", "many drafts", "everything", "80 features"])
def test_bits_of_a_draft_depend_on_nothing_else(backend, case, dtype):
    """Neither on K, B, the other drafts, its own number, its slot, the number of slots nor the capacity."""
    arguments = call(dtype, **CASES[case])
    out = fk.draft_attention(**arguments)
    batch, drafts = out.shape[:2]
    active = arguments.get("num_drafts", torch.full((batch,), drafts))
    for row in range(batch):
        for draft in range(0, int(active[row]), max(1, drafts // 3)):
            alone = fk.draft_attention(**row_alone(arguments, row, draft))
            assert torch.equal(alone[0, 0], out[row, draft]), (row, draft)


def keys_in_both(arguments, order, *, stored, window, length, drafts):
    """Arguments of the same keys, `order [T, G, D]` and values: those of `stored` ranges in the buffer, the others, from
    `window` on, in windows of `length`; NaN where a buffer has nothing to say. Draft 1 is another one.
    """
    query, keys, values = order
    made = {"ranges": torch.tensor([stored], dtype=torch.int32), "window_start": torch.tensor([window])}
    for name, source in (("key", keys), ("value", values)):
        buffer = torch.full_like(source, math.nan)
        for begin, end in stored:
            buffer[begin:end] = source[begin:end]
        made[f"stored_{name}"] = buffer[None]
        own = source[window : window + length]
        made[name] = torch.stack([own, *(own.flip(0) for _ in range(drafts - 1))])[None]
    own = query[window : window + length]
    return arguments | made | {"query": torch.stack([own] * drafts)[None]}


BY_POSITION = [
    name for name in BACKENDS if name in backends_with("draft_attention") and name != "cpu"
]  # as the op's docstring says


@pytest.mark.parametrize("name", BY_POSITION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [8, 28, 32, 60, 64, 500, 508, 512])
def test_bits_do_not_depend_on_what_is_stored(name, first, dtype):
    """One block more or less, beside borders of tiles and of splits; and on the window's length and the number of drafts."""
    random = generator(first)
    order = [torch.randn(first + 16, heads, 16, generator=random).to(dtype) for heads in (4, 2, 2)]
    rules = {"block_length": 4}
    for _ in on_backend(name):
        more = keys_in_both(rules, order, stored=[[0, first]], window=first, length=16, drafts=3)
        fewer = keys_in_both(rules, order, stored=[[0, first + 4]], window=first + 4, length=12, drafts=1)
        out, expected = fk.draft_attention(**more)[0, 0, 4:], fk.draft_attention(**fewer)[0, 0]
        assert not out.isnan().any() and torch.equal(out, expected)


@pytest.mark.parametrize("name", BY_POSITION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [20, 62, 508])
def test_bits_between_two_ranges(name, first, dtype):
    """A window that sees all of itself, stored positions before and behind it; the same keys in shorter windows."""
    random = generator(first)
    order = [torch.randn(600, heads, 16, generator=random).to(dtype) for heads in (4, 2, 2)]
    for _ in on_backend(name):
        stored = [[2, first], [first + 8, 590]]
        long = keys_in_both({}, order, stored=stored, window=first, length=8, drafts=2)
        stored = [[2, first + 3], [first + 5, 590]]
        short = keys_in_both({}, order, stored=stored, window=first + 3, length=2, drafts=3)
        out, expected = fk.draft_attention(**long)[0, 0, 3:5], fk.draft_attention(**short)[0, 0]
        assert not out.isnan().any() and torch.equal(out, expected)


def test_the_window_covers_what_is_stored(backend):
    arguments = call(torch.float32, ranges=[[[0, 40]], [[1, 6]]], window_start=[7, 4], window_lengths=[6, 5])
    around = torch.tensor([[[0, 7], [13, 40]], [[1, 4], [0, 0]]], dtype=torch.int32)
    for name in ("stored_key", "stored_value"):
        arguments[name][0, 7:13] = arguments[name][1, 4:9] = math.nan
    expected = fk.draft_attention(**arguments | {"ranges": around})
    assert torch.equal(fk.draft_attention(**arguments), expected) and not expected.isnan().any()


@pytest.mark.parametrize("start", [41, 300, 1000, 2**30 - 8])
def test_a_window_far_behind_what_is_stored(backend, start):
    """In splits that the buffer does not reach, shared out or not."""
    for stored in (40, 600):
        arguments = call(torch.float32, ranges=[[[0, stored]]], window_start=[max(start, stored)], capacity=stored)
        assert_as_exact_as_fused(fk.draft_attention(**arguments), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_drafts_have_equal_bits(backend, dtype):
    """Wherever in a tile of rows a draft lies."""
    arguments = call(dtype, ranges=[[[0, 45]]], drafts=9, length=5, heads=6, groups=2, block_length=4)
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name][:, :1].expand(-1, 9, -1, -1, -1)
    out = fk.draft_attention(**arguments)
    assert all(torch.equal(out[0, 0], out[0, draft]) for draft in range(1, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["prefix and suffix", "everything", "a gap of a split", "some positions"])
def test_what_is_not_seen_may_be_nan(backend, case, dtype):
    arguments = call(dtype, **CASES[case])
    expected = fk.draft_attention(**arguments)
    seen = {name: torch.full_like(arguments[name], math.nan) for name in ("stored_key", "stored_value")}
    batch, drafts, length = expected.shape[:3]
    for row in range(batch):
        slot = int(arguments["slots"][row]) if "slots" in arguments else row
        for begin, end in arguments["ranges"][row].tolist():
            for name, stored in seen.items():
                stored[slot, begin:end] = arguments[name][slot, begin:end]
        active = int(arguments["num_drafts"][row]) if "num_drafts" in arguments else drafts
        exist = int(arguments["window_lengths"][row]) if "window_lengths" in arguments else length
        for name in ("query", "key", "value"):
            arguments[name][row, active:] = math.nan
            arguments[name][row, :, exist:] = math.nan
    assert torch.equal(fk.draft_attention(**arguments | seen), expected)


def test_another_draft_may_be_nan(backend):
    arguments = call(torch.float32, ranges=[[[0, 12]], [[0, 3]]], drafts=4, length=3)
    expected = fk.draft_attention(**arguments)
    for name in ("query", "key", "value"):
        arguments[name][0, 1:3] = math.nan
    out = fk.draft_attention(**arguments)
    assert torch.equal(out[0, [0, 3]], expected[0, [0, 3]]) and torch.equal(out[1], expected[1])
    assert out[0, 1:3].isnan().all()


def test_a_nan_that_is_seen_shows(backend):
    arguments = call(torch.float32, ranges=[[[0, 12]], [[0, 3]]])
    arguments["stored_value"][0, 5, 1] = math.nan
    out = fk.draft_attention(**arguments)
    assert out[0, :, :, 2:].isnan().all() and not out[0, :, :, :2].isnan().any() and not out[1].isnan().any()


def test_ranges_beyond_the_capacity_are_clipped(backend):
    arguments = call(torch.float32, ranges=[[[0, 12], [20, 30]]], capacity=30)
    beyond = arguments | {"ranges": torch.tensor([[[-4, 12], [20, 99]]], dtype=torch.int32)}
    assert torch.equal(fk.draft_attention(**beyond), fk.draft_attention(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_show(backend, dtype):
    """Tensors with gaps, at odd addresses, and dimensions in another order."""
    arguments = call(dtype, **CASES["everything"])
    expected = fk.draft_attention(**arguments)
    for name in ("query", "key", "value", "stored_key", "stored_value"):
        tensor = arguments[name]
        order = list(range(tensor.dim() - 2, -1, -1))
        spread = torch.full((*(tensor.shape[n] + 1 for n in order), tensor.shape[-1] + 3), math.nan, dtype=dtype)
        spread = spread[..., 1:-2].permute(*(order.index(n) for n in range(tensor.dim() - 1)), -1)
        arguments[name] = spread[tuple(slice(0, n) for n in tensor.shape)].copy_(tensor)
    for name in ("window_start", "slots", "num_drafts", "window_lengths"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    arguments["ranges"] = arguments["ranges"].transpose(0, 2).contiguous().transpose(0, 2)
    out = fk.draft_attention(**arguments)
    assert_as_exact_as_fused(out, arguments)
    assert backend == "cpu" or torch.equal(out, expected)  # a CPU's matrix products round differently with strides


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_to_attend(backend, shape):
    query, key = torch.zeros(*shape, 4, 16), torch.zeros(*shape, 2, 16)
    stored, ranges = torch.zeros(shape[0], 5, 2, 16), torch.zeros(shape[0], 0, 2, dtype=torch.int32)
    assert fk.draft_attention(query, key, key, stored, stored, ranges, window_start=None).shape == query.shape


def test_a_buffer_without_places(backend):
    arguments = call(torch.float32, ranges=[EMPTY], capacity=0)
    assert_as_exact_as_fused(fk.draft_attention(**arguments), arguments)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton")
@pytest.mark.parametrize(("dtype", "span"), [(torch.float32, 3), (torch.bfloat16, 3), (torch.float16, 1)], ids=str)
@pytest.mark.parametrize("case", ["a gap of a split", "a window between splits"])
def test_who_attends_to_stored_positions_does_not_show(monkeypatch, span, case, dtype):
    """The programs that own rows, by themselves, or others before them, each to a split or to a span; nor how many rows there
    are.
    """
    from freedave_kernels.triton import draft_attention as ours

    chosen = ours.tiles(dtype, 16, 0)._replace(split=64, span=span)
    between = {"ranges": [[[3, 250], [270, 440]]], "window_start": [254], "drafts": 3, "length": 9, "capacity": 440}
    arguments = call(dtype, **CASES.get(case, between))
    one_draft = arguments | {name: arguments[name][:, :1] for name in ("query", "key", "value")}
    merges: list[tuple[int, ...]] = []
    monkeypatch.setattr(ours, "tiles", lambda *_: chosen)
    monkeypatch.setattr(ours, "merge_parts", recording(ours.merge_parts, merges))
    for _ in on_backend("triton"):
        outs = []
        for sharing in ("spans", "splits", "nothing"):
            monkeypatch.setattr(ours, "shared_out", lambda *_, sharing=sharing: sharing)
            outs.append(fk.draft_attention(**arguments))
        assert_as_exact_as_fused(outs[0], arguments)
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
        assert torch.equal(fk.draft_attention(**one_draft)[:, 0], outs[0][:, 0])
    assert merges == [(64 * span, 1), (64, span)]


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton")
@pytest.mark.parametrize(("capacity", "splits"), [(183, 1), (184, 3)])
def test_a_span_that_holds_everything_does_not_show(monkeypatch, capacity, splits):
    """Where it does, kernels go without it, and merge in the same order."""
    from freedave_kernels.triton import draft_attention as ours

    chosen = ours.tiles(torch.float32, 16, 0)._replace(split=64, span=3)
    assert ours.splits_of_a_span(chosen, capacity, 9) == splits
    arguments = call(torch.float32, ranges=[[[3, 60], [70, 170]]], window_start=[174], length=9, capacity=capacity)
    monkeypatch.setattr(ours, "tiles", lambda *_: chosen)
    for _ in on_backend("triton"):
        outs = []
        for each in (1, 3):
            monkeypatch.setattr(ours, "splits_of_a_span", lambda *_, each=each: each)
            outs.append(fk.draft_attention(**arguments))
        assert torch.equal(*outs)


def recording(kernel: Any, merges: list[tuple[int, ...]]) -> Any:
    """The kernel, and of how many positions its parts are, and how many parts of a span there are."""

    def launch(grid: Any, arguments: Any, constants: Any, *rest: Any) -> None:
        merges.append(constants[3:5])
        kernel.launch(grid, arguments, constants, *rest)

    return SimpleNamespace(launch=launch)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton")
@pytest.mark.parametrize(
    ("programs", "splits", "spans", "shared"),
    [(8, 1, 1, "nothing"), (8, 9, 3, "splits"), (80, 9, 3, "spans"), (80, 2, 1, "splits"), (128, 9, 3, "nothing")],
)
def test_what_programs_share_out(programs, splits, spans, shared):
    from freedave_kernels.triton.draft_attention import shared_out

    assert shared_out(programs, splits, spans) == shared


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in backends_with("draft_attention")])
def test_backends_without_it_say_so(name):
    arguments = call(torch.float32, ranges=[EMPTY])
    message = f"backend '{name}' has no draft_attention; 'reference', 'cpu', 'triton' have it"
    with fk.use_backend(name), pytest.raises(fk.BackendUnavailableError, match=message):
        fk.draft_attention(**arguments)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton")
def test_heads_that_are_too_large_for_triton():
    arguments = call(torch.float32, ranges=[EMPTY], size=257)
    message = "draft_attention: backend 'triton' serves heads of at most 256 features, got 257; use"
    for _ in on_backend("triton"):
        with pytest.raises(fk.BackendUnavailableError, match=message):
            fk.draft_attention(**arguments)


def test_opcheck():
    for case in ("one range", "everything"):
        arguments = call(torch.float32, **CASES[case])
        names = ("window_start", "slots", "num_drafts", "window_lengths", "block_length", "scale")
        first = list(arguments.values())[:6]
        torch.library.opcheck(torch.ops.freedave.draft_attention.default, (*first, *map(arguments.get, names)))


def test_compiles_without_graph_breaks(backend):
    arguments = call(torch.float32, **CASES["everything"])
    rest = {name: value for name, value in arguments.items() if name != "query"}
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("tensors of the test live on the CPU")

    def layer(query):
        return fk.draft_attention(query * 2, **rest) + 1

    torch._dynamo.reset()  # what was compiled keeps its backend
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["query"]), layer(arguments["query"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_holds_it():
    """Captured, so nothing waits for the device; replayed with other ranges and numbers of drafts."""
    arguments = call(torch.bfloat16, **CASES["everything"], capacity=2000)
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with fk.use_backend("triton"):
        fk.draft_attention(**there)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fk.draft_attention(**there)
        there["ranges"].copy_(torch.tensor([[[0, 700], [900, 1900]], [[2, 2], [3, 600]]]))
        there["num_drafts"].copy_(torch.tensor([1, 3]))
        graph.replay()
        assert torch.equal(out, fk.draft_attention(**there))


ARGUMENTS = call(torch.float32, ranges=[[[0, 3]], [[0, 2]]], slots=[0, 1])
QUERY, KEY, STORED = ARGUMENTS["query"], ARGUMENTS["key"], ARGUMENTS["stored_key"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": QUERY.double()}, TypeError, "query must be float16 or bfloat16 or float32, got float64"),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, K, L, H, D\], got \(3, 6, 4, 16\)"),
        ({"key": KEY.half()}, TypeError, "key must be float32, got float16"),
        ({"key": KEY[:, :, :5]}, ValueError, r"key must have shape \(2, 3, 6, 2, 16\) \(query's, with G heads\)"),
        ({"query": QUERY[:, :, :, :3]}, ValueError, "heads of query must be a multiple of those of key, got 3 and 2"),
        ({"value": KEY[..., :8]}, ValueError, r"value must have shape .* \(like key\)"),
        ({"stored_key": STORED[..., :1, :]}, ValueError, r"stored_key must have shape .* \(S, C, and G, D of key\)"),
        ({"stored_value": STORED[:, 1:]}, ValueError, r"stored_value must have shape .* \(like stored_key\)"),
        ({"query": torch.zeros(2, 3, 6, 16, 4).mT}, ValueError, "the last dimension of query must be contiguous"),
        ({"ranges": torch.zeros(2, 1, 2, dtype=torch.int64)}, TypeError, "ranges must be int32, got int64"),
        ({"ranges": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"ranges must have shape \[B, R, 2\]"),
        ({"ranges": torch.zeros(2, 3, 2, dtype=torch.int32)}, ValueError, "ranges must be at most 2 a row, got 3"),
        ({"ranges": torch.zeros(3, 1, 2, dtype=torch.int32)}, ValueError, r"ranges must have shape \(2, 1, 2\)"),
        ({"window_start": None}, ValueError, "window_start must be given where there are ranges, got None"),
        ({"window_start": torch.zeros(3, dtype=torch.int64)}, ValueError, r"window_start must have shape \(2,\)"),
        ({"slots": None}, ValueError, "stored_key must have one slot for each of 2 rows where slots is None, got 4"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, ValueError, r"slots must have shape \(2,\)"),
        ({"num_drafts": torch.zeros(2)}, TypeError, "num_drafts must be int32 or int64, got float32"),
        ({"window_lengths": [1, 2]}, TypeError, "window_lengths must be a int32 or int64 tensor, got list"),
        ({"ranges": ARGUMENTS["ranges"].to("meta")}, ValueError, "ranges must be on cpu like query, got meta"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ({"scale": "1"}, TypeError, "scale must be a float, got str"),
    ],
    ids=str,
)
def test_argument_errors(change, error, message):
    with pytest.raises(error, match=f"draft_attention: .*{message}"):
        fk.draft_attention(**ARGUMENTS | change)
