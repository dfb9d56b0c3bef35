"""Modules that do their own attention: they get a mask that they honour, and a broken sequence is alone in being broken."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import MASK, OPTIONS, golden_lm, golden_model, prompt
from transformers import PreTrainedModel

import freedave
from freedave.decode.cache_policy import policy_for
from freedave.decode.planned_sequence import PlannedSequence
from freedave.decode.settings import resolve_settings
from freedave.forward.cache import KeyValueCache
from freedave.forward.packed_forward import ForwardBuilder
from freedave.models.diffusion_lm import DiffusionLM


class Wrapper(torch.nn.Module):
    """A transformers model that is not shown to be one."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **arguments):
        return self.inner(**arguments)


class OwnAttention(torch.nn.Module):
    """One layer of attention that takes a bool mask and nothing else; its keys depend on the positions."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens, self.positions = torch.nn.Embedding(64, 32), torch.nn.Embedding(128, 32)
            self.projections = torch.nn.Linear(32, 96)
            self.head = torch.nn.Linear(32, 64)

    def forward(self, input_ids, position_ids, attention_mask, past_key_values, use_cache):
        hidden = 3 * self.tokens(input_ids) + self.positions(position_ids)
        query, key, value = self.projections(hidden)[:, None].chunk(3, -1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        scores = (query @ key.transpose(-1, -2)).masked_fill(attention_mask.logical_not(), float("-inf"))
        return SimpleNamespace(logits=self.head(hidden + (scores.softmax(-1) @ value)[:, 0]))


def inner_model(family: str, implementation: str) -> PreTrainedModel:
    model = copy.deepcopy(golden_model(family))
    model.set_attn_implementation(implementation)
    return model


POLICIES = pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("block_causal", "auto"),
        ("block_causal", "none"),
        ("full", "none"),
        ("full", "dual"),
        ("full_shifted", "prefix"),
    ],
)


@POLICIES
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_any_attention_of_transformers(implementation, family, cache):
    """Tokens and steps are those of the same model with this library's attention, statically and with drafts, in a batch."""
    wrapped = DiffusionLM(Wrapper(inner_model(family, implementation)), MASK, **OPTIONS[family])
    batch = torch.cat([prompt(9, seed) for seed in range(3)])
    visible = torch.ones_like(batch)
    visible[1, :4] = 0
    arguments = {"max_new_tokens": 16, "block_length": 4, "cache": cache, "attention_mask": visible}
    expected = freedave.generate(golden_lm(family), batch, draft_steps=1, **arguments)
    for draft_steps in (1, 8):
        out = freedave.generate(wrapped, batch, draft_steps=draft_steps, **arguments)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.step_map, expected.step_map)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits(implementation):
    """What likelihoods are made of, with a mask and without one."""
    wrapped = DiffusionLM(Wrapper(inner_model("full", implementation)), MASK, attention="full")
    rows, mask = torch.tensor([0, 3, 7]), torch.ones(8, 8).tril().bool()[None, None]
    with torch.inference_mode():
        for visible in (None, mask):
            expected = golden_lm("full").logits(prompt(8), rows, attention_mask=visible)
            ours = wrapped.logits(prompt(8), rows, attention_mask=visible)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "dual")])
def test_a_module_that_takes_bool_masks_only(family, cache):
    lm = DiffusionLM(OwnAttention(), MASK, **OPTIONS[family])
    out = freedave.generate(lm, prompt(6), 16, block_length=4, cache=cache, check_lossless=True)
    if family == "block_causal":  # the same without stored keys
        again = freedave.generate(lm, prompt(6), 16, block_length=4, cache="none", draft_steps=1)
        assert torch.equal(out.sequences, again.sequences) and torch.equal(out.step_map, again.step_map)


def test_a_module_that_ignores_masks_is_refused():
    class Ignores(Wrapper):
        def forward(self, attention_mask, **arguments):
            return self.inner(attention_mask=torch.ones_like(attention_mask, dtype=torch.bool), **arguments)

    lm = DiffusionLM(Ignores(inner_model("full", "sdpa")), MASK, attention="full")
    with pytest.raises(TypeError, match="ignores its 4-D attention_mask"):
        freedave.generate(lm, prompt(), 4)


# ----------------------------------------------------------------------------------------------------- broken sequences

BROKEN = 7  # a token whose embedding is NaN


def broken_lm(family: str, implementation: str) -> DiffusionLM:
    model = inner_model(family, implementation)
    model.get_input_embeddings().weight.data[BROKEN] = float("nan")
    return DiffusionLM(Wrapper(model), MASK, **OPTIONS[family])


def logits_of(lm: DiffusionLM, prompts: list[list[int]], cache: str) -> list[dict[tuple[int, int], torch.Tensor]]:
    """The logits of two forwards, the first and one that reads what it stored, by sequence and position."""
    settings = resolve_settings(lm, 8, 8, draft_steps=2, block_length=4, cache=cache)
    sequences = [PlannedSequence(b, b, tokens, settings, MASK) for b, tokens in enumerate(prompts)]
    block_causal = lm.attention == "block_causal"
    policies = [policy_for(settings, MASK, block_causal=block_causal, logits_shift=False) for _ in sequences]
    store = None if cache == "none" else KeyValueCache(len(prompts), 16)
    for sequence in sequences:
        sequence.open_window(1, settings.lookahead_steps, 1)
    found = []
    for _ in range(2):
        builder = ForwardBuilder(1, 4)
        for b, (sequence, policy) in enumerate(zip(sequences, policies, strict=True)):
            policy.plan(sequence, b, builder)
            sequence.refresh = False
        calls, *_ = builder.build([[0] * 4] * len(prompts), [], torch.device("cpu"), store)
        found.append({})
        for forward, prediction in calls:
            logits = lm.packed_features(forward, prediction.logits_row)
            places = prediction.place.tolist()
            found[-1] |= {divmod(place, 4): row for place, row in zip(places, logits[: len(places)], strict=True)}
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("block_causal", "none"), ("full", "dual")])
@torch.inference_mode()
def test_a_broken_sequence_leaves_the_others_alone(family, cache, broken, implementation):
    """In the forward in which it breaks, and in those that find its keys and values beside their own."""
    lm = broken_lm(family, implementation)
    healthy = [[1, 2, 3, 4, 5, 6, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18]]
    prompts = [tokens.copy() for tokens in healthy]
    prompts[broken][2] = BROKEN
    for found, expected in zip(logits_of(lm, prompts, cache), logits_of(lm, healthy, cache), strict=True):
        assert found.keys() == expected.keys() and len(found) == 8
        for (sequence, position), logits in found.items():
            if sequence == broken:
                assert logits.isnan().all()
            else:
                torch.testing.assert_close(logits, expected[sequence, position], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("block_causal", "none"), ("full", "dual")])
def test_the_broken_sequence_is_named(family, cache, broken):
    batch = torch.tensor([[1, 2, 3, 4, 5, 6, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18]])
    batch[broken, 2] = BROKEN
    with pytest.raises(freedave.NonFiniteLogitsError, match=f"sequence {broken}"):
        freedave.generate(broken_lm(family, "sdpa"), batch, 8, block_length=4, cache=cache)


@torch.inference_mode()
def test_what_a_broken_sequence_left_in_a_slot_is_never_seen():
    """A slot is used again without being cleared."""
    lm, stores = broken_lm("block_causal", "sdpa"), [KeyValueCache(1, 16) for _ in range(2)]

    def forward(store: KeyValueCache, stored: list[int], run: list[int]) -> torch.Tensor:
        """Stores some tokens, and gives the logits of a run that sees them."""
        for tokens, sees in ((stored, 0), (run, len(stored))):
            builder = ForwardBuilder(1, 4)
            begin = builder.add([tokens], sees)
            builder.attend(begin, 1, len(tokens), 0, [(0, sees)])
            builder.store(begin, 0 if sees else len(tokens), 0, 0)
            builder.predict(0, 0, range(4), range(begin, begin + 4))
            [(packed, prediction)], *_ = builder.build([[0] * 4], [], torch.device("cpu"), store)
            logits = lm.packed_features(packed, prediction.logits_row)
        return logits

    assert forward(stores[0], [1, 2, 3, 4, 5, 6, BROKEN, 8], [MASK] * 4).isnan().all()
    used, fresh = (forward(store, [11, 12, 13, 14], [MASK] * 4) for store in stores)
    assert used.isfinite().all()
    torch.testing.assert_close(used, fresh, rtol=1e-5, atol=1e-5)
