"""A step of the graph executor as a device sees it: the same few operations every time, nothing read back, state in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from test_graph_executor import EXACT, FAMILIES, REFRESHED, ids, settings_for
from tiny_models import MASK, OPTIONS, golden_lm
from torch.utils._python_dispatch import TorchDispatchMode

from freedave import DiffusionLM
from freedave.decode.decoder import Decoder
from freedave.decode.graph_executor import GraphExecutor

MOST_CALLS = 40


def is_view(function: Any) -> bool:
    """Whether an operation only says otherwise what lies where."""
    if function is torch.ops.aten._unsafe_view.default:
        return True
    schema = function._schema
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    return not writes and any(result.alias_info is not None for result in schema.returns)


class Recorder(TorchDispatchMode):
    """Every operation with the shapes of its results, and apart from them those between the model's own modules. Fails where
    a result is read back or a shape depends on data.
    """

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal")

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[torch.Size]]] = []
        self.between: list[str] = []
        self._modules = modules
        self._inside = 0
        self._whole: set[Any] = set()

    def count(self, name: str) -> int:
        return sum(operation == name for operation, _ in self.operations)

    @contextmanager
    def recording(self) -> Iterator[None]:
        def enter(*_: Any) -> None:
            self._inside += 1

        def leave(*_: Any) -> None:
            self._inside -= 1

        hooks = [module.register_forward_pre_hook(enter) for module in self._modules]
        hooks += [module.register_forward_hook(leave) for module in self._modules]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in self._whole:  # in inference mode, what is made of other operations arrives as one
            with self:
                parts = function.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
            self._whole.add(function)
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} reads back from the device"
        out = function(*args, **(kwargs or {}))
        shapes = [leaf.shape for leaf in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(leaf)]
        self.operations.append((name, shapes))
        if not self._inside and not is_view(function):
            self.between.append(name)
        return out


def under_way(lm: DiffusionLM, slots: int, draft_steps: int, requests: int, **options: Any) -> Decoder:
    """A decode whose next step is one of all slots together, of a shape that has run."""
    engine = Decoder(lm, settings_for(lm, draft_steps, new=64, **options), slots=slots, capacity=96)
    for seed in range(requests):
        engine.add(ids(9 + seed % 3, seed))
    while engine.forwards < 3 or any(sequence.waits for sequence in engine.sequences):
        engine.launch()
        engine.poll()
    assert engine.sequences
    return engine


def recorded_launch(lm: DiffusionLM, engine: Decoder) -> Recorder:
    recorder = Recorder([lm.model.model, lm.model.lm_head])
    assert lm.has_plain_head
    with recorder.recording():
        engine.launch()
    return recorder


def executor_of(engine: Decoder) -> GraphExecutor:
    assert isinstance(engine._executor, GraphExecutor)
    return engine._executor


STATE = ("tokens", "drafts", "num_drafts", "start", "begin", "length", "prompt_length", "steps_taken", "noise")
STEP_OPS = {"recycled": "draft_step", "pooled": "pooled_step"}
DRAFTINGS = pytest.mark.parametrize("drafting", STEP_OPS)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.0, 0.8])


@TEMPERATURES
@DRAFTINGS
@FAMILIES
def test_example(family, cache, drafting, temperature):
    """Steps of a shape run the same operations on the same shapes, read nothing back and keep their state in place; one of
    four slots is empty.
    """
    lm = golden_lm(family, block_length=16)
    engine = under_way(lm, 4, 4, requests=3, cache=cache, drafting=drafting, temperature=temperature)
    executor = executor_of(engine)
    addresses = [getattr(executor.state, name).data_ptr() for name in STATE]
    stored = [part.data_ptr() for part in executor.state.stored]
    pool = executor.state.pool and executor.state.pool.memory.data_ptr()
    records: dict[str, list[Recorder]] = {}
    for _ in range(6):
        before = executor.shapes
        recorder = recorded_launch(lm, engine)
        ran = [shape for shape, runs in executor.shapes.items() if runs > before.get(shape, 0)]
        if len(ran) == 1 and ran[0] in before:  # nobody had a forward of its own, and the shape has its buffers
            records.setdefault(ran[0], []).append(recorder)
        engine.poll()
    several = [group for group in records.values() if len(group) > 1]
    assert several and all(shape.startswith("step: 4 x 4 drafts") for shape in records)
    for group in several:
        assert len(group[0].operations) > 50
        assert all(recorder.operations == group[0].operations for recorder in group)
    assert addresses == [getattr(executor.state, name).data_ptr() for name in STATE]
    assert stored == [part.data_ptr() for part in executor.state.stored]
    assert pool == (executor.state.pool and executor.state.pool.memory.data_ptr())


@TEMPERATURES
@DRAFTINGS
@FAMILIES
def test_a_sequences_own_forward_reads_nothing_back(family, cache, drafting, temperature):
    """That with a prompt, or of a block that is new, beside the step of the others."""
    lm = golden_lm(family, block_length=16)
    engine = under_way(lm, 3, 4, requests=1, cache=cache, drafting=drafting, temperature=temperature)
    engine.add(ids(20, 5))
    own = recorded_launch(lm, engine)
    engine.poll()
    assert own.count(STEP_OPS[drafting]) == (1 if cache == "none" else 2)


@pytest.mark.parametrize("slots", [1, 8])
@DRAFTINGS
@FAMILIES
def test_ops_of_a_step(family, cache, drafting, slots):
    """`draft_attention` once a layer, everything else once a step; `keep` where keys and values are kept at each step."""
    lm = golden_lm(family, block_length=16)
    recorder = recorded_launch(lm, under_way(lm, slots, 8, requests=slots, cache=cache, drafting=drafting))
    assert recorder.count("draft_attention") == 2
    assert recorder.count("keep") == ((family, cache) == ("block_causal", "auto"))
    assert recorder.count("predict_tokens") == recorder.count(STEP_OPS[drafting]) == 1


def deep_lm(family: str, layers: int) -> DiffusionLM:
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiffusionLM(transformers.Qwen3ForCausalLM(config), MASK, **OPTIONS[family])


@TEMPERATURES
@DRAFTINGS
@pytest.mark.parametrize(("family", "cache"), [*EXACT, *REFRESHED])
def test_few_calls_between_two_forwards(family, cache, drafting, temperature):
    """No more for many layers, sequences or drafts: 40 at most, each of which a device would have to be asked for."""
    calls = {}
    for layers in (2, 6):
        lm = deep_lm(family, layers)
        for slots in (1, 8):
            for draft_steps in (2, 8):
                options = {"block_length": 16, "cache": cache, "drafting": drafting, "temperature": temperature}
                engine = under_way(lm, slots, draft_steps, requests=slots, **options)
                recorder = recorded_launch(lm, engine)
                assert recorder.count("draft_attention") == layers
                calls[layers, slots, draft_steps] = recorder.between
    first = calls[2, 1, 2]
    assert len(first) <= MOST_CALLS and all(each == first for each in calls.values())
