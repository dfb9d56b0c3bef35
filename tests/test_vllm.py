"""vLLM's sampler of masked-diffusion models on our kernels, beside its published rules in plain Python, on random states.

vLLM's releases until 0.33 have no such model. A stand-in has the names of its main branch that the door uses.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from freedave.integrations import vllm

MASK, VOCAB, LENGTH, SLOTS, STATES = 50, 64, 8, 6, 200
POLICIES = ("low_confidence", "leftmost", "confidence_threshold")


class Requests:
    """What vLLM keeps of its requests, in slots: a canvas, its step, and whether it is about to be emitted."""

    def __init__(self, max_steps: int) -> None:
        self.max_denoising_steps = max_steps
        self.canvas = torch.full((SLOTS, LENGTH), MASK)
        self.step = torch.zeros(SLOTS, dtype=torch.int32)
        self.is_encoder_phase = torch.zeros(SLOTS, dtype=torch.bool)

    def copy(self) -> Requests:
        other = Requests(self.max_denoising_steps)
        other.canvas, other.step = self.canvas.clone(), self.step.clone()
        other.is_encoder_phase = self.is_encoder_phase.clone()
        return other


class TheirSampler:
    """vLLM's sampler, as far as ours leaves work to it. Its own steps are marked, not made."""

    canvas_length, mask_token_id, vocab_size = LENGTH, MASK, VOCAB

    def __init__(self, requests: Requests) -> None:
        self.diffusion_states = requests
        self.req_states = SimpleNamespace(draft_tokens=torch.full((SLOTS, LENGTH + 2), -1))
        self.sampling_states = SimpleNamespace(
            temperature=SimpleNamespace(np=np.zeros(SLOTS, np.float32)),
            top_k=SimpleNamespace(np=np.full(SLOTS, VOCAB, np.int32)),
            top_p=SimpleNamespace(np=np.ones(SLOTS, np.float32)),
            max_num_logprobs=lambda slots: self.log_probs,
        )
        self.log_probs = -1
        self._sampled = torch.full((SLOTS, LENGTH), 7, dtype=torch.int32)
        self._num_sampled = torch.full((SLOTS,), 7, dtype=torch.int32)

    def __call__(self, logits: torch.Tensor, input_batch: Any, draft_logits: Any = None) -> str:
        return "left to vLLM"

    def apply_staged_writes(self) -> str:
        return "written"

    def _finish_prefills(self, input_batch: Any, rows: np.ndarray) -> None:
        slots = input_batch.idx_mapping[torch.from_numpy(rows)].long()
        self.diffusion_states.canvas[slots] = MASK
        self.diffusion_states.is_encoder_phase[slots] = False

    def _build_output(self, input_batch: Any, sampled: Any, num_sampled: Any, lengths: np.ndarray) -> Any:
        return SimpleNamespace(sampled=sampled, num_sampled=num_sampled, lengths=lengths)


class ModelState:
    """vLLM's, with the method that the plug-in replaces."""

    def __init__(self, policy: str, threshold: float, requests: Requests) -> None:
        self.selection_policy, self.confidence_threshold, self.diffusion_states = policy, threshold, requests

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        return TheirSampler(self.diffusion_states), None


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> type[ModelState]:
    """Modules of vLLM with the names that the door imports."""

    class Fresh(ModelState):
        custom_sampler = ModelState.custom_sampler

    modules = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.nemotron_dllm": {"NemotronLabsDiffusionModelState": Fresh},
        "vllm.utils": {},
        "vllm.utils.torch_utils": {"async_tensor_h2d": lambda data, device: torch.from_numpy(data).to(device)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("FREEDAVE_VLLM", "on")
    return Fresh


def published(requests: Requests, slot: int, logits: torch.Tensor, policy: str, threshold: float) -> list[int]:
    """One step of one request with logits `[its canvas's length, V]`, one position after the other; what it emits."""
    length, canvas = len(logits), requests.canvas[slot].tolist()
    if requests.is_encoder_phase[slot]:
        requests.canvas[slot] = MASK
        requests.step[slot] = 0
        requests.is_encoder_phase[slot] = False
        whole = canvas[:length]
        return whole[: whole.index(MASK)] if MASK in whole else whole
    logits = logits.float().clone()
    logits[:, MASK] = -torch.inf
    tokens = logits.argmax(-1).tolist()
    sure = logits.log_softmax(-1).amax(-1).tolist()
    open_here = [i for i in range(length) if canvas[i] == MASK]
    left = max(requests.max_denoising_steps - int(requests.step[slot]), 1)
    surest = sorted(open_here, key=lambda i: (-sure[i], i))
    if policy == "confidence_threshold":
        revealed = [i for i in open_here if sure[i] >= np.log(threshold) or left == 1] or surest[:1]
    else:
        share = -(-len(open_here) // left)
        revealed = (open_here if policy == "leftmost" else surest)[:share]
    for i in revealed:
        requests.canvas[slot, i] = tokens[i]
    requests.step[slot] += 1
    requests.is_encoder_phase[slot] = len(revealed) == len(open_here) or left == 1
    return []


def batch(draw: torch.Generator, requests: Requests) -> tuple[Any, list[int], torch.Tensor]:
    """A batch of some slots: prompts that are computed (no logits), whole canvases, and canvases that end early."""
    count = int(torch.randint(1, SLOTS + 1, (), generator=draw))
    slots = torch.randperm(SLOTS, generator=draw)[:count]
    kinds = torch.randint(0, 4, (count,), generator=draw).tolist()
    lengths = [(0, LENGTH, LENGTH, LENGTH - 3)[kind] for kind in kinds]
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        emits = bool(torch.rand((), generator=draw) < 0.3) or not length
        hidden = torch.rand(LENGTH, generator=draw) < (0.1 if emits else 0.6)
        requests.canvas[slot] = torch.randint(0, MASK, (LENGTH,), generator=draw).where(~hidden, MASK)
        requests.step[slot] = int(torch.randint(0, requests.max_denoising_steps, (), generator=draw))
        requests.is_encoder_phase[slot] = emits
    logits = torch.randn(sum(lengths), VOCAB, generator=draw) * 3
    logits[:, MASK] += 3
    ends = np.cumsum([0, *lengths])
    input_batch = SimpleNamespace(
        num_reqs=count,
        idx_mapping=slots.to(torch.int32),
        idx_mapping_np=slots.numpy(),
        cu_num_logits_np=ends,
        num_draft_tokens=sum(lengths),
    )
    return input_batch, lengths, logits


def sampler_of(host: type[ModelState], policy: str, threshold: float, requests: Requests) -> Any:
    vllm.register()
    sampler, rejection_sampler = host(policy, threshold, requests).custom_sampler(None)
    assert rejection_sampler is None
    return sampler


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_tokens_are_the_published_ones(host: type[ModelState], policy: str, dtype: torch.dtype) -> None:
    emitted = revealed = 0
    for seed in range(STATES):
        draw = torch.Generator().manual_seed(seed)
        requests = Requests(max_steps=(1, 3, LENGTH, 20)[seed % 4])
        input_batch, lengths, logits = batch(draw, requests)
        if seed % 5 == 0 and len(logits) > 1:
            logits[1] = logits[0]  # the same confidence twice
        logits, threshold = logits.to(dtype), (0.3, 0.6, 1.0)[seed // 4 % 3]
        wanted = requests.copy()
        sampler = sampler_of(host, policy, threshold, requests)
        output = sampler(logits, input_batch)
        if not any(lengths):
            assert output == "left to vLLM"
            continue
        begin = 0
        for row, (slot, length) in enumerate(zip(input_batch.idx_mapping.tolist(), lengths, strict=True)):
            tokens: list[int] = []
            if length:
                tokens = published(wanted, slot, logits[begin : begin + length], policy, threshold)
            else:
                wanted.canvas[slot], wanted.is_encoder_phase[slot] = MASK, False
            begin += length
            assert output.sampled[row, : output.num_sampled[row]].tolist() == tokens, (seed, row)
            emitted += len(tokens)
            assert torch.equal(sampler.req_states.draft_tokens[slot, :LENGTH], wanted.canvas[slot])
        for name in ("canvas", "step", "is_encoder_phase"):
            assert torch.equal(getattr(requests, name), getattr(wanted, name)), (seed, name)
        assert output.lengths.tolist() == lengths
        revealed += int((requests.canvas != MASK).sum())
    assert emitted > STATES and revealed > STATES


@pytest.mark.parametrize("wanted", ["temperature", "top_k", "top_p", "log_probs"])
def test_what_needs_draws_or_log_probabilities_is_left_to_vllm(host: type[ModelState], wanted: str) -> None:
    requests = Requests(max_steps=4)
    sampler = sampler_of(host, "low_confidence", 0.9, requests)
    before = requests.copy()
    logits = torch.randn(2 * LENGTH, VOCAB)
    input_batch = SimpleNamespace(
        num_reqs=2,
        idx_mapping=torch.tensor([4, 1], dtype=torch.int32),
        idx_mapping_np=np.array([4, 1]),
        cu_num_logits_np=np.array([0, LENGTH, 2 * LENGTH]),
        num_draft_tokens=2 * LENGTH,
    )
    changes: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    if wanted == "log_probs":
        sampler._theirs.log_probs = 0
    else:
        getattr(sampler.sampling_states, wanted).np[1] = changes[wanted]
    assert sampler(logits, input_batch) == "left to vLLM"
    assert torch.equal(requests.canvas, before.canvas) and torch.equal(requests.step, before.step)
    if wanted != "log_probs":  # of a request that is not in this batch, it does not matter
        input_batch.idx_mapping_np = np.array([4, 2])
        assert sampler(logits, input_batch) != "left to vLLM"


def test_everything_else_is_vllms(host: type[ModelState]) -> None:
    assert sampler_of(host, "leftmost", 0.9, Requests(4)).apply_staged_writes() == "written"


def test_registering_twice_is_registering_once(host: type[ModelState]) -> None:
    vllm.register()
    once = host.custom_sampler
    vllm.register()
    assert host.custom_sampler is once


def test_it_does_nothing_unless_asked(host: type[ModelState], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = host.custom_sampler
    for setting in ("off", None):
        monkeypatch.setenv("FREEDAVE_VLLM", setting) if setting else monkeypatch.delenv("FREEDAVE_VLLM")
        vllm.register()
    assert host.custom_sampler is theirs
    monkeypatch.setenv("FREEDAVE_VLLM", "1")
    with pytest.raises(ValueError, match="FREEDAVE_VLLM must be 'on' or 'off', got '1'"):
        vllm.register()


def test_a_vllm_without_masked_diffusion_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.nemotron_dllm", None)
    with pytest.raises(ImportError, match=r"FREEDAVE_VLLM=on, but this vLLM has no masked-diffusion model"):
        vllm.register()
