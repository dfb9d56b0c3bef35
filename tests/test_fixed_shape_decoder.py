"""Steps of one shape: lossless, nothing read back, everything in the same tensors."""

from __future__ import annotations

import pytest
import torch
from tiny_models import golden_lm, golden_model, prompt
from torch.utils._python_dispatch import TorchDispatchMode

import freedave
from freedave.fixed_shape_decoder import FixedShapeDecoder, window_blocks
from freedave.settings import Settings, resolve_settings

LENGTHS = [3, 12, 8, 5]


def settings_for(lm, draft_steps: int, **options) -> Settings:
    return resolve_settings(lm, prompt_length=1, max_new_tokens=16, draft_steps=draft_steps, **options)


def decoder_for(lm, draft_steps: int, slots: int = len(LENGTHS), blocks: int | None = None, **options):
    return FixedShapeDecoder(lm, settings_for(lm, draft_steps, **options), slots=slots, capacity=40, blocks=blocks)


def test_example():
    """Four prompts of different lengths advance together until each is done."""
    lm = golden_lm()
    decoder = decoder_for(lm, draft_steps=4)
    for slot, length in enumerate(LENGTHS):
        decoder.add(slot, prompt(length, slot)[0].tolist())
    while not all(decoder.poll()):
        decoder.step()
    for slot, length in enumerate(LENGTHS):
        static = freedave.generate(lm, prompt(length, slot), max_new_tokens=16, draft_steps=1)
        assert torch.equal(decoder.tokens[slot, : length + 16], static.sequences[0])
        assert torch.equal(decoder.step_map[slot, length : length + 16], static.step_map[0])


FAMILIES = pytest.mark.parametrize("family", ["block_causal", "full", "full_shifted"])


@FAMILIES
@pytest.mark.parametrize(
    "options",
    [{}, {"drafting": "nested"}, {"tokens_per_step": 2}, {"threshold": 0.1}, {"order": "left_to_right"}, {"blocks": 1}],
    ids=str,
)
@pytest.mark.parametrize("draft_steps", [1, 3, 8])
@pytest.mark.parametrize("block_length", [4, 8])
def test_lossless_and_in_as_few_forwards(family, block_length, draft_steps, options):
    """The forwards are those of the planned decoder, as far as the window shows all that its drafts can reach."""
    lm = golden_lm(family, block_length=block_length)
    decoder = decoder_for(lm, draft_steps, **options)
    for slot, length in enumerate(LENGTHS):
        decoder.add(slot, prompt(length, slot)[0].tolist())
    while not all(decoder.poll()):
        decoder.step()
    common = {name: value for name, value in options.items() if name != "blocks"}
    for slot, length in enumerate(LENGTHS):
        new = slice(length, length + 16)
        static = freedave.generate(lm, prompt(length, slot), max_new_tokens=16, draft_steps=1, **common)
        assert torch.equal(decoder.tokens[slot, new], static.sequences[0, length:])
        assert torch.equal(decoder.step_map[slot, new], static.step_map[0])
        planned = freedave.generate(lm, prompt(length, slot), max_new_tokens=16, draft_steps=draft_steps, **common)
        if "blocks" not in options:
            assert int(decoder.forward_map[slot, new].max()) < planned.num_forwards


@FAMILIES
def test_slots_are_used_again(family):
    lm = golden_lm(family, block_length=4)
    decoder = decoder_for(lm, draft_steps=4, slots=2)
    waiting = [(length, seed) for seed, length in enumerate((9, 4, 6, 1))]
    running: dict[int, tuple[int, int]] = {}
    while waiting or running:
        for slot, done in enumerate(decoder.poll()):
            if done and slot in running:
                length, seed = running.pop(slot)
                alone = freedave.generate(lm, prompt(length, seed), max_new_tokens=16, draft_steps=1)
                assert torch.equal(decoder.tokens[slot, : length + 16], alone.sequences[0])
            if done and waiting:
                running[slot] = waiting.pop(0)
                decoder.add(slot, prompt(*running[slot])[0].tolist())
        decoder.step()


@FAMILIES
def test_end_of_sequence(family):
    """A finished block that contains the token ends the slot, though not one in the prompt; drafts may have run ahead."""
    lm = golden_lm(family, block_length=4)
    whole = freedave.generate(lm, prompt(10), max_new_tokens=16, draft_steps=1).sequences[0]
    for end in (whole[9], whole[10], whole[13]):
        first = next((i for i in range(10, 26) if whole[i] == end), 25)
        blocks = (
            8 if family == "block_causal" else 10
        )  # of a prompt of 10, which begins in the midst of a block, or does not
        ended = min(first - (first - blocks) % 4 + 4, 26)
        decoder = decoder_for(lm, 4, slots=1, eos_token_id=int(end))
        decoder.add(0, whole[:10].tolist())
        while not all(decoder.poll()):
            decoder.step()
        assert torch.equal(decoder.tokens[0, :ended], whole[:ended])
        assert bool((decoder.tokens[0, :26] == lm.mask_token_id).any()) == (ended <= 16)


class OneShape(TorchDispatchMode):
    """Records every operation with its shapes; fails where a result is read back or a shape depends on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} reads back from the device"
        out = function(*args, **(kwargs or {}))
        self.operations.append((name, [t.shape for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]))
        return out


@FAMILIES
def test_a_step_can_be_captured(family):
    """Every step runs the same operations on the same shapes, reads nothing back, and keeps its state in place."""
    decoder = decoder_for(golden_lm(family, block_length=4), draft_steps=4)
    for slot in (0, 1, 3):
        decoder.add(slot, prompt(LENGTHS[slot], slot)[0].tolist())
    decoder.step()  # allocates
    state = ("tokens", "step_map", "forward_map", "drafts", "num_drafts", "start", "end", "steps_taken", "done")
    addresses = [getattr(decoder, name).data_ptr() for name in state]
    recorded = []
    for _ in range(3):
        with OneShape() as mode:
            decoder.step()
        recorded.append(mode.operations)
    assert len(recorded[0]) > 50 and recorded[0] == recorded[1] == recorded[2]
    assert addresses == [getattr(decoder, name).data_ptr() for name in state]


def test_a_last_block_may_be_shorter_and_answers_of_any_length():
    """With full attention blocks begin where the prompt ends; one block may be the whole answer."""
    for block_length in (None, 5):
        lm = golden_lm("full", block_length=block_length)
        decoder = decoder_for(lm, 3, slots=2)
        for slot, (length, new) in enumerate([(7, 13), (4, 6)]):
            decoder.add(slot, prompt(length, slot)[0].tolist(), new)
        while not all(decoder.poll()):
            decoder.step()
        for slot, (length, new) in enumerate([(7, 13), (4, 6)]):
            block = block_length or 16  # as the settings of this decoder resolved it
            static = freedave.generate(lm, prompt(length, slot), new, draft_steps=1, block_length=block)
            assert torch.equal(decoder.tokens[slot, : length + new], static.sequences[0])
            assert torch.equal(decoder.step_map[slot, length : length + new], static.step_map[0])


def test_window_blocks():
    lm = golden_lm()
    assert [window_blocks(settings_for(lm, steps)) for steps in (1, 2, 4, 8, 16)] == [2, 2, 3, 5, 5]
    whole = golden_lm("full")  # one block is the answer
    assert window_blocks(settings_for(whole, 8)) == window_blocks(settings_for(whole, 8, threshold=0.5)) == 1


def test_what_is_wrong_is_named():
    lm = golden_lm()
    decoder = decoder_for(lm, 2, slots=1)
    with pytest.raises(ValueError, match="need 56 positions, but a slot has 40"):
        decoder.add(0, [1] * 40)
    decoder.add(0, [1, 2, 3])
    with pytest.raises(RuntimeError, match="slot 0 is in use"):
        decoder.add(0, [1])
    decoder.drop(0)
    assert decoder.poll() == [True]
    with pytest.raises(
        ValueError, match="cache='dual' refreshes in a forward of another shape; use 'none', or Decoder"
    ):
        decoder_for(golden_lm("full"), 2, cache="dual")
    with pytest.raises(ValueError, match="need a transformers model"):
        decoder_for(freedave.DiffusionLM(torch.nn.Linear(1, 1), 63, block_length=4), 2)
    with pytest.raises(ValueError, match="end at one eos_token_id"):
        decoder_for(lm, 2, eos_token_id=[1, 2])
    model = golden_model("block_causal")
    kept = model.model.embed_tokens.weight[7].clone()
    try:
        model.model.embed_tokens.weight.data[7] = float("nan")
        decoder.add(0, [1, 7, 3])
        decoder.step()
        with pytest.raises(freedave.NonFiniteLogitsError, match="slot 0: the logits of position 3 are not finite"):
            decoder.poll()
    finally:
        model.model.embed_tokens.weight.data[7] = kept
