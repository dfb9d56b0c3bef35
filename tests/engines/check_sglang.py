"""What `make check-engines` runs where SGLang's own wheel is installed: its algorithms and ours on the same random states.

No GPU is needed: of SGLang run its plug-in loader, algorithms, `ForwardBatch`, token-to-slot tables, allocators, key-value
pool and its attention in plain PyTorch, where the model runner and the scheduler are stand-ins; and at the end its whole
engine on a CPU (`sglang_engine.py`). Its compiled kernels and torchvision are the modules in `stand_ins/`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.dllm.algorithm import algo_name_to_cls, get_algorithm
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from sglang.srt.dllm.config import DllmConfig
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_parallel
from sglang_engine import save_model
from torch.overrides import TorchFunctionMode

load_plugins()

MASK, VOCAB, BLOCK = 99, 100, 8


def config(algorithm: str, fdfo: bool = False, block_size: int = BLOCK, **settings: Any) -> DllmConfig:
    return DllmConfig(algorithm, settings, block_size, MASK, 4, first_done_first_out_mode=fdfo)


def test_the_entry_point_registers_the_algorithms():
    for name in ("FreeDave", "FreeDaveLowConfidence", "FreeDaveJointThreshold"):
        assert algo_name_to_cls[name].__module__ == "freedave.integrations.sglang"
        assert type(get_algorithm(config(name))).__name__ == name


# `step`, on states that no model has to reach.


def random_state(seed: int, literal_masks: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ids [B * L], logits [B * L, V] and which positions are prompt; blocks with every number of masks, none included."""
    random = torch.Generator().manual_seed(seed)
    batch = 1 + seed % 5
    ids = torch.randint(0, VOCAB - 1, (batch, BLOCK), generator=random)
    share = torch.rand(batch, 1, generator=random) * 1.4 - 0.2
    ids[torch.rand(batch, BLOCK, generator=random) < share] = MASK
    scale = 1 + torch.rand(batch * BLOCK, 1, generator=random) * 8
    logits = torch.randn(batch * BLOCK, VOCAB, generator=random) * scale
    if seed % 7 == 0:
        logits[::3, MASK] += 40  # the mask itself is predicted
    prompt = torch.arange(BLOCK) < torch.randint(0, BLOCK + 1, (batch, 1), generator=random)
    return ids.view(-1), logits, prompt if literal_masks else None


def batch_of(ids: torch.Tensor, prompt: torch.Tensor | None) -> Any:
    return SimpleNamespace(input_ids=ids.clone(), batch_size=len(ids) // BLOCK, dllm_prompt_mask=prompt)


def compare_steps(theirs: DllmAlgorithm, ours: DllmAlgorithm, seed: int, steps: int) -> None:
    ids, _, prompt = random_state(seed, literal_masks=seed % 3 == 0)
    batches = [batch_of(ids, prompt), batch_of(ids, prompt)]
    states = [algorithm.init_step_state(batch) for algorithm, batch in zip((theirs, ours), batches, strict=True)]
    kept = batches[1].input_ids
    for step in range(steps):
        logits = random_state(1000 * step + seed, False)[1]
        expected = theirs.step(batches[0], logits.clone(), states[0])
        found = ours.step(batches[1], logits.clone(), states[1])
        assert found == expected
        assert torch.equal(*(batch.input_ids for batch in batches))
        assert batches[1].input_ids is kept  # which a CUDA graph reads


@pytest.mark.parametrize("threshold", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(200))
def test_low_confidence_step(seed, threshold):
    settings = {"threshold": threshold}
    theirs, ours = (get_algorithm(config(name, **settings)) for name in ("LowConfidence", "FreeDaveLowConfidence"))
    compare_steps(theirs, ours, seed, steps=4)


JOINT = [
    {},
    {"threshold": 0.9, "edit_threshold": 0.6, "max_post_edit_steps": 1},
    {"threshold": 1.0, "edit_threshold": 0.9, "penalty_lambda": 2.5},
]


@pytest.mark.parametrize("fdfo", [False, True], ids=["sync", "fdfo"])
@pytest.mark.parametrize("settings", JOINT, ids=str)
@pytest.mark.parametrize("seed", range(200))
def test_joint_threshold_step(seed, settings, fdfo):
    theirs, ours = (
        get_algorithm(config(name, fdfo, **settings)) for name in ("JointThreshold", "FreeDaveJointThreshold")
    )
    assert ours.max_steps(BLOCK) == theirs.max_steps(BLOCK)
    compare_steps(theirs, ours, seed, steps=4)


class Reads(TorchFunctionMode):
    """Notes what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.__name__ in (
            "tolist",
            "item",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "nonzero",
            "cpu",
            "numpy",
        ):
            self.found.append(function.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("fdfo", [False, True], ids=["sync", "fdfo"])
@pytest.mark.parametrize(("name", "settings"), [("LowConfidence", {}), ("JointThreshold", {"penalty_lambda": 1.0})])
def test_a_step_reads_what_it_returns_and_nothing_else(name, settings, fdfo):
    ids, logits, prompt = random_state(4, literal_masks=True)
    reads = {}
    for kind in (name, f"FreeDave{name}"):
        algorithm, batch = get_algorithm(config(kind, fdfo, **settings)), batch_of(ids, prompt)
        states = algorithm.init_step_state(batch)
        with Reads() as mode:
            algorithm.step(batch, logits.clone(), states)
        reads[kind] = mode.found
    assert reads[f"FreeDave{name}"] == ["tolist"]
    assert name == "LowConfidence" or len(reads[name]) > 5  # theirs reads several times a block


def test_a_block_without_finite_logits_is_done():
    ours = get_algorithm(config("FreeDaveLowConfidence"))
    batch = batch_of(torch.full((BLOCK,), MASK), None)
    assert ours.step(batch, torch.full((BLOCK, VOCAB), torch.nan), [None]) == [True]


# `run`, on a model.

HEADS, SIZE, LAYERS, CONTEXT = 2, 16, 2, 128


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with get_parallel().override(moe_ep_size=1, attn_dp_size=1, tp_size=1, attn_dcp_size=1):
        yield


class Model(torch.nn.Module):
    """Two layers that attend to the stored prefix and to their whole block, by SGLang's attention."""

    def __init__(self, backend: TorchNativeAttnBackend, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            width = HEADS * SIZE
            self.tokens, self.places = torch.nn.Embedding(VOCAB, width), torch.nn.Embedding(CONTEXT, width)
            self.mix = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width, bias=False) for _ in range(LAYERS))
            self.out = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS))
            self.head = torch.nn.Linear(width, VOCAB, bias=False)
        self.attention = [
            RadixAttention(HEADS, SIZE, SIZE**-0.5, HEADS, n, attn_type=AttentionType.ENCODER_ONLY)
            for n in range(LAYERS)
        ]
        self.backend = backend
        self.mask_logit = 0.0  # where it is the arg max, theirs ends with masks

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        x = self.tokens(batch.input_ids) + self.places(batch.positions)
        for layer, mix, out in zip(self.attention, self.mix, self.out, strict=True):
            q, k, v = torch.nn.functional.layer_norm(mix(x), [3 * HEADS * SIZE]).chunk(3, -1)
            heads = [part.view(-1, HEADS, SIZE) for part in (k, v)]
            x = x + out(self.backend.forward_extend(q.contiguous(), *heads, layer, batch))
        logits = self.head(torch.nn.functional.layer_norm(x, [HEADS * SIZE])) * 6
        logits[:, MASK] = self.mask_logit if logits.isfinite().all() else torch.nan
        return logits


class Runner:
    """What an algorithm asks of SGLang's ModelRunner."""

    device, is_draft_worker = "cpu", False

    def __init__(self, seed: int, slots: int, rows: int, page_size: int) -> None:
        self.req_to_token_pool = ReqToTokenPool(rows, CONTEXT, "cpu", False)
        self.token_to_kv_pool = MHATokenToKVPool(
            slots, page_size, torch.float32, HEADS, SIZE, LAYERS, "cpu", False, enable_alt_stream=False
        )
        if page_size == 1:
            allocator = TokenToKVPoolAllocator(slots, torch.float32, "cpu", self.token_to_kv_pool, False)
        else:
            allocator = PagedTokenToKVPoolAllocator(
                slots, page_size, torch.float32, "cpu", self.token_to_kv_pool, False
            )
        self.token_to_kv_pool_allocator = allocator
        self.kv_index_translator = KVIndexTranslator(
            req_to_token=self.req_to_token_pool.req_to_token,
            token_to_kv_pool_allocator=allocator,
            token_to_kv_pool=self.token_to_kv_pool,
            page_size=page_size,
            device="cpu",
        )
        self.backend = TorchNativeAttnBackend(self)
        self.model = Model(self.backend, seed)
        self.forwards, self.widest, self.break_down = 0, 0, 0

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, pp_proxy_tensors: Any = None) -> Any:
        self.forwards += 1
        self.widest = max(self.widest, batch.batch_size)
        if self.forwards == self.break_down:
            raise MemoryError("the forward breaks down")
        check_batch(batch, self.req_to_token_pool.req_to_token)
        self.backend.init_forward_metadata(batch)
        logits = self.model(batch)
        return SimpleNamespace(logits_output=SimpleNamespace(full_logits=logits), can_run_graph=False)


def check_batch(batch: ForwardBatch, table: torch.Tensor) -> None:
    """Every field of a batch has an entry a request, and all agree with each other and with the token-to-slot table."""
    size, prefix = batch.batch_size, batch.extend_prefix_lens
    for field in (
        "req_pool_indices", "req_pool_indices_cpu", "seq_lens", "seq_lens_cpu", "orig_seq_lens", "extend_seq_lens",
        "extend_seq_lens_cpu", "extend_prefix_lens_cpu", "extend_start_loc", "rids", "lora_ids",
    ):  # fmt: skip
        assert len(getattr(batch, field)) == size, field
    assert len(set(batch.req_pool_indices.tolist())) == size
    assert batch.req_pool_indices_cpu.tolist() == batch.req_pool_indices.tolist()
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() and batch.seq_lens_sum == sum(batch.seq_lens.tolist())
    assert batch.extend_prefix_lens_cpu == prefix.tolist() == (batch.seq_lens - BLOCK).tolist()
    assert batch.extend_start_loc.tolist() == [BLOCK * i for i in range(size)]
    assert batch.extend_num_tokens == batch.global_num_token_non_padded_cpu == len(batch.input_ids) == size * BLOCK
    columns = prefix[:, None] + torch.arange(BLOCK)
    assert torch.equal(batch.positions.view(size, BLOCK).long(), columns.long())
    assert torch.equal(table[batch.req_pool_indices[:, None], columns].long().view(-1), batch.out_cache_loc.long())
    assert len(set(batch.out_cache_loc.tolist())) == size * BLOCK
    assert ((batch.input_ids >= 0) & (batch.input_ids < VOCAB)).all()


@dataclasses.dataclass
class Request:
    """A stand-in for the scheduler's: its tokens, its row of the token-to-slot table, and its state with FDFO."""

    tokens: list[int]
    prompt_length: int
    row: int
    stored: int = 0
    allocated: int = 0
    state: Any = None
    block: list[int] | None = None

    def next_block(self) -> list[int]:
        known = self.tokens[self.stored : self.stored + BLOCK]
        return self.block or known + [MASK] * (BLOCK - len(known))


def forward_batch(runner: Runner, requests: list[Request]) -> ForwardBatch:
    table, allocator = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool_allocator
    for request in requests:
        if request.allocated == request.stored:
            table[request.row, request.stored : request.stored + BLOCK] = allocator.alloc(BLOCK).int()
            request.allocated += BLOCK
    prefixes = [request.stored for request in requests]
    rows, seq_lens = torch.tensor([request.row for request in requests]), torch.tensor(prefixes) + BLOCK
    columns = torch.tensor(prefixes)[:, None] + torch.arange(BLOCK)
    prompt = columns < torch.tensor([request.prompt_length for request in requests])[:, None]
    literal = any(MASK in request.tokens[: request.prompt_length] for request in requests)
    batch = ForwardBatch(
        forward_mode=ForwardMode.DLLM_EXTEND,
        batch_size=len(requests),
        input_ids=torch.tensor([request.next_block() for request in requests]).view(-1),
        req_pool_indices=rows,
        seq_lens=seq_lens,
        out_cache_loc=table[rows[:, None], columns].long().view(-1),
        seq_lens_sum=int(seq_lens.sum()),
        orig_seq_lens=seq_lens.int(),
        seq_lens_cpu=seq_lens.clone(),
        req_pool_indices_cpu=rows.clone(),
        rids=[str(request.row) for request in requests],
        lora_ids=[None] * len(requests),
        positions=columns.int().view(-1),
        dllm_prompt_mask=prompt if literal else None,
        extend_num_tokens=len(requests) * BLOCK,
        extend_seq_lens=torch.full((len(requests),), BLOCK, dtype=torch.int32),
        extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
        extend_start_loc=torch.arange(len(requests), dtype=torch.int32) * BLOCK,
        extend_prefix_lens_cpu=prefixes,
        extend_seq_lens_cpu=[BLOCK] * len(requests),
    )
    batch._init_num_token_non_padded(device="cpu", is_draft_worker=False)
    runner.kv_index_translator.own_plan(batch).bind(batch, runner.kv_index_translator)
    return batch


def serve(algorithm: DllmAlgorithm, runner: Runner, prompts: list[list[int]], blocks: int) -> list[Request]:
    """Decodes `blocks` blocks of each, in a batch, as SGLang's scheduler has an algorithm do it."""
    rows = runner.req_to_token_pool.alloc_rows(len(prompts))
    requests = [Request(list(prompt), len(prompt), row) for prompt, row in zip(prompts, rows, strict=True)]
    end = {request.row: (request.prompt_length // BLOCK + blocks) * BLOCK for request in requests}
    while waiting := [request for request in requests if request.stored < end[request.row]]:
        prefill = [request for request in waiting if request.stored + BLOCK <= request.prompt_length]
        together = prefill or waiting
        batch = forward_batch(runner, together)
        before = runner.req_to_token_pool.available_size(), runner.token_to_kv_pool_allocator.available_size()
        states = [request.state for request in together] if algorithm.fdfo else None
        _, ids, lengths, new_states, _ = algorithm.run(runner, batch, states)
        assert before == (runner.req_to_token_pool.available_size(), runner.token_to_kv_pool_allocator.available_size())
        assert algorithm.fdfo or bool(prefill) == (ids == [])
        for n, request in enumerate(together):
            if not algorithm.fdfo:
                assert prefill or len(ids[n]) == request.stored + BLOCK - len(request.tokens)
                request.tokens += ids[n].tolist() if ids else []
                request.stored += BLOCK
                continue
            request.state, request.block = new_states[n], None if lengths[n] else ids[n]
            if lengths[n]:
                request.tokens = request.tokens[: request.stored] + ids[n]
                request.stored += BLOCK
    return requests


def stored_keys(runner: Runner, request: Request) -> torch.Tensor:
    """Keys and values of all layers, by position."""
    slots = runner.req_to_token_pool.req_to_token[request.row, : request.stored].long()
    pool = runner.token_to_kv_pool
    return torch.stack(
        [
            buffer[slots]
            for layer in range(LAYERS)
            for buffer in (pool.get_key_buffer(layer), pool.get_value_buffer(layer))
        ]
    )


def prompts_of(seed: int, count: int, literal: bool = False) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 3 * BLOCK, (count,), generator=random).tolist()
    prompts = [torch.randint(0, VOCAB - 1, (length,), generator=random).tolist() for length in lengths]
    if literal:
        prompts[0][-1] = MASK
    return prompts


def compare_runs(
    seed: int,
    prompts: list[list[int]],
    fdfo: bool = False,
    page_size: int = 1,
    threshold: float = 1.0,
    slots: int = 4000,
    rows: int = 64,
    **settings: Any,
) -> tuple[Runner, Runner]:
    """Serves with theirs and with ours; tokens, stored keys and what is left of the pools agree."""
    theirs, ours = Runner(seed, slots, rows, page_size), Runner(seed, slots, rows, page_size)
    expected = serve(get_algorithm(config("LowConfidence", fdfo, threshold=threshold)), theirs, prompts, 4)
    found = serve(get_algorithm(config("FreeDave", fdfo, threshold=threshold, **settings)), ours, prompts, 4)
    for mine, other in zip(found, expected, strict=True):
        assert mine.tokens == other.tokens and MASK not in mine.tokens[mine.prompt_length :]
        torch.testing.assert_close(stored_keys(ours, mine), stored_keys(theirs, other), rtol=1e-4, atol=1e-5)
    slots_in_use = [
        slot for each in found for slot in ours.req_to_token_pool.req_to_token[each.row, : each.stored].tolist()
    ]
    free = ours.token_to_kv_pool_allocator
    assert len(set(slots_in_use)) == len(slots_in_use) == slots - free.available_size()
    return theirs, ours


@pytest.mark.parametrize("fdfo", [False, True], ids=["sync", "fdfo"])
@pytest.mark.parametrize("page_size", [1, 4, BLOCK])
@pytest.mark.parametrize("threshold", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_run_is_lossless(seed, threshold, page_size, fdfo):
    theirs, ours = compare_runs(seed, prompts_of(seed, 3), fdfo, page_size, threshold)
    assert ours.forwards < theirs.forwards or threshold < 1
    assert ours.widest > 3


@pytest.mark.parametrize("settings", [{"draft_steps": 1}, {"draft_steps": 8}, {"drafting": "nested"}], ids=str)
def test_settings(settings):
    theirs, ours = compare_runs(1, prompts_of(1, 3), **settings)
    assert ours.forwards < theirs.forwards or settings == {"draft_steps": 1}


@pytest.mark.parametrize("name", ["LowConfidence", "FreeDave"])
def test_a_confidence_equal_to_the_threshold_is_not_above_it(name):
    """Two tokens of the same logit have a probability of a half each, exactly: each step commits one position."""
    runner = Runner(1, 4000, 64, 1)
    runner.model.forward = lambda batch: torch.where((torch.arange(VOCAB) // 2 == 3), 0.0, -1e4).repeat(
        len(batch.input_ids), 1
    )
    (request,) = serve(get_algorithm(config(name, threshold=0.5, draft_steps=1)), runner, [[1, 2]], 1)
    assert request.tokens == [1, 2] + [6] * 6 and runner.forwards == 7


@pytest.mark.parametrize("fdfo", [False, True], ids=["sync", "fdfo"])
def test_a_predicted_mask_is_passed_over(fdfo):
    """Theirs fills such a position with the mask, again and again, and ends with more masks in the block; both end."""

    def masks(algorithm: DllmAlgorithm) -> int:
        runner = Runner(2, 4000, 64, 1)
        runner.model.mask_logit = 6.5  # the arg max of some positions
        return serve(algorithm, runner, [[1, 2, 3]], 2)[0].tokens.count(MASK)

    theirs = masks(get_algorithm(config("LowConfidence", threshold=1.0)))
    assert 0 < masks(get_algorithm(config("FreeDave", fdfo, threshold=1.0))) < theirs


def test_masks_in_a_prompt_stay():
    compare_runs(3, prompts_of(3, 2, literal=True))
    compare_runs(3, prompts_of(3, 2, literal=True), fdfo=True)


def test_with_less_room_there_are_fewer_drafts():
    """Two requests, whose four blocks and prompts fill the pool but for a window or two, or all rows."""
    prompts = prompts_of(5, 2)
    used = sum(len(prompt) // BLOCK + 4 for prompt in prompts) * BLOCK
    for slots, rows in ((used, 64), (used + BLOCK, 64), (4000, 2), (4000, 5)):
        ours = compare_runs(5, prompts, slots=slots, rows=rows)[1]
        assert ours.widest <= (rows if rows < 64 else 8)


def test_room_comes_from_the_prefix_cache():
    """A busy server's pool is full of what the cache may evict; the plug-in tells the algorithm of the cache."""
    ours = get_algorithm(config("FreeDave", threshold=1.0))
    evicted = []

    class Cache:
        def supports_prefix_sharing(self) -> bool:
            return True

        def evict_for_alloc(self, params: Any) -> None:
            evicted.append(params.num_tokens)
            allocator.free(held[-1][: params.num_tokens])
            held[-1] = held[-1][params.num_tokens :]

        def evictable_size(self) -> int:
            return 0

    worker = SimpleNamespace(dllm_algorithm=ours, model_runner=None)
    calls = []
    ours.run = lambda *arguments: calls.append(arguments) or (None,) * 5  # type: ignore[method-assign]
    TpModelWorker._forward_batch_generation_dllm(worker, None, SimpleNamespace(tree_cache=Cache(), reqs=[]))
    assert calls and isinstance(ours.tree_cache, Cache)
    del ours.run

    runner = Runner(2, 4000, 64, 1)
    allocator = runner.token_to_kv_pool_allocator
    batch = forward_batch(runner, [Request([1, 2, 3], 3, *runner.req_to_token_pool.alloc_rows(1))])
    held = [allocator.alloc(4000 - BLOCK)]
    _, (tokens,), *_ = ours.run(runner, batch)
    assert len(tokens) == BLOCK - 3 and runner.widest == 4
    assert evicted and sum(evicted) == allocator.available_size() == 3 * BLOCK


def test_what_breaks_down_leaves_nothing_behind():
    runner = Runner(1, 4000, 64, BLOCK)
    requests = [
        Request(prompt, len(prompt), row)
        for prompt, row in zip(prompts_of(1, 2), runner.req_to_token_pool.alloc_rows(2), strict=True)
    ]
    for request in requests:
        request.tokens = request.tokens[: request.prompt_length % BLOCK]
        request.prompt_length = len(request.tokens)
    batch = forward_batch(runner, requests)
    before = runner.req_to_token_pool.available_size(), runner.token_to_kv_pool_allocator.available_size()
    runner.break_down = 2
    with pytest.raises(MemoryError):
        get_algorithm(config("FreeDave")).run(runner, batch)
    assert runner.widest > 2
    assert before == (runner.req_to_token_pool.available_size(), runner.token_to_kv_pool_allocator.available_size())


def test_a_run_without_finite_logits_ends():
    for fdfo in (False, True):
        runner = Runner(1, 4000, 64, 1)
        runner.model.head.weight.data.fill_(torch.nan)
        algorithm = get_algorithm(config("FreeDave", fdfo))
        (request,) = serve(algorithm, runner, [[1, 2, 3]], 1)
        assert request.tokens == [1, 2, 3] + [MASK] * 5 and runner.forwards == 1


BAD = [
    ({"draft_steps": 0}, ValueError, "FreeDave: draft_steps must be at least 1, got 0"),
    ({"draft_steps": 33}, ValueError, "FreeDave: draft_steps must be at most 32, got 33"),
    ({"draft_steps": "4"}, TypeError, "FreeDave: draft_steps must be an int, got str"),
    ({"drafting": "pooled"}, ValueError, "FreeDave: drafting must be one of recycled, nested, got 'pooled'"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=str)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        get_algorithm(config("FreeDave", **settings))


def test_blocks_that_are_not_whole_pages():
    runner = Runner(1, 3000, 64, 3)
    with pytest.raises(ValueError, match="a block of 8 must be whole pages, got pages of 3: use --page-size 1 or 8"):
        get_algorithm(config("FreeDave")).run(runner, batch_of(torch.full((BLOCK,), MASK), None))


def test_data_parallel_attention_is_refused():
    with pytest.raises(ValueError, match="--enable-dp-attention"):
        algo_name_to_cls["FreeDave"].configure_server_args(SimpleNamespace(enable_dp_attention=True))


# The whole engine.

HERE = Path(__file__).parent
ENGINES = {
    "theirs": ("LowConfidence", True, 4000, 16),
    "fdfo": ("FreeDave", True, 4000, 32),
    "sync": ("FreeDave", False, 4000, 32),
    "tight": ("FreeDave", True, 620, 12),  # the cache has to give slots back, and rows are few
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engines")
    save_model(folder / "model")
    (folder / "settings.yaml").write_text("threshold: 1.0")
    found = {}
    for name, (algorithm, fdfo, slots, rows) in ENGINES.items():
        call = {"model": str(folder / "model"), "settings": str(folder / "settings.yaml"), "algorithm": algorithm}
        call |= {"fdfo": fdfo, "slots": slots, "rows": rows}
        (folder / "call.json").write_text(json.dumps(call))
        command = [sys.executable, HERE / "sglang_engine.py", folder / "call.json", folder / f"{name}.json"]
        done = subprocess.run(command, env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1"}, capture_output=True, text=True)
        assert (folder / f"{name}.json").exists(), done.stderr[-5000:]
        found[name] = json.loads((folder / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", ["fdfo", "sync", "tight"])
def test_the_engine_decodes_the_same(engines, name):
    """Two rounds of eight requests, the second from the first one's keys and values in the radix cache."""
    assert engines[name]["rounds"] == engines["theirs"]["rounds"]
    assert engines[name]["cached"][1] > 100
