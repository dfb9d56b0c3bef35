"""What only a GPU can show: streams, graphs, synchronisations. `python -m benchmarks gpu` runs these too."""

from __future__ import annotations

import functools
import random
import re
import time
import warnings

import pytest
import torch
import transformers
from conftest import BACKENDS
from graph_recorder import use_recorded_graphs
from on_gpu import elsewhere, moved, on_device, through
from states import MASK, generator

import freedave
import freedave_kernels as fk
from freedave.decode import graph_executor
from freedave.decode.captured_steps import CapturedSteps
from freedave.decode.draft_choice import Choice, DraftChooser
from freedave.decode.graph_executor import GraphExecutor
from freedave.decode.shape_choice import DRAFTS

GPU = [name for name in ("cuda", "triton") if name in BACKENDS and torch.cuda.is_available()]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


class Step:
    """What a decoder does between two forwards."""

    def __init__(self, device: str, batch: int = 2, count: int = 8, length: int = 32, vocab: int = 40000) -> None:
        random = generator(3)
        drafts = torch.where(torch.rand(batch, count, length, generator=random) < 0.6, MASK, 1)
        self.drafts, self.count = drafts.to(device), count
        self.logits = torch.randn(batch, count, length, vocab, generator=random).to(device)
        self.active = torch.full((batch,), count, dtype=torch.int32, device=device)

    def __call__(self) -> list[torch.Tensor]:
        token_ids, confidence = fk.predict_tokens(self.logits, self.drafts, MASK)
        step = fk.draft_step(self.drafts, token_ids, confidence, self.active, MASK, self.count)
        return [token_ids, confidence, step.record]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("view", [(slice(None), slice(1, None, 2)), (slice(1, 2),), (slice(0, 0),)], ids=str)
def test_tensors_move_with_their_layout(view):
    tensor = torch.arange(24.0).view(4, 6)[view]
    copy = moved(tensor, "cpu")
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
    assert copy.storage_offset() == tensor.storage_offset()
    assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_ops_get_moved_tensors_and_answer_on_the_cpu():
    seen = []
    confidence, masked = torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)

    def spied(op):
        @functools.wraps(op)
        def spy(*arguments, **named):
            seen.extend([*arguments, *named.values()])
            return op(*arguments, **named)

        return through(spy, "cpu")

    assert torch.equal(spied(fk.rank_positions)(confidence, mask_index=masked), fk.rank_positions(confidence, masked))
    assert seen[0].data_ptr() != confidence.data_ptr() and torch.equal(seen[0], confidence)
    assert seen[1].data_ptr() != masked.data_ptr() and torch.equal(seen[1], masked)
    pool = fk.draft_pool(1, 2, 4)
    states = torch.tensor([[[MASK, MASK, MASK, MASK], [1, MASK, 3, MASK]]])  # the second may be met later
    confidence = torch.tensor([[[0.9, 0.1, 0.2, 0.3], [0.0, 0.1, 0.2, 0.3]]])
    spied(fk.draft_step)(
        states, torch.ones_like(states), confidence, torch.tensor([2]), MASK, 2, drafting="pooled", pool=pool
    )
    assert seen[-1].memory.data_ptr() != pool.memory.data_ptr() and pool.age.any()  # what is written is copied back
    with on_device("cpu"):
        step = Step("cpu", vocab=40)()
        window, stored, number = torch.ones(1, 1, 1, 2, 1, 4), torch.zeros(2, 1, 1, 3, 1, 4), torch.tensor([1])
        fk.keep(window, window, number - 1, number, number, *stored)
    assert stored.sum() == 8
    assert_same(step, Step("cpu", vocab=40)())


def test_an_argument_elsewhere_is_named_on_any_device():
    """The pattern by which the contract tests know a refusal does not say which device is the right one."""
    here, there = torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=torch.int64, device="meta")
    for first, second in ((here, there), (there, here)):
        with pytest.raises(ValueError, match=elsewhere("targets", "drafts")):
            fk.verify_drafts(first, second)
    for message in ("targets must be on cpu like drafts, got cpu", "targets must be on cpu like logits, got meta"):
        assert not re.search(elsewhere("targets", "drafts"), message)
    assert re.search(elsewhere("targets", "drafts"), "targets must be on cuda:0 like drafts, got cuda:1")


@needs_gpu
@pytest.mark.parametrize("name", GPU)
def test_a_stream_of_ones_own(name):
    """Work on the current stream, whichever it is: a kernel on the default stream would read logits not yet written."""
    run = Step("cuda")
    with fk.use_backend(name):
        expected = [tensor.clone() for tensor in run()]
        final = run.logits.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            run.logits.zero_().add_(final)
            result = run()
        stream.synchronize()
    assert_same(result, expected)


@needs_gpu
@pytest.mark.parametrize("name", GPU)
def test_a_step_never_waits(name):
    run = Step("cuda")
    with fk.use_backend(name):
        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("name", GPU)
def test_a_step_in_a_cuda_graph(name):
    """Captured once, replayed with other logits."""
    run = Step("cuda")
    with fk.use_backend(name):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for seed in range(3):
            run.logits.copy_(torch.randn(run.logits.shape, generator=generator(seed)))
            graph.replay()
            assert_same(captured, run())


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
def test_another_device_than_the_current_one():
    expected, result = Step("cuda:0")(), Step("cuda:1")()
    assert all(tensor.device.index == 1 for tensor in result)
    assert_same(result, expected)


MODELS = {
    "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
    "Qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "Glm4Moe": (
        transformers.Glm4MoeConfig,
        transformers.Glm4MoeForCausalLM,
        {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
}


def random_lm(name: str, dtype: torch.dtype, device: str, **options) -> freedave.DiffusionLM:
    config_class, model_class, own = MODELS[name]
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class(config_class(**sizes, **heads, **own))
    return freedave.DiffusionLM(model.to(device, dtype), 63, **options)


class RecordedSteps(CapturedSteps):
    """Captured steps for a CPU, whose clock counts them."""

    count = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"capture": True})

    def _run(self, *args):
        RecordedSteps.count += 1
        return super()._run(*args)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_chosen_drafts_in_captured_steps(monkeypatch, device):
    """Every choice is drawn at random, so that all shapes are captured: static decoding's tokens and steps, where windows are
    shorter than what is committed too; and replays are timed. On a CPU, a recorder stands in for CUDA's graphs."""
    monkeypatch.setattr(
        GraphExecutor, "clock", time.perf_counter if device == "cuda" else lambda *_: RecordedSteps.count
    )
    if device == "cpu":
        use_recorded_graphs(monkeypatch)
        monkeypatch.setattr(graph_executor, "CapturedSteps", RecordedSteps)
    draw, options = random.Random(0), {"attention": "block_causal", "block_length": 4}
    choose, timed = DraftChooser.choose, []

    def anything(self, outlooks, other_work=0.0):
        choose(self, outlooks, other_work)
        return Choice(draw.choice(DRAFTS), 0, 16, 16)

    learn = DraftChooser.learn
    monkeypatch.setattr(DraftChooser, "choose", anything)
    monkeypatch.setattr(DraftChooser, "learn", lambda self, *args: (timed.append(args[1]), learn(self, *args))[1])
    lm, shapes = random_lm("Qwen3", torch.float32, device, **options), ""
    for seed in range(6):
        input_ids = torch.randint(63, (2, 12), generator=generator(seed))
        out = freedave.generate(lm, input_ids, 48, "auto", compile=False, executor="graph")
        shapes += " ".join(out.stats.shapes)
        expected = freedave.generate(random_lm("Qwen3", torch.float32, "cpu", **options), input_ids, 48, 1)
        assert torch.equal(out.sequences.cpu(), expected.sequences)
        assert torch.equal(out.step_map.cpu(), expected.step_map)
    assert all(f" {drafts} drafts" in shapes for drafts in DRAFTS)
    assert sum(seconds is not None for seconds in timed) > len(timed) / 3  # those that were replayed


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_draw_what_static_sampling_draws(dtype, compile):
    """Seeds that change between replays of one graph, alone and in a batch; in float32, what the CPU draws."""
    input_ids = torch.randint(63, (3, 12), generator=generator(6))
    cases = [({"attention": "block_causal", "block_length": 4}, "auto")]
    cases += [({"attention": "full", "block_length": 8, "logits_shift": True}, cache) for cache in ("dual", "none")]
    for options, cache in cases:
        lm, on_cpu = (random_lm("Qwen3", dtype, device, **options) for device in ("cuda", "cpu"))
        answers = []
        for seed in (1, 2, 1):
            drawing = {"cache": cache, "temperature": 0.8, "seed": seed}
            if cache == "none":
                drawing |= {"top_k": 20, "top_p": 0.95}
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*so it runs (uncompiled|launch by launch)")
                out = freedave.generate(lm, input_ids, 16, 4, **drawing, compile=compile, check_lossless=True)
                alone = freedave.generate(lm, input_ids[:1], 16, 8, **drawing, compile=compile, check_lossless=True)
            assert max(out.stats.shapes.values()) > 2 and out.num_forwards < out.static.num_forwards
            answers.append(out.sequences)
            if dtype == torch.float32:
                expected = freedave.generate(on_cpu, input_ids, 16, 1, **drawing)
                assert torch.equal(out.sequences.cpu(), expected.sequences)
                assert torch.equal(alone.sequences.cpu(), expected.sequences[:1])
                assert torch.equal(out.step_map.cpu(), expected.step_map)
        assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_decodes_of_captured_steps_are_lossless(name, dtype, compile):
    """Three sequences of different lengths: exact cache, and full attention with each policy."""
    cases = [({"attention": "block_causal", "block_length": 4}, "auto")]
    cases += [({"attention": "full", "block_length": 8, "logits_shift": name == "Qwen2"}, "dual")]
    if not compile:
        cases += [({"attention": "full", "block_length": 8}, cache) for cache in ("none", "prefix")]
    input_ids = torch.randint(63, (3, 12), generator=generator(5))
    mask = torch.arange(12) >= torch.tensor([[0], [4], [7]])
    for options, cache in cases:
        lm = random_lm(name, dtype, "cuda", **options)
        with warnings.catch_warnings():
            # Neither uncompiled nor uncaptured; but experts in float32 are multiplied one by one, as many as the host reads.
            if name != "Glm4Moe" or dtype != torch.float32:
                warnings.filterwarnings("error", message=".*so it runs (uncompiled|launch by launch)")
            out = freedave.generate(
                lm, input_ids, 16, 4, cache=cache, attention_mask=mask, compile=compile, check_lossless=True
            )
        assert max(out.stats.shapes.values()) > 2 and out.num_forwards < out.static.num_forwards
        if dtype == torch.float32:
            expected = freedave.generate(
                random_lm(name, dtype, "cpu", **options), input_ids, 16, 1, cache=cache, attention_mask=mask
            )
            assert torch.equal(out.sequences.cpu(), expected.sequences)
            assert torch.equal(out.step_map.cpu(), expected.step_map)
