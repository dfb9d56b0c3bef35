"""The likelihood bound of a masked-diffusion model: against every order of decoding, and against the plain definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import MASK, golden_lm, golden_model

import freedave
from freedave.forward.attention import block_causal_mask
from freedave.integrations.likelihood import log_likelihood_bound, noise

CONTEXT, CONTINUATION = [3, 14, 15, 9, 26], [5, 35, 8, 9]
MODELS = ["block_causal", "full", "full_shifted"]


def log_probability(family: str, state: list[int], position: int, token_id: int) -> float:
    """What the model gives `token_id` at a masked position, by a plain forward of its own."""
    lm = golden_lm(family)
    mask = torch.ones(1, 1, len(state), len(state), dtype=torch.bool)
    if lm.attention == "block_causal":
        mask = block_causal_mask(len(state), 4, torch.device("cpu"))
    with torch.inference_mode():
        logits = golden_model(family)(torch.tensor([state]), attention_mask=mask).logits[0]
    return float(logits[position - (family == "full_shifted")].double().log_softmax(-1)[token_id])


def mean_over_orders(family: str, text: list[int], first: int, last: int, end: int) -> float:
    """The log-probability of decoding positions first ... last - 1 one by one, averaged over all orders."""
    total = 0.0
    orders = list(itertools.permutations(range(first, last)))
    for order in orders:
        state = [*text[:first], *[MASK] * (end - first)]
        for position in order:
            total += log_probability(family, state, position, text[position])
            state[position] = text[position]
    return total / len(orders)


@pytest.mark.parametrize("family", MODELS)
def test_the_bound_is_the_mean_over_all_orders_of_decoding(family: str) -> None:
    """The identity behind the estimator; with all 15 subsets of 4 tokens within the samples, it is exact."""
    text = CONTEXT + CONTINUATION
    if family == "block_causal":  # blocks of 4: tokens 5 to 7 of the second, token 8 of the third
        expected = mean_over_orders(family, text, 5, 8, 8) + mean_over_orders(family, text, 8, 9, 12)
    else:
        expected = mean_over_orders(family, text, 5, 9, 9)
    bound = log_likelihood_bound(golden_lm(family), CONTEXT, CONTINUATION, samples=15, batch_size=4)
    assert bound == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_sampling_agrees_with_enumeration(family: str) -> None:
    lm = golden_lm(family, **({"block_length": 8} if family == "block_causal" else {}))
    exact = log_likelihood_bound(lm, CONTEXT[:1], CONTINUATION, samples=15)
    sampled = [log_likelihood_bound(lm, CONTEXT[:1], CONTINUATION, samples=14, seed=seed) for seed in range(100)]
    error = torch.tensor(sampled).std() / math.sqrt(len(sampled))
    assert len(set(sampled)) > 50
    assert float(torch.tensor(sampled).mean()) == pytest.approx(exact, abs=4 * float(error))


@pytest.mark.parametrize(("length", "samples"), [(1, 1), (1, 128), (3, 7), (5, 16), (10, 10), (40, 16), (40, 128)])
def test_noise_is_unbiased(length: int, samples: int) -> None:
    """Each position weighs 1 on average, which the bound of a model of independent tokens needs: exactly when enumerated."""
    seeds = 1 if 2**length - 1 <= samples else 400
    weights = []
    for seed in range(seeds):
        drawn = noise(length, samples, seed)
        assert bool(drawn.masked.any(dim=1).all())
        assert len(drawn.masked) <= samples
        weights.append((drawn.masked * drawn.weight[:, None]).sum(dim=0))
    mean = torch.stack(weights).mean(dim=0)
    if seeds == 1:
        assert mean.tolist() == pytest.approx([1.0] * length)
    else:
        # Whatever the sizes drawn, the weights of a sample's positions sum to n / samples.
        assert torch.stack(weights).sum(dim=1).tolist() == pytest.approx([float(length)] * seeds, rel=1e-5)
        spread = torch.stack(weights).std(dim=0) / math.sqrt(seeds)
        assert bool(((mean - 1).abs() < 5 * spread).all())


def test_the_same_noise_for_equal_arguments() -> None:
    assert torch.equal(noise(30, 16, seed=1).masked, noise(30, 16, seed=1).masked)
    assert not torch.equal(noise(30, 16, seed=1).masked, noise(30, 16, seed=2).masked)


def test_sizes_are_spread_over_all_lengths() -> None:
    sizes = noise(20, 60, seed=0).masked.sum(dim=1)
    assert torch.bincount(sizes, minlength=21).tolist() == [0, *[3] * 20]


def test_one_token_has_its_probability() -> None:
    state = [*CONTEXT, MASK]
    bound = log_likelihood_bound(golden_lm("full"), CONTEXT, [7], samples=1)
    assert bound == pytest.approx(log_probability("full", state, 5, 7), rel=1e-5)


def test_batches_of_samples_do_not_matter() -> None:
    arguments = (golden_lm("block_causal"), CONTEXT, [*CONTINUATION, *CONTEXT])
    bounds = [log_likelihood_bound(*arguments, samples=13, batch_size=size) for size in (1, 5, 64)]
    assert bounds == pytest.approx([bounds[0]] * 3, rel=1e-6)


def test_the_embedded_model_prefers_what_is_right() -> None:
    lm = freedave.load_model("demo")
    right = "2+5+0:07 9+1+0:10 3+7+1:11 8+7+1:16 4+0+1:05 #056107"
    wrong = "2+5+0:07 9+1+0:10 3+7+1:12 8+7+1:16 4+0+1:05 #056207"
    bounds = [
        log_likelihood_bound(lm, *(lm.tokenizer(text)["input_ids"] for text in ("48392+7715=", answer)), samples=16)
        for answer in (right, wrong)
    ]
    assert bounds[0] > -1
    assert bounds[1] < bounds[0] - 5


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        (CONTEXT, [], "the continuation is empty"),
        (CONTEXT, [MASK], "holds the mask token"),
        ([MASK], [1], "holds the mask token"),
        ([1] * 600, [1], "positions, but the model has"),
    ],
)
def test_bad_texts(context: list[int], continuation: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihood_bound(golden_lm("block_causal"), context, continuation)
