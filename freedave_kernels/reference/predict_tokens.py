"""predict_tokens in plain PyTorch, in float64."""

from __future__ import annotations

import torch

from freedave_kernels.contract import LARGEST_LOG_ODDS
from freedave_kernels.reference.sampling import token_noise
from freedave_kernels.single_logits import scale_of

NEVER = float("-inf")


def predict_tokens(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    mask_index: torch.Tensor | None,
    measure: str,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
    temperature: torch.Tensor | None,
    seed: torch.Tensor | None,
    positions: torch.Tensor | None,
    floor: torch.Tensor | None,
    scored_ids: torch.Tensor | None,
    suppress: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    masked = input_ids == mask_token_id if mask_index is None else mask_index
    vocab = logits.shape[-1]
    x = logits_to_choose_from(logits, suppress_tokens, logits_shift, temperature, floor)
    whole = x if suppress == "exclude" else logits_to_choose_from(logits, None, logits_shift, temperature, floor)

    noisy = x
    if temperature is not None:
        assert seed is not None and positions is not None
        noise = token_noise(seed, positions, 0, vocab)
        noisy = x.float() + noise.masked_fill(~(temperature > 0)[..., None], 0.0)
    vocabulary = torch.arange(vocab, device=x.device)
    # The lowest id among equal logits.
    token = torch.where(noisy == noisy.amax(-1, keepdim=True), vocabulary, vocab).amin(-1)
    top = whole.amax(-1, keepdim=True)  # NaN wherever the row has one
    usable = masked & top.squeeze(-1).isfinite() & x.amax(-1).isfinite()

    # Differences to the top; a row that is not usable is replaced so that no NaN travels on.
    x, whole = (torch.where(usable[..., None], each - top, 0.0) for each in (x, whole))
    confidence = {
        "prob": lambda: _prob(whole, token),
        "margin": lambda: _margin(x, whole, token),
        "neg_entropy": lambda: _neg_entropy(whole),
        "log_odds": lambda: _log_odds(whole, token),
    }[measure]()
    token_ids, confidence = torch.where(usable, token, input_ids), torch.where(usable, confidence.float(), NEVER)
    if scored_ids is None:
        return token_ids, confidence, confidence.new_empty(0)
    known = usable & (scored_ids >= 0)
    log_probs = torch.where(scored_ids < vocab, _of(scored_ids.clamp(min=0), whole), NEVER) - whole.exp().sum(-1).log()
    return token_ids, confidence, torch.where(known, log_probs, torch.nan).float()


def logits_to_choose_from(
    logits: torch.Tensor,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
    temperature: torch.Tensor | None,
    floor: torch.Tensor | None,
) -> torch.Tensor:
    """In float64, each position's own row, suppressed tokens and those below the floor at -inf. Those divided by a
    temperature are float32 before.
    """
    if logits_shift:
        rows = (torch.arange(logits.shape[-2], device=logits.device) - 1).clamp(min=0)
        logits = logits[..., rows, :]
    x = logits.double() if temperature is None else (logits.float() * scale_of(temperature)[..., None]).double()
    if floor is not None:
        x = x.masked_fill(logits.float() < floor[..., None], NEVER)
    return x if suppress_tokens is None else x.masked_fill(suppressed_tokens(suppress_tokens, x.shape[-1]), NEVER)


def suppressed_tokens(token_ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """`[V]` bool; ids outside the vocabulary mean nothing."""
    inside = torch.where((token_ids >= 0) & (token_ids < vocab), token_ids, vocab)  # the rest goes to a spare entry
    flags = torch.zeros(vocab + 1, dtype=torch.bool, device=token_ids.device)
    return flags.scatter(0, inside, True)[:vocab]


def _prob(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return _of(token, x).exp() / x.exp().sum(-1)


def _of(token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.gather(-1, token.clamp(max=x.shape[-1] - 1)[..., None]).squeeze(-1)


def _margin(x: torch.Tensor, whole: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The second is one of those that may be chosen, `x`."""
    first, second = _of(token, x), _others(x, token).amax(-1)
    # p1 - p2 = exp(first) (1 - exp(second - first)) / sum, without the cancellation of the plain difference.
    return -torch.expm1(second - first) * first.exp() / whole.exp().sum(-1)


def _others(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return x.scatter(-1, token.clamp(max=x.shape[-1] - 1)[..., None], NEVER)


def _log_odds(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return log_odds_of(_of(token, x), _others(x, token).exp().sum(-1))


def log_odds_of(logit: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of a token, all others of which together weigh `others`."""
    return (logit - others.log()).clamp(max=LARGEST_LOG_ODDS)


def _neg_entropy(x: torch.Tensor) -> torch.Tensor:
    # sum p log p = (sum e^x x) / sum e^x - log sum e^x. The terms at the top are counted apart from the rest: next to a 1,
    # the rest of a confident row would lose its digits, and it is all that the entropy consists of.
    weight = x.exp()
    tops = (x == 0).sum(-1)
    rest = torch.where(x < 0, weight, 0.0).sum(-1)
    weighted = torch.where(weight > 0, weight * x, 0.0).sum(-1)
    return weighted / (tops + rest) - (tops.double().log() + torch.log1p(rest / tops))
