"""Up to the last position a model has: a block that would reach beyond is cut short there."""

from __future__ import annotations

import pytest
import torch
from test_decoding import Plain
from tiny_models import MASK, golden_lm, prompt

import freedave
from freedave.decode.decoder import Decoder
from freedave.decode.settings import resolve_settings
from freedave.forward import packed_forward
from freedave.integrations.likelihood import log_likelihood_bound


def limited(positions: int, block_length: int = 32, family: str = "block_causal"):
    lm = golden_lm(family, block_length=block_length)
    lm.max_positions = positions
    return lm


def test_example():
    """An answer that fits is decoded, though its last block does not fit as a whole."""
    lm, seen = limited(60), []
    hook = lm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    try:
        out = freedave.generate(lm, prompt(30), 30, check_lossless=True)
    finally:
        hook.remove()
    assert (out.step_map >= 0).all() and not (out.sequences == MASK).any()
    assert max(seen) == 59
    assert out.static.num_forwards == 30
    with pytest.raises(ValueError, match=r"the prompt \(31 tokens\) and max_new_tokens \(30\) need 61 positions, but"):
        freedave.generate(lm, prompt(31), 30)


@pytest.mark.parametrize("joined_keys", [0, 128])
@pytest.mark.parametrize(
    "options",
    [{}, {"tokens_per_step": 3}, {"threshold": 0.1}, {"lookahead_steps": 2}, {"order": "left_to_right"}],
    ids=str,
)
@pytest.mark.parametrize(("positions", "start", "block_length"), [(61, 21, 8), (33, 8, 32), (63, 32, 16), (30, 29, 4)])
def test_lossless_and_exact(monkeypatch, positions, start, block_length, options, joined_keys):
    """With a cache and without, which computes every position in every forward; natively and under explicit masks."""
    monkeypatch.setattr(packed_forward, "JOINED_KEYS", joined_keys)
    lm = limited(positions, block_length)
    plain = freedave.DiffusionLM(Plain(lm.model), MASK, block_length=block_length)
    plain.max_positions = positions
    new = positions - start
    first = freedave.generate(lm, prompt(start), new, 1, cache="none", **options)
    for model, cache in ((lm, "auto"), (lm, "none"), (plain, "auto")):
        for draft_steps in (1, 3, 8):
            out = freedave.generate(model, prompt(start), new, draft_steps, cache=cache, **options)
            assert torch.equal(out.sequences, first.sequences) and torch.equal(out.step_map, first.step_map)
            assert out.num_forwards <= first.num_forwards
        assert out.sequences.shape[1] == positions


def test_sequences_of_any_length_share_a_batch():
    lm = limited(45, 16)
    settings = resolve_settings(lm, 1, 20, draft_steps=4)
    engine = Decoder(lm, settings, slots=3, capacity=45)
    starts = [25, 3, 20]
    sequences = [engine.add(prompt(start, start)[0].tolist()) for start in starts]
    while engine.sequences:
        engine.launch()
        engine.poll()
    for start, sequence in zip(starts, sequences, strict=True):
        alone = freedave.generate(lm, prompt(start, start), 20, draft_steps=1)
        assert sequence.generated(sequence.tokens) == alone.sequences[0, start:].tolist()
        assert sequence.generated(sequence.step_map) == alone.step_map[0].tolist()


def test_a_likelihood_covers_what_is_decoded():
    """The last block as it would be decoded; a text that does not fit is refused."""
    lm = limited(30, 16)
    text = prompt(30)[0].tolist()
    bound = log_likelihood_bound(lm, text[:29], text[29:], samples=1)
    state = torch.tensor([[*text[:29], MASK]])
    blocks = torch.arange(30) // 16
    with torch.inference_mode():
        logits = lm.model(state, attention_mask=(blocks[:, None] >= blocks)[None, None]).logits[0, 29]
    assert bound == pytest.approx(float(logits.log_softmax(-1)[text[29]]), rel=1e-5)
    with pytest.raises(ValueError, match="the text needs 31 positions, but the model has 30"):
        log_likelihood_bound(lm, text, [1])
