"""Predictions from features: a large vocabulary's logits exist a slice at a time."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from states import generator
from tiny_models import prompt

import freedave
from freedave.forward import prediction
from freedave.forward.prediction import Predictor
from freedave_kernels import logit_floor, predict_tokens

VOCAB, WIDTH, MASK = 10_000, 32, 9_999


def large_vocabulary_lm(**options) -> freedave.DiffusionLM:
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        **options,
    )
    torch.manual_seed(0)
    return freedave.DiffusionLM(transformers.Qwen3ForCausalLM(config), MASK, block_length=8)


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, ...]]:
    """Of the logits that have been looked at."""
    seen: list[tuple[int, ...]] = []
    for name in ("partial_predictions", "predict_tokens"):
        original = getattr(prediction, name)
        monkeypatch.setattr(
            prediction,
            name,
            lambda logits, *a, original=original, **k: seen.append(tuple(logits.shape)) or original(logits, *a, **k),
        )
    return seen


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 20 * torch.randn(rows, WIDTH, generator=generator(0)), torch.full((rows,), MASK)


@torch.inference_mode()
def test_example(shapes):
    """Slices of 4,096 tokens, and what their whole would have given; a row that is not masked is left alone."""
    lm = large_vocabulary_lm()
    features, input_ids = inputs(512)
    input_ids[3] = 7
    predict = Predictor(lm)
    token_ids, confidence = predict(features, input_ids)
    assert shapes == [(512, 4096), (512, 4096), (512, VOCAB - 2 * 4096)] and predict.projection_seconds > 0
    expected = predict_tokens(lm.project(features), input_ids, MASK, suppress_tokens=[MASK])
    assert torch.equal(token_ids, expected[0]) and token_ids[3] == 7
    torch.testing.assert_close(confidence, expected[1], rtol=1e-5, atol=0)


@torch.inference_mode()
def test_few_rows_are_one_slice(shapes):
    Predictor(large_vocabulary_lm())(*inputs(4))
    assert shapes == [(4, VOCAB)]


@torch.inference_mode()
def test_a_floor_takes_all_logits_of_a_row(shapes):
    """They exist at once only where what is drawn from is truncated."""
    lm = large_vocabulary_lm()
    features, input_ids = inputs(8)
    input_ids[3] = 7
    noise = torch.arange(8), torch.arange(8) + 5, torch.full((8,), 0.7)
    predict = Predictor(lm, "prob", {"top_k": 5, "top_p": 0.9})
    result = predict(features, input_ids, noise)
    assert shapes == [(8, VOCAB)] and result[0][3] == 7
    logits = lm.project(features)
    floor = logit_floor(logits, top_k=5, top_p=0.9, temperature=0.7, suppress_tokens=[MASK])
    drawing = {"temperature": 0.7, "seed": noise[0], "positions": noise[1], "suppress_tokens": [MASK]}
    assert all(map(torch.equal, result, predict_tokens(logits, input_ids, MASK, floor=floor, **drawing)))
    assert not torch.equal(result[1], predict_tokens(logits, input_ids, MASK, **drawing)[1])


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_the_division_does_not_show(monkeypatch, bias):
    """Bitwise, as long as rows come by the four."""
    lm = large_vocabulary_lm()
    if bias:
        lm.model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, generator=generator(1)))
    features, input_ids = inputs(24)
    expected = Predictor(lm)(features, input_ids)
    for rows, slice_bytes in [(24, 0), (8, 2**22), (4, 4 * 4 * 8192)]:
        monkeypatch.setattr(prediction, "ROWS", rows)
        monkeypatch.setattr(prediction, "SLICE_BYTES", slice_bytes)
        assert all(map(torch.equal, Predictor(lm)(features, input_ids), expected))


def adapted(lm: freedave.DiffusionLM) -> None:
    """As adapters do it: another module in the head's place."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x @ torch.ones(WIDTH, 1)

    head = Adapted(WIDTH, VOCAB, bias=False)
    head.weight = lm.model.lm_head.weight
    lm.model.set_output_embeddings(head)


def replaced(lm: freedave.DiffusionLM) -> None:
    """As libraries that place weights do it."""
    original = lm.model.lm_head.forward
    lm.model.lm_head.forward = lambda x: original(x) * 2


def hooked(lm: freedave.DiffusionLM) -> None:
    lm.model.lm_head.register_forward_hook(lambda module, args, out: out * 2)


@pytest.mark.parametrize("change", [adapted, replaced, hooked])
@torch.inference_mode()
def test_a_head_that_does_more_makes_all_logits(shapes, change):
    lm = large_vocabulary_lm()
    assert lm.projection is lm.model.lm_head
    change(lm)
    assert lm.projection is None
    features, input_ids = inputs(4)
    result = Predictor(lm)(features, input_ids)
    assert shapes == [(4, VOCAB)]
    expected = predict_tokens(lm.project(features), input_ids, MASK, suppress_tokens=[MASK])
    assert all(map(torch.equal, result, expected))


# ------------------------------------------------------------------------------- a model that is more than its head


def favour(output):
    """Of a model's output, one whose every token is 5."""
    output.logits[..., 5] += 1e4
    return output


def hook_on_the_model(model, monkeypatch) -> None:
    model.register_forward_hook(lambda module, args, output: favour(output))


def pre_hook_on_the_model(model, monkeypatch) -> None:
    """Hooks that see nothing but what the whole model gets, and change a parameter."""

    def change(module, args, arguments):
        with torch.no_grad():
            module.lm_head.bias = torch.nn.Parameter(1e4 * (torch.arange(VOCAB) == 5))

    model.register_forward_pre_hook(change, with_kwargs=True)


def forward_of_the_model(model, monkeypatch) -> None:
    original = model.forward
    model.forward = lambda *args, **arguments: favour(original(*args, **arguments))


def forward_of_its_class(model, monkeypatch) -> None:
    original = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, **arguments: favour(original(*args, **arguments)))


def decorated_forward_of_its_class(model, monkeypatch) -> None:
    """A decorated function has the name and module of what it decorates."""
    original = type(model).forward
    changed = functools.wraps(original)(lambda *args, **arguments: favour(original(*args, **arguments)))
    monkeypatch.setattr(type(model), "forward", changed)


def class_of_the_same_name(model, monkeypatch) -> None:
    def forward(self, *args, **arguments):
        return favour(type(model).__mro__[1].forward(self, *args, **arguments))

    model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})


def hook_on_all_modules(model, monkeypatch) -> None:
    def hook(module, args, output):
        return favour(output) if module is model else None

    hooks = torch.nn.modules.module._global_forward_hooks
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    monkeypatch.setitem(hooks, handle.id, hooks.pop(handle.id))  # and takes it away at the test's end


@pytest.mark.parametrize(
    "change",
    [
        hook_on_the_model,
        pre_hook_on_the_model,
        forward_of_the_model,
        forward_of_its_class,
        decorated_forward_of_its_class,
        class_of_the_same_name,
        hook_on_all_modules,
    ],
)
def test_what_is_around_the_model_is_honoured(change, monkeypatch):
    """In every way to decode; the head alone is used where there is nothing around it."""
    lm = large_vocabulary_lm()
    assert lm.has_plain_head
    change(lm.model, monkeypatch)
    assert not lm.has_plain_head and lm.projection is None
    for executor in ("planned", "graph"):
        out = freedave.generate(lm, prompt(5), 16, draft_steps=4, executor=executor)
        assert (out.sequences[:, 5:] == 5).all()
    assert (lm.logits(prompt(5), torch.arange(5)).argmax(-1) == 5).all()


def test_a_forward_that_takes_no_more_arguments_is_refused():
    lm = large_vocabulary_lm()
    original = lm.model.forward
    lm.model.forward = lambda input_ids, position_ids, use_cache: original(input_ids, position_ids=position_ids)
    with pytest.raises(TypeError, match="hands no keyword arguments to its attention layers.*wrap it"):
        freedave.generate(lm, prompt(5), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_decodes(shapes, monkeypatch, tied, dtype):
    """Losslessly, with the logits of many drafts in slices and those of one draft whole."""
    monkeypatch.setattr(prediction, "SLICE_BYTES", 8 * dtype.itemsize * VOCAB)
    lm = large_vocabulary_lm(tie_word_embeddings=tied)
    lm.model.to(dtype)
    out = freedave.generate(lm, prompt(9), 40, draft_steps=6, check_lossless=True)
    assert out.num_forwards < out.static.num_forwards or dtype == torch.bfloat16
    assert {vocab for _, vocab in shapes} >= {4096, VOCAB}
    assert all(rows * vocab <= max(8 * VOCAB, rows * 4096) for rows, vocab in shapes)
