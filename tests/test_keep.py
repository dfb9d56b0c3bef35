"""keep: the contract, on every backend that has it."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS
from states import generator

import freedave_kernels as fk

LEAST, MOST = -(2**63), 2**63 - 1


def test_example(backend):
    """Two sequences, three drafts of four positions, five layers: two positions of draft 1, and three of draft 0."""
    window_key, window_value = torch.randn(2, 5, 2, 3, 4, 2, 16)
    stored_key, stored_value = torch.zeros(2, 5, 2, 10, 2, 16)
    accepted, start, count = torch.tensor([1, 0]), torch.tensor([7, 0]), torch.tensor([2, 3])
    fk.keep(window_key, window_value, accepted, start, count, stored_key, stored_value)
    for window, stored in ((window_key, stored_key), (window_value, stored_value)):
        assert torch.equal(stored[:, 0, 7:9], window[:, 0, 1, :2])
        assert torch.equal(stored[:, 1, 0:3], window[:, 1, 0, :3])
        assert not stored[:, 0, :7].any() and not stored[:, 0, 9:].any() and not stored[:, 1, 3:].any()


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN everywhere: what is read of it shows, and what is written to it as well."""
    return torch.full(shape, torch.nan, dtype=dtype)


def by_definition(windows, accepted, start, count, stored, slots):
    """Position after position, in place of `stored`."""
    drafts, length = windows[0].shape[2:4]
    places, capacity = stored[0].shape[1:3]
    for window, to in zip(windows, stored, strict=True):
        for row, slot in enumerate(slots.tolist()):
            draft = int(accepted[row])
            for position in range(min(int(count[row]), length)):
                place = int(start[row]) + position
                if 0 <= draft < drafts and 0 <= slot < places and 0 <= place < capacity:
                    to[:, slot, place] = window[:, row, draft, position]


def expect_by_definition(windows, accepted, start, count, memory, stored_of=torch.Tensor.unbind, slots=None):
    """Of `memory`, in which `stored_of` finds both stored tensors, every byte is what it should be."""
    expected = memory.clone()
    there = torch.arange(len(accepted)) if slots is None else slots
    by_definition(windows, accepted, start, count, stored_of(expected), there)
    fk.keep(*windows, accepted, start, count, *stored_of(memory), slots=slots)
    assert torch.equal(memory.view(torch.uint8), expected.view(torch.uint8))


CASES = {
    # accepted, start, count, slots
    "one": ([0], [0], [1], [0]),
    "nothing": ([0, 0], [3, 5], [0, 0], [1, 0]),
    "nothing of a draft that is not there": ([-1, 99], [3, -7], [0, 0], [1, 0]),
    "less than nothing": ([0, 1], [3, 5], [-1, -7], [1, 0]),
    "drafts that are not there": ([-1, 3, 1], [3, 4, 5], [2, 3, 4], [0, 2, 1]),
    "slots that are not there": ([0, 2, 1], [3, 4, 5], [2, 3, 4], [-1, 5, 1]),
    "no slot for nothing": ([0, 2], [3, 4], [0, 3], [-7, 0]),
    "a whole window": ([2], [0], [6], [0]),
    "up to the end": ([2, 1], [16, 15], [4, 5], [0, 1]),
    "beyond the end": ([2, 1], [16, 25], [6, 3], [0, 1]),
    "before the beginning": ([2], [-2], [5], [0]),
    "more than the window": ([1], [4], [50], [0]),
    "out of reach": ([1, 2, 0, 1], [20, -6, 19, -5], [6, 6, 6, 6], [3, 2, 1, 0]),
    "other slots": ([1, 2, 0], [4, 0, 9], [3, 6, 1], [4, 0, 2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(backend, case, integers, dtype):
    accepted, start, count, slots = (torch.tensor(numbers, dtype=integers) for numbers in CASES[case])
    windows = torch.randn(2, 2, len(slots), 3, 6, 2, 20, generator=generator(0)).to(dtype).unbind()
    expect_by_definition(windows, accepted, start, count, poison(2, 2, 5, 20, 2, 20, dtype=dtype), slots=slots)


@pytest.mark.parametrize("number", [LEAST, LEAST + 1, MOST - 1, MOST])
def test_numbers_that_no_tensor_has(backend, number):
    """Of any of them; what the others ask for happens."""
    windows = torch.randn(2, 2, 4, 3, 6, 2, 8, generator=generator(0)).unbind()
    numbers = torch.tensor([[number, 1, 1, 1], [2, number, 2, 2], [3, 3, number, 3], [3, 1, 0, number]])
    expect_by_definition(windows, *numbers[:3], poison(2, 2, 4, 20, 2, 8), slots=numbers[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("size", [1, 12, 16, 37, 80, 128, 256])
def test_sizes(backend, groups, size, dtype):
    """Features of a whole number of 16 bytes or not."""
    windows = torch.randn(2, 3, 2, 2, 33, groups, size, generator=generator(1)).to(dtype).unbind()
    numbers = torch.tensor([1, 0]), torch.tensor([5, 31]), torch.tensor([33, 32])
    expect_by_definition(windows, *numbers, poison(2, 3, 2, 64, groups, size, dtype=dtype))


def test_many_layers_and_sequences(backend):
    """More of them than there are blocks of threads for: each then copies all of a row, a round after the other."""
    layers, batch, length, random = 55, 20, 9, generator(2)
    windows = torch.randn(2, layers, batch, 1, length, 1, 129, generator=random).bfloat16().unbind()
    count = torch.arange(batch) % (length + 1)
    slots = torch.randperm(batch, generator=random)
    memory = poison(2, layers, batch, length, 1, 129, dtype=torch.bfloat16)
    expect_by_definition(windows, torch.zeros_like(count), torch.zeros_like(count), count, memory, slots=slots)


def test_megabytes_on_any_number_of_threads(backend, threads):
    windows = torch.randn(2, 8, 4, 1, 64, 4, 128, generator=generator(3)).unbind()
    start, count = torch.arange(4), torch.tensor([64, 60, 64, 1])
    expect_by_definition(windows, torch.zeros_like(count), start, count, poison(2, 8, 4, 66, 4, 128))


def test_strided_inputs(backend):
    """Windows as projections make them, `[B K, G, L, D]` a layer; buffers and numbers with gaps, at odd addresses."""
    layers, batch, drafts, length, groups, size = 2, 2, 3, 6, 2, 16
    random = generator(2)
    projections = torch.randn(2, layers, batch * drafts, groups, length, size, generator=random).bfloat16()
    windows = projections.unflatten(2, (batch, drafts)).transpose(4, 5).unbind()
    wide = poison(2, groups + 2, batch, 20, layers, size + 3, dtype=torch.bfloat16)
    accepted, start, count = torch.tensor([[2, 9, 0], [7, 9, 1], [4, 9, 6]])[:, ::2].unbind()

    def stored(memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return memory[:, 1:-1, ..., 1:-2].permute(0, 4, 2, 3, 1, 5).unbind()

    expect_by_definition(windows, accepted, start, count, wide, stored)


@pytest.mark.parametrize("narrow", ["window_key", "window_value", "stored_key", "stored_value", None])
@pytest.mark.parametrize("gap", [1, 8])
def test_addresses(backend, narrow, gap):
    """Groups side by side in all tensors but one, which has gaps between them: of 16 bytes, or not."""

    def of_shape(*shape: int, name: str) -> torch.Tensor:
        wide = poison(*shape[:-1], shape[-1] + (gap if name == narrow else 0), dtype=torch.bfloat16)
        return wide[..., : shape[-1]]

    window = torch.randn(2, 2, 3, 6, 2, 16, generator=generator(4)).bfloat16()
    windows = [of_shape(*window.shape, name=name).copy_(window) for name in ("window_key", "window_value")]
    stored = [of_shape(2, 2, 20, 2, 16, name=name) for name in ("stored_key", "stored_value")]
    numbers = torch.tensor([2, 0]), torch.tensor([7, 1]), torch.tensor([4, 6])
    expected = [tensor.clone() for tensor in stored]
    by_definition(windows, *numbers, expected, torch.arange(2))
    fk.keep(*windows, *numbers, *stored)
    for got, wanted in zip(stored, expected, strict=True):
        assert torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("window", "stored"),
    [
        ((0, 2, 3, 4, 2, 16), (0, 2, 5, 2, 16)),
        ((2, 0, 3, 4, 2, 16), (2, 0, 5, 2, 16)),
        ((2, 2, 0, 4, 2, 16), (2, 2, 5, 2, 16)),
        ((2, 2, 3, 0, 2, 16), (2, 2, 5, 2, 16)),
        ((2, 2, 3, 4, 0, 16), (2, 2, 5, 0, 16)),
        ((2, 2, 3, 4, 2, 0), (2, 2, 5, 2, 0)),
        ((2, 2, 3, 4, 2, 16), (2, 2, 0, 2, 16)),
        ((2, 2, 3, 4, 2, 16), (2, 0, 5, 2, 16)),
    ],
)
def test_nothing_to_keep(backend, window, stored):
    """No layers, sequences, drafts, positions, groups, features; and nowhere to store them."""
    memory, numbers = poison(2, *stored), torch.zeros(3, window[1], dtype=torch.int64)
    fk.keep(
        torch.ones(window), torch.ones(window), *numbers[:2], numbers[2] + 4, *memory, slots=torch.arange(window[1])
    )
    assert memory.isnan().all()


def test_opcheck():
    arguments = ARGUMENTS | {"accepted": torch.tensor([1]), "count": torch.tensor([2]), "slots": torch.tensor([2])}
    torch.library.opcheck(torch.ops.freedave.keep.default, tuple(arguments.values()))


def test_compiles_without_graph_breaks(backend):
    """And what is written is written in the compiled function as well."""
    if backend in ("cuda", "triton") and torch.cuda.is_available():
        pytest.skip("tensors of the test live on the CPU")

    def store(window, stored_key, stored_value):
        fk.keep(window * 2, window, *numbers, stored_key, stored_value)
        return stored_key + 1

    numbers = torch.tensor([1]), torch.tensor([1]), torch.tensor([2])
    window, eager = torch.randn(2, 1, 3, 4, 2, 16), torch.zeros(2, 2, 1, 5, 2, 16)
    compiled = eager.clone()
    torch._dynamo.reset()  # what was compiled keeps its backend
    result = torch.compile(store, fullgraph=True, backend="aot_eager")(window, *compiled)
    assert torch.equal(result, store(window, *eager))
    assert torch.equal(compiled, eager) and eager.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in BACKENDS if name in ("cuda", "triton")])
def test_a_cuda_graph_holds_it(name):
    random = generator(3)
    windows = torch.randn(2, 4, 2, 3, 6, 2, 64, generator=random).bfloat16().cuda().unbind()
    stored = torch.zeros(2, 4, 2, 30, 2, 64, dtype=torch.bfloat16, device="cuda").unbind()
    numbers = [torch.zeros(2, dtype=torch.int64, device="cuda") for _ in range(3)]
    with fk.use_backend(name):
        fk.keep(*windows, *numbers, *stored)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fk.keep(*windows, *numbers, *stored)
    for tensor, now in zip(numbers, ([2, 1], [3, 27], [5, 6]), strict=True):
        tensor.copy_(torch.tensor(now))
    expected = [tensor.clone() for tensor in stored]
    by_definition(windows, *numbers, expected, torch.arange(2))
    graph.replay()
    assert all(map(torch.equal, stored, expected)) and expected[0].any()


WINDOW, STORED = torch.zeros(2, 1, 3, 4, 2, 16), torch.zeros(2, 3, 5, 2, 16)
NUMBERS = torch.zeros(1, dtype=torch.int64)
ARGUMENTS = {
    "window_key": WINDOW, "window_value": WINDOW + 1, "accepted": NUMBERS, "start": NUMBERS, "count": NUMBERS,
    "stored_key": STORED, "stored_value": STORED.clone(), "slots": NUMBERS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window_key": WINDOW.double()}, TypeError, "window_key must be float16 or bfloat16 or float32, got float64"),
        ({"window_key": WINDOW[0]}, ValueError, r"window_key must have shape \[N, B, K, L, G, D\], got \(1, 3, 4, 2, 16\)"),
        ({"window_value": WINDOW.half()}, TypeError, "window_value must be float32, got float16"),
        ({"window_value": WINDOW[:1]}, ValueError, r"window_value must have shape .* \(like window_key\)"),
        ({"stored_key": STORED[:1]}, ValueError, r"stored_key must have shape \(2, 3, 5, 2, 16\)"),
        ({"stored_value": STORED[:, :2]}, ValueError, r"stored_value must have shape .* \(like stored_key\)"),
        ({"stored_key": torch.zeros(2, 3, 5, 16, 2).mT}, ValueError, "the last dimension of stored_key must be contiguous"),
        ({"slots": None}, ValueError, "stored_key must have one slot for each of 1 rows where slots is None, got 3"),
        ({"count": NUMBERS.float()}, TypeError, "count must be int32 or int64, got float32"),
        ({"start": NUMBERS[:0]}, ValueError, r"start must have shape \(1,\) \(B of window_key\), got \(0,\)"),
        ({"accepted": 1}, TypeError, "accepted must be a int32 or int64 tensor, got int"),
        ({"count": NUMBERS.to("meta")}, ValueError, "count must be on cpu like window_key, got meta"),
    ],
    ids=str,
)  # fmt: skip
def test_argument_errors(change, error, message):
    with pytest.raises(error, match=f"keep: {message}"):
        fk.keep(**ARGUMENTS | change)
    assert not STORED.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_key": WINDOW.double()}, "window_key must be float32 or bfloat16 or float16, got float64"),
        ({"window_key": WINDOW[0]}, r"window_key must have 6 dimensions, got shape \[1, 3, 4, 2, 16\]"),
        ({"window_value": WINDOW.half()}, "window_value must be float32, got float16"),
        ({"window_value": WINDOW[..., :2, :, :]}, "window_value must have the first 6 sizes of window_key"),
        ({"stored_key": STORED[0]}, "stored_key must have 5 dimensions"),
        ({"stored_key": STORED[:1]}, r"stored_key must have shape \[N, S, C, G, D\]"),
        ({"stored_key": STORED[..., :1, :]}, r"stored_key must have shape \[N, S, C, G, D\]"),
        ({"stored_key": STORED[..., :8]}, r"stored_key must have shape \[N, S, C, G, D\]"),
        ({"stored_key": STORED.half()}, "stored_key must be float32, got float16"),
        ({"stored_value": STORED[:, :2]}, "stored_value must have the first 5 sizes of stored_key"),
        ({"stored_value": STORED.half()}, "stored_value must be float32, got float16"),
        ({"stored_value": torch.zeros(2, 3, 5, 16, 2).mT}, "last dimensions of window_value and stored_value must be cont"),
        ({"window_key": torch.zeros(2, 1, 3, 4, 16, 2).mT}, "last dimensions of window_key and stored_key must be contig"),
        ({"slots": None}, "with S = B where slots is None"),
        ({"slots": NUMBERS.float()}, "slots must be int32 or int64, got float32"),
        ({"slots": NUMBERS[:0]}, "slots must have the first 1 sizes of a layer of window_key"),
        ({"count": NUMBERS.bool()}, "count must be int32 or int64, got bool"),
        ({"count": NUMBERS[0]}, "count must have the first 1 sizes of a layer of window_key"),
        ({"start": torch.zeros(2, dtype=torch.int64)}, "start must have the first 1 sizes of a layer of window_key"),
        ({"accepted": NUMBERS[:0]}, "accepted must have the first 1 sizes of a layer of window_key"),
        ({"stored_key": STORED.to("meta")}, "the tensors must be on one device"),
    ],
    ids=str,
)  # fmt: skip
def test_a_raw_call_is_safe(change, message):
    """Past the Python checks, the native library refuses what its kernels could not take."""
    with pytest.raises(RuntimeError, match=f"keep: .*{message}"):
        torch.ops.freedave.keep(*(ARGUMENTS | change).values())
    assert not STORED.any()
