"""SGLang: algorithms for its diffusion language models, registered through its plug-in entry point.

    sglang serve --model-path ... --dllm-algorithm FreeDave --dllm-algorithm-config settings.yaml

`FreeDaveLowConfidence` and `FreeDaveJointThreshold` are SGLang's own rules on our kernels: one pass over the logits, and no
read by the host but that of the list which `step` returns. `FreeDave` commits what `LowConfidence` commits, in fewer
forwards: it drafts several steps of a block from one prediction and verifies them in the next forward.

Written for SGLang 0.5.23. Nothing but this module imports it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from sglang.srt.dllm.algorithm.joint_threshold import JointThreshold
from sglang.srt.dllm.algorithm.low_confidence import LowConfidence

import freedave_kernels as fk
from freedave.integers import as_int
from freedave.integrations.step_schedule import as_torch_compares
from freedave_kernels.contract import COUNTERS, DRAFTINGS, MAX_DRAFTS

if TYPE_CHECKING:
    from sglang.srt.dllm.config import DllmConfig
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

ACCEPTED, STEPS, PREFIX_LENGTH, FINISHED, NUM_DRAFTS = (
    COUNTERS.index(name) for name in ("accepted", "steps", "prefix_length", "finished", "num_drafts")
)

# A prompt's token that has the mask's id, where only ids tell what is masked. No token has this one; no model sees it.
LITERAL = -1


def register() -> None:
    """What the entry point `sglang.srt.plugins` calls, in every process of SGLang and before models load."""
    from sglang.srt.dllm.algorithm import algo_name_to_cls
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for algorithm in (FreeDave, FreeDaveLowConfidence, FreeDaveJointThreshold):
        algo_name_to_cls[algorithm.__name__] = algorithm
    worker = "sglang.srt.managers.tp_worker.TpModelWorker"
    HookRegistry.register(f"{worker}._forward_batch_generation_dllm", _with_tree_cache, HookType.AROUND)


def _with_tree_cache(
    generate: Callable[..., Any], worker: Any, forward_batch: ForwardBatch, batch: Any = None, **rest: Any
) -> Any:
    """Tells `FreeDave` of the prefix cache, which holds all memory of a busy server: drafts need some of it for a forward."""
    if isinstance(worker.dllm_algorithm, FreeDave) and batch is not None:
        worker.dllm_algorithm.tree_cache = batch.tree_cache
    return generate(worker, forward_batch, batch, **rest)


class FreeDaveLowConfidence(LowConfidence):
    """`LowConfidence` on our kernels: what is more certain than `threshold`, else the most certain position.

    Equal confidences go to the lowest position. A block in which nothing can be predicted (no finite logits) is done.
    """

    def step(self, forward_batch: ForwardBatch, full_logits: torch.Tensor, states: list[Any]) -> list[bool]:
        input_ids = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size)
        logits = full_logits.view(*input_ids.shape, -1)
        masked = input_ids == self.mask_id
        if forward_batch.dllm_prompt_mask is not None:
            masked &= ~forward_batch.dllm_prompt_mask
        token_ids, confidence = fk.predict_tokens(logits, input_ids, self.mask_id, mask_index=masked)
        transfer = fk.select_transfer(confidence, masked, threshold=as_torch_compares(self.threshold), rule="strict")
        input_ids.copy_(torch.where(transfer, token_ids, input_ids))
        return (~transfer.any(1)).tolist()


class FreeDaveJointThreshold(JointThreshold):
    """`JointThreshold` on our kernels: masks are filled above one threshold, filled positions changed above another.

    The whole batch at once, with and without `--dllm-fdfo`. Equal confidences go to the lowest position.
    """

    def __init__(self, config: DllmConfig) -> None:
        super().__init__(config)
        self._use_shared_state = False

    def step(self, forward_batch: ForwardBatch, full_logits: torch.Tensor, states: list[Any]) -> list[bool]:
        input_ids = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size)
        logits = full_logits.view(*input_ids.shape, -1)
        if self.penalty_lambda > 0:
            before = input_ids[:, :-1, None]
            logits[:, 1:].scatter_add_(2, before, torch.full_like(before, -self.penalty_lambda, dtype=logits.dtype))
        prompt = torch.stack([state["prompt_mask"] for state in states])
        token_ids, confidence = fk.predict_tokens(logits, input_ids, self.mask_id, mask_index=~prompt)
        masked = (input_ids == self.mask_id) & ~prompt

        known = [[state["finished"] for state in states], [state["post_edit_steps"] for state in states]]
        finished, post_edit_steps = torch.tensor(known, dtype=torch.int64).to(input_ids.device, non_blocking=True)
        only_edits = (finished == 0) & ~masked.any(1)
        post_edit_steps = post_edit_steps + only_edits
        goes_on = (finished == 0) & ~(only_edits & (post_edit_steps > self.max_post_edit_steps))

        transfer = fk.select_transfer(confidence, masked, threshold=as_torch_compares(self.threshold), rule="strict")
        transfer |= (confidence > self.edit_threshold) & (token_ids != input_ids) & ~masked & ~prompt
        transfer &= goes_on[:, None]
        input_ids.copy_(torch.where(transfer, token_ids, input_ids))

        found = torch.stack([~(goes_on & transfer.any(1)), post_edit_steps]).tolist()
        for state, done, steps in zip(states, *found, strict=True):
            state["finished"], state["post_edit_steps"] = bool(done), steps
        return [state["finished"] for state in states]


class _Block(NamedTuple):
    """A request's block between two forwards: drafts `[K, L]`, the first `active` of which come next; draft 0 is final."""

    drafts: torch.Tensor
    active: int


class _Windows:
    """Slots for the keys and values of `count` drafts, and rows of the token-to-slot table, until `release`."""

    def __init__(self, model_runner: ModelRunner, count: int, block_size: int) -> None:
        self._table = model_runner.req_to_token_pool
        self._allocator = model_runner.token_to_kv_pool_allocator
        rows = self._table.alloc_rows(count)
        slots = None if rows is None else self._allocator.alloc(count * block_size)
        if slots is None:
            if rows is not None:
                self._table.free_rows(rows)
            raise RuntimeError(f"FreeDave: SGLang had room for {count} drafts, and now has none")
        self.rows: list[int] = rows
        self.slots = slots.clone().view(count, block_size)  # a part of the allocator's own list

    def release(self) -> None:
        self._table.free_rows(self.rows)
        self._allocator.free_segment(self.slots.view(-1), start_pos=0)


class FreeDave(DllmAlgorithm):
    """Draft-and-verify: the tokens of `LowConfidence` with the same threshold, in fewer forwards.

    A forward computes up to `draft_steps` drafts of a request's block, each a request of its own to the model: they share the
    slots of the prefix, and all but the first, which has the request's own, borrow a window of slots for that forward. Where
    the pool has less room, there are fewer drafts. The finished block's slots go to the request; the others are given back.

    Settings (`--dllm-algorithm-config`): `threshold` (0.95; with 1 each step commits one token: static decoding),
    `draft_steps` (4), `drafting` ("recycled" or "nested").

    A position whose arg max is the mask itself is left out; `LowConfidence` fills it with the mask. A block in which nothing
    can be predicted is done as it is, with a warning.
    """

    supported_architectures = ("LLaDA2MoeModelLM", "SDARForCausalLM", "SDARMoeForCausalLM")

    def __init__(self, config: DllmConfig) -> None:
        super().__init__(config)
        settings = config.algorithm_config
        self.draft_steps = as_int("FreeDave", "draft_steps", settings.get("draft_steps", 4), minimum=1)
        if self.draft_steps > MAX_DRAFTS:
            raise ValueError(f"FreeDave: draft_steps must be at most {MAX_DRAFTS}, got {self.draft_steps}")
        self.drafting = settings.get("drafting", "recycled")
        if self.drafting not in DRAFTINGS:
            raise ValueError(f"FreeDave: drafting must be one of {', '.join(DRAFTINGS)}, got {self.drafting!r}")
        self.threshold = settings.get("threshold", 0.95)
        self.tree_cache: Any = None

    @classmethod
    def configure_server_args(cls, server_args: Any) -> None:
        from sglang.srt.arg_groups.overrides import resolving_view

        if resolving_view(server_args).enable_dp_attention:
            raise ValueError(
                "FreeDave: --enable-dp-attention makes all ranks compute as many tokens, and drafts are as many as each "
                "rank has room for: leave it out, or use --dllm-algorithm FreeDaveLowConfidence"
            )

    def init_step_state(self, forward_batch: ForwardBatch) -> list[Any]:
        input_ids = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size).clone()
        if forward_batch.dllm_prompt_mask is not None:
            input_ids.masked_fill_(forward_batch.dllm_prompt_mask & (input_ids == self.mask_id), LITERAL)
        return [_Block(drafts[None], 1) for drafts in input_ids]

    def run(self, model_runner: ModelRunner, forward_batch: ForwardBatch, algo_states: list[Any] | None = None) -> Any:
        """A block of each request, or with `--dllm-fdfo` one forward of it; what it returns is `DllmAlgorithm.run`'s."""
        batch_size, page = forward_batch.batch_size, model_runner.token_to_kv_pool_allocator.page_size
        if self.block_size % page:
            raise ValueError(
                f"FreeDave: a block of {self.block_size} must be whole pages, got pages of {page}: use --page-size 1 or "
                f"{self.block_size}"
            )
        starts = [] if self.fdfo else self._block_start_list(forward_batch)
        if starts and all(start == self.block_size for start in starts):
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
            return out.logits_output, [], None, None, out.can_run_graph

        blocks = self.init_step_state(forward_batch)
        for i, carried in enumerate(algo_states or []):
            if carried is not None:
                blocks[i] = carried
        done = [False] * batch_size
        while True:
            out = self._advance(model_runner, forward_batch, blocks, done)
            if self.fdfo or all(done):
                break

        input_ids = forward_batch.input_ids.view(batch_size, self.block_size)
        if not self.fdfo:
            tokens = [input_ids[i, start:] for i, start in enumerate(starts)]
            return out.logits_output, tokens, None, None, out.can_run_graph
        lengths = [self.block_size if each else 0 for each in done]
        states = [None if each else block for each, block in zip(done, blocks, strict=True)]
        return out.logits_output, input_ids.tolist(), lengths, states, out.can_run_graph

    def _advance(
        self, model_runner: ModelRunner, forward_batch: ForwardBatch, blocks: list[_Block], done: list[bool]
    ) -> Any:
        """One forward over the drafts of all requests that are not done; changes `blocks`, `done` and the batch's ids."""
        active = [i for i, each in enumerate(done) if not each]
        counts = self._with_room(model_runner, [blocks[i].active for i in active])
        request = [i for i, count in zip(active, counts, strict=True) for _ in range(count)]
        draft = [j for count in counts for j in range(count)]
        device = forward_batch.input_ids.device
        of_block = _on(device, [n for n, count in enumerate(counts) for _ in range(count)])
        of_draft, num_drafts, requests = _on(device, draft), _on(device, counts), _on(device, active)

        drafts = torch.stack([_padded(blocks[i].drafts, self.draft_steps) for i in active])[:, : max(counts)]
        windows = _Windows(model_runner, len(draft) - len(active), self.block_size) if max(counts) > 1 else None
        try:
            ids = drafts[of_block, of_draft]
            batch = self._draft_batch(model_runner, forward_batch, ids, request, draft, windows)
            out = model_runner.forward(batch, pp_proxy_tensors=None)
            logits = out.logits_output.full_logits.view(*ids.shape, -1)
            found_ids, found_confidence = fk.predict_tokens(logits, ids, self.mask_id)
            token_ids = drafts.clone()
            confidence = torch.full(drafts.shape, float("-inf"), dtype=torch.float32, device=device)
            token_ids[of_block, of_draft], confidence[of_block, of_draft] = found_ids, found_confidence
            step = fk.draft_step(
                drafts, token_ids, confidence, num_drafts, self.mask_id, self.draft_steps,
                threshold=as_torch_compares(self.threshold), rule="strict", drafting=self.drafting,
            )  # fmt: skip
            committed = torch.where(step.drafts[:, 0] == LITERAL, self.mask_id, step.drafts[:, 0])
            forward_batch.input_ids.view(-1, self.block_size)[requests] = committed

            finished = []
            for n, (i, record) in enumerate(zip(active, step.counters.tolist(), strict=True)):
                blocks[i] = _Block(step.drafts[n], max(record[NUM_DRAFTS], 1))
                if record[PREFIX_LENGTH] == self.block_size:
                    done[i] = True
                    finished.append((i, sum(counts[:n]) + record[ACCEPTED]))
                elif not record[STEPS] and not record[FINISHED]:
                    logger.warning(
                        "FreeDave: a block ends with masks in it: no finite logits, or the mask was predicted"
                    )
                    done[i] = True
            if windows is not None:
                self._keep(model_runner, forward_batch, windows, draft, finished)
        finally:
            if windows is not None:
                windows.release()
        return out

    def _with_room(self, model_runner: ModelRunner, counts: list[int]) -> list[int]:
        """How many drafts of each request can be computed: all, or as many as there is room for."""
        wanted = sum(counts) - len(counts)
        allocator = model_runner.token_to_kv_pool_allocator
        if wanted and self.tree_cache is not None:
            allocator.evict_to_free_tokens(self.tree_cache, wanted * self.block_size)
        room = min(model_runner.req_to_token_pool.available_size(), allocator.available_size() // self.block_size)
        return counts if room >= wanted else [min(count, 1 + room // len(counts)) for count in counts]

    def _draft_batch(
        self,
        model_runner: ModelRunner,
        forward_batch: ForwardBatch,
        ids: torch.Tensor,
        request: Sequence[int],
        draft: Sequence[int],
        windows: _Windows | None,
    ) -> ForwardBatch:
        """A batch in which every draft is a request: `ids [R, L]`, of the batch's `request[r]`, its draft `draft[r]`."""
        size, device = self.block_size, ids.device
        rows = _on(device, request)
        batch = copy.copy(forward_batch)
        for name in ("seq_lens", "orig_seq_lens", "extend_seq_lens", "extend_prefix_lens", "req_pool_indices",
                     "dllm_prompt_mask"):  # fmt: skip
            _set(batch, name, lambda values: values[rows])
        for name in ("seq_lens_cpu", "req_pool_indices_cpu"):
            _set(batch, name, lambda values: values[request])
        for name in ("extend_prefix_lens_cpu", "extend_seq_lens_cpu", "extend_logprob_start_lens_cpu", "lora_ids", "rids",
                     "top_logprobs_nums", "token_ids_logprobs", "mm_inputs"):  # fmt: skip
            _set(batch, name, lambda values: [values[i] for i in request])
        slots = _own_slots(forward_batch).view(-1, size)[rows]
        if windows is not None:
            of_window = [r for r, j in enumerate(draft) if j]
            borrowing, lent = _on(device, of_window), _on(device, windows.rows)
            own = batch.req_pool_indices[borrowing]
            table = model_runner.req_to_token_pool.req_to_token
            longest = table.shape[1] if batch.seq_lens_cpu is None else int(batch.seq_lens_cpu.max())
            table[lent, :longest] = table[own, :longest]
            table[lent[:, None], self._columns(batch.seq_lens[borrowing])] = windows.slots.to(table.dtype)
            batch.req_pool_indices[borrowing] = lent.to(own.dtype)
            slots[borrowing] = windows.slots.to(slots.dtype)
            if batch.req_pool_indices_cpu is not None:
                batch.req_pool_indices_cpu[of_window] = torch.tensor(windows.rows)

        batch.batch_size, batch.extend_num_tokens = len(request), len(request) * size
        batch.input_ids = torch.where(ids == LITERAL, self.mask_id, ids).view(-1)
        batch.positions = forward_batch.positions.view(-1, size)[rows].view(-1)
        _set(
            batch, "extend_start_loc", lambda values: torch.arange(len(request), device=device).to(values.dtype) * size
        )
        _set(batch, "seq_lens_sum", lambda _: None if batch.seq_lens_cpu is None else int(batch.seq_lens_cpu.sum()))
        batch._init_num_token_non_padded(device=device, is_draft_worker=model_runner.is_draft_worker)
        batch.out_cache_loc, batch.out_cache_loc_virtual = slots.view(-1), None
        model_runner.kv_index_translator.own_plan(batch).bind(batch, model_runner.kv_index_translator)
        return batch

    def _columns(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """The block's columns `[R, L]` in the token-to-slot table."""
        first = seq_lens[:, None].long() - self.block_size
        return first + torch.arange(self.block_size, device=seq_lens.device)

    def _keep(
        self,
        model_runner: ModelRunner,
        forward_batch: ForwardBatch,
        windows: _Windows,
        draft: Sequence[int],
        finished: list[tuple[int, int]],
    ) -> None:
        """Exchanges the slots of requests `i` for those of their accepted drafts, rows `r` of the forward."""
        exchanged = [(i, sum(1 for j in draft[:r] if j)) for i, r in finished if draft[r]]
        if not exchanged:
            return
        requests, accepted = (_on(windows.slots.device, each) for each in zip(*exchanged, strict=True))
        table = model_runner.req_to_token_pool.req_to_token
        columns = self._columns(forward_batch.seq_lens[requests])
        rows = forward_batch.req_pool_indices[requests][:, None]
        own = table[rows, columns]
        table[rows, columns] = windows.slots[accepted].to(table.dtype)
        windows.slots[accepted] = own.to(windows.slots.dtype)


def _on(device: torch.device, numbers: Sequence[int]) -> torch.Tensor:
    """Integers on the device; the host does not wait until they are there."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def _padded(drafts: torch.Tensor, count: int) -> torch.Tensor:
    """Drafts `[K, L]` as `count` of them."""
    return drafts if len(drafts) == count else drafts.expand(count, -1)


def _own_slots(forward_batch: ForwardBatch) -> torch.Tensor:
    """The slots of a batch as the allocator names them; a unified pool's kernels have other names."""
    virtual = forward_batch.out_cache_loc_virtual
    return forward_batch.out_cache_loc if virtual is None else virtual


def _set(batch: ForwardBatch, name: str, change: Callable[[Any], Any]) -> None:
    """Changes a field that the batch has."""
    values = getattr(batch, name)
    if values is not None:
        setattr(batch, name, change(values))
