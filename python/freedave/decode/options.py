"""The decoding options: how to decode, whatever is decoded. Each one's name, default, kind, check and help stand here, once.

`generate`, the command line, lm-evaluation-harness and transformers' `generate` take them by these names. The command line
reads this module before torch is imported, which takes seconds; so the checks, which need it, import when they run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Kind(Protocol):
    """What an option's values are."""

    def checked(self, name: str, value: Any) -> Any:
        """The value as it is used; raises TypeError or ValueError naming the option."""


@dataclass(frozen=True)
class WholeNumber:
    """An integer of at least 1, of Python, NumPy or a tensor."""

    def checked(self, name: str, value: Any) -> int:
        from freedave.integers import as_int

        return as_int("generate", name, value, minimum=1)


@dataclass(frozen=True)
class WholeNumberOrAuto:
    """An integer of at least 1, or "auto"."""

    def checked(self, name: str, value: Any) -> Any:
        if isinstance(value, str):
            if value != "auto":
                raise ValueError(f"generate: {name} must be 'auto' or an integer of at least 1, got {value!r}")
            return value
        return WholeNumber().checked(name, value)


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    words: tuple[str, ...]

    def checked(self, name: str, value: Any) -> str:
        from freedave_kernels.arguments import expect_choice

        expect_choice("generate", name, value, self.words)
        return str(value)


@dataclass(frozen=True)
class Threshold:
    """A number to compare confidences with."""

    def checked(self, name: str, value: Any) -> float:
        from freedave_kernels.arguments import expect_threshold

        expect_threshold("generate", value)
        return value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Temperature:
    """0, or what logits are divided by."""

    def checked(self, name: str, value: Any) -> float:
        from freedave_kernels.arguments import expect_temperature

        expect_temperature("generate", value)
        return float(value)


@dataclass(frozen=True)
class Share:
    """A number above 0, at most 1."""

    def checked(self, name: str, value: Any) -> float:
        from freedave_kernels.arguments import expect_share

        expect_share("generate", name, value)
        return float(value)


@dataclass(frozen=True)
class Seed:
    """An integer of at least 0, of at most 63 bits."""

    def checked(self, name: str, value: Any) -> int:
        from freedave.integers import as_int

        return as_int("generate", name, value, minimum=0)


@dataclass(frozen=True)
class Switch:
    """True or False."""

    def checked(self, name: str, value: Any) -> bool:
        if value not in (True, False):
            raise TypeError(f"generate: {name} must be True, False or None, got {value!r}")
        return bool(value)


def _option(default: Any, kind: Kind, help: str, letter: str | None = None) -> Any:
    """A field; `letter` stands for its value where its usage is written."""
    return field(default=default, metadata={"kind": kind, "help": help, "letter": letter})


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode. An option whose default is None may be None: then the model, or another option, decides.

    Args:
        draft_steps: K, drafts a forward verifies; 1 is static decoding. "auto": in each forward as many, 1 to 16, and as long
            a lookahead, as the seconds of the forwards so far and the drafts accepted so far say is fastest; what is chosen
            changes no token. The graph executor chooses among 1, 2, 4, 8 and 16, each a shape that is made where it pays.
        block_length: None: the model's own (full attention without one: the whole answer is one block). Blocks are aligned
            at position 0 for block-causal models and at the end of the prompt for full attention.
        tokens_per_step: positions that one static step commits.
        order: "confidence" or "left_to_right".
        measure: what positions are ranked by, as `freedave_kernels.predict_tokens` has it. "log_odds": the predicted token's
            probability, in the order of float64, which is LLaDA's. "prob": the same in float32, of which many are 1.0, where
            the lowest position comes first. "margin", "neg_entropy": Dream's other algorithms. None: what `rule` needs,
            "log_odds" where it needs nothing else.
        threshold: a static step commits every position of the block whose token has at least this probability (so it needs
            "prob" or "log_odds"); if there is none, `tokens_per_step` positions.
        rule: what the threshold bounds, as `freedave_kernels.select_transfer` has it. "threshold": as above. "strict": such
            probabilities must exceed it. "factor": Fast-dLLM's, of which it is the factor; needs "prob". "entropy_bound":
            SDAR's, of which it is the bound; needs "neg_entropy".
        temperature: above 0, tokens are drawn from softmax(logits / temperature), each position's with noise that follows
            from `seed`, the sequence and the position: the same at every step, whatever is drafted. So static decoding with
            the same seed draws the same. Confidences are those of the drawn tokens ("prob" or "log_odds").
        seed: of the noise, at least 0; sequences of a batch have keys of their own. None: another one with each call, from
            torch's generator.
        top_k: with a temperature, tokens are drawn from so many of the likeliest. Confidences are then probabilities among
            what is drawn from, here and with the next two; ties stay, as `freedave_kernels.logit_floor` says. None: from all.
        top_p: from the fewest tokens, of those that `top_k` leaves, whose probabilities reach it, the likeliest first.
        min_p: from tokens with at least so large a part of the likeliest token's probability.
        drafting: how drafts are made. "nested": as published. "recycled": from rejected drafts' predictions as well.
            "pooled": forwarded states are kept, so that none is forwarded twice. "pipelined": so, and drafts of later blocks
            are among them (where a cache is refreshed once a block there are none: it is "pooled" then).
        lookahead_steps: for how many of its next steps each draft is prepared with predictions; None: for all
            `draft_steps`, which takes the fewest forwards. Less leaves out following blocks that few drafts get to: many
            fewer positions are computed for a few more forwards, which is faster where compute is scarce (a CPU).
        cache: "auto" (exact for block-causal models, none for full attention), "none", or for full attention "prefix" or
            "dual": approximations that refresh the cache once a block (`cache_policy.py`). They are part of static decoding.
        executor: "planned": the host plans each forward so that it computes least. "graph": steps of fixed shapes, which CUDA
            graphs hold on a GPU, launch least. "auto": "graph" on a GPU, "planned" elsewhere and for modules that are not
            transformers models. Both commit what static decoding commits.
        compile: whether the graph executor's layers go through torch.compile; None: on a GPU. A new shape then takes seconds.

    Raises:
        TypeError, ValueError: naming the option.
    """

    draft_steps: int | Literal["auto"] = _option("auto", WholeNumberOrAuto(), "drafts a forward, or auto", "K")
    block_length: int | None = _option(None, WholeNumber(), "(default: the model's)", "L")
    tokens_per_step: int = _option(1, WholeNumber(), "positions that one static step commits", "N")
    order: str = _option("confidence", Choice(("confidence", "left_to_right")), "which positions a static step commits")
    measure: str | None = _option(
        None,
        Choice(("prob", "log_odds", "margin", "neg_entropy")),
        "what positions are ranked by (default: log_odds, or what the rule needs)",
    )
    threshold: float | None = _option(None, Threshold(), "a step commits all tokens this confident", "P")
    rule: str = _option(
        "threshold",
        Choice(("threshold", "strict", "factor", "entropy_bound")),
        "what the threshold bounds: factor is Fast-dLLM's, entropy_bound SDAR's",
    )
    temperature: float = _option(0.0, Temperature(), "draw tokens from softmax(logits / T); 0: the likeliest", "T")
    seed: int | None = _option(None, Seed(), "of the draws (default: another one each time)", "S")
    top_k: int | None = _option(None, WholeNumber(), "draw from the N likeliest tokens", "N")
    top_p: float | None = _option(None, Share(), "draw from the fewest tokens whose probabilities reach P", "P")
    min_p: float | None = _option(None, Share(), "draw from tokens with this part of the likeliest's probability", "P")
    drafting: str = _option(
        "pooled",
        Choice(("recycled", "nested", "pooled", "pipelined")),
        "nested is as published; pooled takes fewer forwards, pipelined fewest",
    )
    lookahead_steps: int | None = _option(
        None,
        WholeNumber(),
        "compute only what each draft's next N steps can need: 1 is fastest on a CPU (default: K, fewest forwards)",
        "N",
    )
    cache: str = _option(
        "auto",
        Choice(("auto", "none", "prefix", "dual")),
        "auto is exact for block-causal models, and none for full attention",
    )
    executor: str = _option(
        "auto",
        Choice(("auto", "planned", "graph")),
        "planned computes least, graph launches least; auto is graph on a GPU",
    )
    compile: bool | None = _option(
        None, Switch(), "the graph executor's layers go through torch.compile (default: on a GPU)"
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                object.__setattr__(self, each.name, each.metadata["kind"].checked(each.name, value))


OPTION_NAMES = tuple(each.name for each in fields(DecodingOptions))


def takes_options(function: Callable[P, R]) -> Callable[P, R]:
    """Writes the options and their defaults into the signature of a function that takes them as `**options`.

    Callers see which there are, and transformers hands over only what it finds there.
    """
    signature = inspect.signature(function)
    own = list(signature.parameters.values())
    before = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(DecodingOptions)
    ]
    function.__signature__ = signature.replace(parameters=[*before, *options, *own[len(before) :]])  # type: ignore[attr-defined]
    return function
