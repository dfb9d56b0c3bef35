"""keep: the contract, on every backend that has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import BACKENDS, on_backend
from states import generator

import freedave_kernels as fk
from freedave_kernels.registry import backends_with


@pytest.fixture(params=[name for name in BACKENDS if name in backends_with("keep")])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from on_backend(request.param)


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


def by_definition(windows, accepted, start, count, stored, slots):
    """Position after position."""
    expected = [tensor.clone() for tensor in stored]
    length, capacity = windows[0].shape[3], stored[0].shape[2]
    for window, to in zip(windows, expected, strict=True):
        for row, slot in enumerate(slots.tolist()):
            for position in range(min(int(count[row]), length)):
                place = int(start[row]) + position
                if 0 <= place < capacity:
                    to[:, slot, place] = window[:, row, accepted[row], position]
    return expected


CASES = {
    # accepted, start, count, slots
    "one": ([0], [0], [1], [0]),
    "nothing": ([0, 0], [3, 5], [0, 0], [1, 0]),
    "nothing of a draft that is not there": ([-1, 99], [3, -7], [0, 0], [1, 0]),
    "a whole window": ([2], [0], [6], [0]),
    "up to the end": ([2, 1], [16, 15], [4, 5], [0, 1]),
    "beyond the end": ([2, 1], [16, 25], [6, 3], [0, 1]),
    "before the beginning": ([2], [-2], [5], [0]),
    "more than the window": ([1], [4], [50], [0]),
    "other slots": ([1, 2, 0], [4, 0, 9], [3, 6, 1], [4, 0, 2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(backend, case, integers, dtype):
    accepted, start, count, slots = (torch.tensor(numbers, dtype=integers) for numbers in CASES[case])
    random = generator(0)
    windows = torch.randn(2, 2, len(slots), 3, 6, 2, 20, generator=random).to(dtype).unbind()
    stored = torch.randn(2, 2, 5, 20, 2, 20, generator=random).to(dtype).unbind()
    expected = by_definition(windows, accepted, start, count, stored, slots)
    fk.keep(*windows, accepted, start, count, *stored, slots=slots)
    assert all(map(torch.equal, stored, expected))


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("size", [16, 80, 128, 256])
def test_sizes(backend, groups, size):
    random = generator(1)
    windows = torch.randn(2, 3, 2, 2, 33, groups, size, generator=random).unbind()
    stored = torch.randn(2, 3, 2, 64, groups, size, generator=random).unbind()
    numbers = torch.tensor([1, 0]), torch.tensor([5, 31]), torch.tensor([33, 32])
    expected = by_definition(windows, *numbers, stored, torch.arange(2))
    fk.keep(*windows, *numbers, *stored)
    assert all(map(torch.equal, stored, expected))


def test_strides(backend):
    """Windows as projections make them, `[B K, G, L, D]` a layer; buffers and numbers with gaps, at odd addresses."""
    layers, batch, drafts, length, groups, size = 2, 2, 3, 6, 2, 16
    random = generator(2)
    projections = torch.randn(2, layers, batch * drafts, groups, length, size, generator=random).bfloat16()
    windows = projections.unflatten(2, (batch, drafts)).transpose(4, 5).unbind()
    wide = torch.zeros(2, groups + 2, batch, 20, layers, size + 3, dtype=torch.bfloat16)[:, 1:-1, ..., 1:-2]
    stored = wide.permute(0, 4, 2, 3, 1, 5).unbind()
    accepted, start, count = torch.tensor([[2, 9, 0], [7, 9, 1], [4, 9, 6]])[:, ::2].unbind()
    expected = by_definition(windows, accepted, start, count, stored, torch.arange(2))
    fk.keep(*windows, accepted, start, count, *stored)
    assert all(map(torch.equal, stored, expected)) and expected[0].any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_to_keep(backend, shape):
    window, stored = torch.ones(*shape, 2, 16), torch.zeros(shape[0], shape[1], 5, 2, 16)
    numbers = torch.zeros(3, shape[1], dtype=torch.int64)
    fk.keep(window, window, *numbers, stored, stored.clone())
    assert not stored.any()


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in backends_with("keep")])
def test_backends_without_it_say_so(name):
    with fk.use_backend(name), pytest.raises(fk.BackendUnavailableError, match=f"backend '{name}' has no keep; "):
        fk.keep(**ARGUMENTS)


def test_opcheck():
    arguments = ARGUMENTS | {"accepted": torch.tensor([1]), "count": torch.tensor([2]), "slots": torch.tensor([2])}
    torch.library.opcheck(torch.ops.freedave.keep.default, tuple(arguments.values()))


def test_compiles_without_graph_breaks(backend):
    """And what is written is written in the compiled function as well."""
    if backend == "triton" and torch.cuda.is_available():
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
def test_a_cuda_graph_holds_it():
    random = generator(3)
    windows = torch.randn(2, 4, 2, 3, 6, 2, 64, generator=random).bfloat16().cuda().unbind()
    stored = torch.zeros(2, 4, 2, 30, 2, 64, dtype=torch.bfloat16, device="cuda").unbind()
    numbers = [torch.zeros(2, dtype=torch.int64, device="cuda") for _ in range(3)]
    with fk.use_backend("triton"):
        fk.keep(*windows, *numbers, *stored)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fk.keep(*windows, *numbers, *stored)
    for tensor, now in zip(numbers, ([2, 1], [3, 27], [5, 6]), strict=True):
        tensor.copy_(torch.tensor(now))
    expected = by_definition(windows, *numbers, stored, torch.arange(2))
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
