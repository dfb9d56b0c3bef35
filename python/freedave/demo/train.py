"""Train the demo model on a CPU in under an hour: `python -m freedave.demo.train --minutes 55 --out DIR`.

The objective is that of masked diffusion: of n positions, m are masked, m uniform in 1 .. n, and the loss is the
cross-entropy of the masked ones weighted by n / m (the 1/t of a mask ratio t). One model learns every attention mask
that the decoders use. A sequence is laid out in one of four ways:

    blocks            a noisy copy of the response blocks, then a clean copy of everything. Noisy block b sees clean
                      blocks < b and itself, as decoding with a KV cache does; every block is a training example.
    blocks_unfinished one copy under the block-causal mask: clean blocks, a noisy one, then masks only. Drafting
                      predicts a block while the one before it is still unfinished.
    full              one copy, bidirectional attention, masks anywhere in the response.
    full_unfinished   one copy, bidirectional attention: clean blocks, a noisy one, then masks only, as block-wise
                      decoding sees it.

Blocks are aligned at position 0 of the prompt, as in decoding. Sequences are packed into rows of fixed length, kept
apart by the attention mask, so that nothing is spent on padding and every step has the same shape.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from freedave.demo.tasks import TASKS, Problem, stream
from freedave.demo.tokenizer import EOS, MASK, build_tokenizer

# The multiplication table has the most entries to learn.
MIXTURE = {"addition": 0.26, "subtraction": 0.26, "multiplication": 0.32, "sorting": 0.16}
LAYOUTS = {"blocks": 0.5, "blocks_unfinished": 0.2, "full": 0.1, "full_unfinished": 0.2}
# The decoders' default is 16.
BLOCK_LENGTHS = {4: 0.1, 8: 0.15, 16: 0.55, 32: 0.2}
BLOCK_LENGTH = 16
MAX_NEW_TOKENS = 96
# Everything after the first <eos> is certain; at full weight it would drown the tokens that are not.
PADDING_WEIGHT = 0.1
# Examples to choose from when a row is filled: with this many, rows are 93 % full.
POOL = 32
# Numbers that the workers average besides the gradients.
STATISTICS = 5

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """One laid-out sequence; all arrays have its length.

    `block` and `noisy` say who sees whom (`attention_mask`), `position` is the position id, `weight` the weight of the
    loss at a masked position and 0 elsewhere.
    """

    input_ids: Ints
    target_ids: Ints
    position: Ints
    block: Ints
    noisy: Bools
    weight: Floats

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Batch:
    """Packed examples, all [rows, row_length]; `attention_mask` is bool [rows, 1, row_length, row_length]."""

    input_ids: torch.Tensor
    target_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    weight: torch.Tensor
    examples: int
    tokens: int


class Corpus:
    """Endless training batches, determined by the seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.mask_token_id = token_id(tokenizer, MASK)
        self.eos_token_id = token_id(tokenizer, EOS)
        self.ids = tokenizer.get_vocab()
        self.rng = np.random.default_rng(seed)
        self.streams = {name: stream(name, "train", seed) for name in TASKS}

    def batches(self, rows: int, row_length: int) -> Iterator[Batch]:
        """Batches of `rows` rows, each filled with whole examples, the longest of `POOL` that fits first."""
        pool = [self.example() for _ in range(POOL)]
        while True:
            packed: list[list[Example]] = []
            for _ in range(rows):
                row: list[Example] = []
                room = row_length
                while fitting := [index for index in range(POOL) if len(pool[index]) <= room]:
                    # The oldest one opens the row, so that none waits for ever.
                    index = max(fitting, key=lambda index: len(pool[index])) if row else 0
                    row.append(pool.pop(index))
                    room -= len(row[-1])
                    pool.append(self.example())
                packed.append(row)
            yield collate(packed, row_length)

    def example(self) -> Example:
        """A problem of a random task in a random layout."""
        problem = next(self.streams[self.rng.choice(list(MIXTURE), p=list(MIXTURE.values()))])
        layout = self.rng.choice(list(LAYOUTS), p=list(LAYOUTS.values()))
        block_length = int(self.rng.choice(list(BLOCK_LENGTHS), p=list(BLOCK_LENGTHS.values())))
        if layout == "blocks":
            return self.blocks(problem, block_length)
        if layout == "blocks_unfinished":
            return self.blocks_unfinished(problem, block_length)
        if layout == "full":
            return self.full(problem)
        return self.full_unfinished(problem)

    def blocks(self, problem: Problem, block_length: int) -> Example:
        """The layout `blocks`: noisy response blocks before a clean copy."""
        token_ids, weight = self.block_aligned(problem, block_length)
        prompt = len(problem.prompt)
        position = np.arange(len(token_ids))
        block = position // block_length
        noisy = slice(prompt // block_length * block_length, None)
        # No noisy block sees the last clean block.
        clean = slice(0, len(token_ids) - block_length)
        input_ids, scale = token_ids.copy(), np.zeros(len(token_ids), np.float32)
        for start in range(noisy.start, len(token_ids), block_length):
            self.add_noise(input_ids, scale, max(start, prompt), start + block_length)
        unweighted = np.zeros(clean.stop, np.float32)
        return Example(
            input_ids=np.concatenate((input_ids[noisy], token_ids[clean])),
            target_ids=np.concatenate((token_ids[noisy], token_ids[clean])),
            position=np.concatenate((position[noisy], position[clean])),
            block=np.concatenate((block[noisy], block[clean])),
            noisy=np.arange(len(token_ids) - noisy.start + clean.stop) < len(token_ids) - noisy.start,
            weight=np.concatenate(((scale * weight)[noisy], unweighted)),
        )

    def blocks_unfinished(self, problem: Problem, block_length: int) -> Example:
        """The layout `blocks_unfinished`: clean up to a random block, noise in it, masks after it."""
        token_ids, weight = self.block_aligned(problem, block_length)
        prompt = len(problem.prompt)
        block = np.arange(len(token_ids)) // block_length
        current = int(self.rng.integers(block[prompt], block[-1] + 1)) * block_length
        input_ids, scale = self.unfinished(token_ids, max(current, prompt), current + block_length)
        return single(input_ids, token_ids, block, scale * weight)

    def full(self, problem: Problem) -> Example:
        """The layout `full`: one noise level over the whole response."""
        token_ids, weight = self.response_aligned(problem)
        input_ids, scale = token_ids.copy(), np.zeros(len(token_ids), np.float32)
        self.add_noise(input_ids, scale, len(problem.prompt), len(token_ids))
        return single(input_ids, token_ids, np.zeros(len(token_ids), np.int64), scale * weight)

    def full_unfinished(self, problem: Problem) -> Example:
        """The layout `full_unfinished`: blocks counted from the start of the response."""
        token_ids, weight = self.response_aligned(problem)
        prompt = len(problem.prompt)
        # Past the block with the first <eos> the decoder has stopped.
        blocks = len(problem.response) // BLOCK_LENGTH + 1
        current = prompt + int(self.rng.integers(blocks)) * BLOCK_LENGTH
        input_ids, scale = self.unfinished(token_ids, current, current + BLOCK_LENGTH)
        return single(input_ids, token_ids, np.zeros(len(token_ids), np.int64), scale * weight)

    def unfinished(self, token_ids: Ints, start: int, stop: int) -> tuple[Ints, Floats]:
        """The tokens with noise in [start, stop) and masks after it, and the loss scale of every position."""
        input_ids, scale = token_ids.copy(), np.zeros(len(token_ids), np.float32)
        self.add_noise(input_ids, scale, start, stop)
        input_ids[stop:] = self.mask_token_id
        # What lies further ahead cannot be known yet: train it, at a weight that leaves the current block in charge.
        scale[stop:] = 0.25
        return input_ids, scale

    def add_noise(self, input_ids: Ints, scale: Floats, start: int, stop: int) -> None:
        """Mask m random positions of [start, stop), m uniform in 1 .. n, and set their loss scale to n / m."""
        n = stop - start
        m = int(self.rng.integers(1, n + 1))
        masked = start + self.rng.permutation(n)[:m]
        input_ids[masked] = self.mask_token_id
        scale[masked] = n / m

    def block_aligned(self, problem: Problem, block_length: int) -> tuple[Ints, Floats]:
        """Token ids and loss weights of prompt and response, filled with <eos> to a multiple of the block length."""
        length = len(problem.prompt) + len(problem.response) + 1
        return self.padded(problem, -(-length // block_length) * block_length)

    def response_aligned(self, problem: Problem) -> tuple[Ints, Floats]:
        """Token ids and loss weights of prompt and response, the response filled to a random number of blocks."""
        blocks = self.rng.integers(len(problem.response) // BLOCK_LENGTH + 1, MAX_NEW_TOKENS // BLOCK_LENGTH + 1)
        return self.padded(problem, len(problem.prompt) + int(blocks) * BLOCK_LENGTH)

    def padded(self, problem: Problem, length: int) -> tuple[Ints, Floats]:
        """Token ids and loss weights of prompt and response, filled with <eos> to the length."""
        text = [self.ids[character] for character in problem.prompt + problem.response]
        token_ids = np.full(length, self.eos_token_id, np.int64)
        token_ids[: len(text)] = text
        weight = np.ones(length, np.float32)
        weight[len(text) + 1 :] = PADDING_WEIGHT
        return token_ids, weight


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token of the vocabulary."""
    return tokenizer.get_vocab()[token]


def single(input_ids: Ints, target_ids: Ints, block: Ints, weight: Floats) -> Example:
    """An example of one copy: every position sees its own and all earlier blocks."""
    return Example(input_ids, target_ids, np.arange(len(input_ids)), block, np.zeros(len(input_ids), np.bool_), weight)


def collate(packed: list[list[Example]], row_length: int) -> Batch:
    """The packed rows as tensors, with the attention mask that keeps their examples apart."""
    shape = (len(packed), row_length)
    input_ids, target_ids, position, block = (np.zeros(shape, np.int64) for _ in range(4))
    segment = np.full(shape, -1)
    noisy, weight = np.zeros(shape, np.bool_), np.zeros(shape, np.float32)
    for row, examples in enumerate(packed):
        start = 0
        for index, example in enumerate(examples):
            span = (row, slice(start, start + len(example)))
            input_ids[span], target_ids[span] = example.input_ids, example.target_ids
            position[span], block[span] = example.position, example.block
            noisy[span], weight[span], segment[span] = example.noisy, example.weight, index
            start += len(example)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        target_ids=torch.from_numpy(target_ids),
        position_ids=torch.from_numpy(position),
        attention_mask=torch.from_numpy(attention_mask(segment, block, noisy)[:, None]),
        weight=torch.from_numpy(weight),
        examples=sum(map(len, packed)),
        tokens=int((segment >= 0).sum()),
    )


def attention_mask(segment: Ints, block: Ints, noisy: Bools) -> Bools:
    """[rows, length, length]: which query (second axis) sees which key (third).

    A clean key is seen from later blocks, and from clean positions of its own; a noisy key from noisy positions of its
    own block. Unused positions (segment -1) see each other, so that no row of the mask is empty.
    """
    same_segment = segment[:, :, None] == segment[:, None, :]
    query, key = block[:, :, None], block[:, None, :]
    own = (query == key) & (noisy[:, :, None] == noisy[:, None, :])
    seen: Bools = same_segment & (own | ((key < query) & ~noisy[:, None, :]))
    return seen


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """The untrained model; its config carries what a decoder must know about it."""
    decoding: dict[str, Any] = {
        "mask_token_id": token_id(tokenizer, MASK),
        "eos_token_id": token_id(tokenizer, EOS),
        "pad_token_id": token_id(tokenizer, EOS),
        "block_length": BLOCK_LENGTH,
        "attention": "block_causal",
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        # Short wavelengths tell positions of a short sequence apart; at the usual 1e6 most dimensions are constants.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        **decoding,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def build_optimizers(model: Qwen3ForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, progress: float) -> float:
    """The learning rate's factor: warm-up in steps, plateau, and linear decay to zero at a progress (in time) of 1."""
    warm_up, decay = 100, 0.6
    return max(0.0, min(1.0, (step + 1) / warm_up, (1.0 - progress) / decay))


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, report: dict[str, object], out: Path) -> None:
    """The checkpoint folder: config, weights and tokenizer in the Hugging Face layout, and the training report."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The model is decoded by diffusion; the settings of autoregressive generation would only mislead.
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


@dataclass(frozen=True)
class Exchange:
    """The mean of one vector per worker, through shared memory.

    `slots` is [2, workers, size], used in turn: a worker can be at most one step ahead of another, so one barrier a
    step is enough. Workers of one thread each lose less to other processes on the machine than one worker of many
    threads, whose threads wait for each other in every operation.
    """

    slots: torch.Tensor
    barrier: Barrier

    def mean(self, step: int, worker: int, vector: torch.Tensor) -> torch.Tensor:
        """The mean of the vectors that the workers bring to this step, bitwise the same for each of them."""
        slot = self.slots[step % 2]
        slot[worker] = vector
        self.barrier.wait()
        return slot.mean(0)


@dataclass
class Progress:
    """What the report is written from: means over the workers, and sums over the steps."""

    minutes: float = 0.0
    cpu_minutes: float = 0.0
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    loss: float = math.nan

    def report(self, arguments: argparse.Namespace) -> dict[str, object]:
        """The report as it goes to `training.json`."""
        command = f"python -m freedave.demo.train --minutes {arguments.minutes:g} --seed {arguments.seed}"
        return {"command": command, "workers": arguments.workers} | {
            name: round(value, 5) for name, value in vars(self).items()
        }


def gradients(
    model: Qwen3ForCausalLM, backbone: Callable[..., Any], batch: Batch, bf16: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The loss of a batch and its gradients, one a parameter."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = backbone(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
    masked = batch.weight.flatten().nonzero().squeeze(1)
    logits = model.lm_head(hidden.flatten(0, 1)[masked].float())
    weight = batch.weight.flatten()[masked]
    losses = functional.cross_entropy(logits, batch.target_ids.flatten()[masked], reduction="none")
    loss = (losses * weight).sum() / weight.sum()
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def train(worker: int, arguments: argparse.Namespace, exchange: Exchange) -> None:
    """Train for the given minutes of wall time; worker 0 leaves the checkpoint in `arguments.out`."""
    start, cpu_start = time.monotonic(), time.process_time()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, arguments.seed)
    optimizers = build_optimizers(model, arguments.muon_lr, arguments.adam_lr)
    base_lr = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    backbone = torch.compile(model.model) if arguments.compile else model.model
    corpus = Corpus(tokenizer, arguments.seed * arguments.workers + worker)

    progress = Progress()
    next_save = arguments.save_every
    for step, batch in enumerate(corpus.batches(arguments.rows // arguments.workers, arguments.row_length)):
        loss, grads = gradients(model, backbone, batch, arguments.bf16)
        minutes, cpu_minutes = (time.monotonic() - start) / 60, (time.process_time() - cpu_start) / 60
        mine = torch.tensor([minutes, cpu_minutes, batch.examples, batch.tokens, loss])
        assert len(mine) == STATISTICS
        mean = exchange.mean(step, worker, torch.cat([mine, *(grad.flatten() for grad in grads)]))

        # The clock is averaged as the gradients are, so that all workers take the same step and stop at the same one.
        minutes, cpu_minutes, examples, tokens, loss_mean = mean[: len(mine)].tolist()
        progress.minutes, progress.cpu_minutes = minutes, cpu_minutes * arguments.workers
        progress.steps = step + 1
        progress.examples += round(examples * arguments.workers)
        progress.tokens += round(tokens * arguments.workers)
        progress.loss = loss_mean if math.isnan(progress.loss) else 0.98 * progress.loss + 0.02 * loss_mean
        for parameter, grad in zip(
            model.parameters(), mean[len(mine) :].split([grad.numel() for grad in grads]), strict=True
        ):
            parameter.grad = grad.view_as(parameter)
        for optimizer, lr in zip(optimizers, base_lr, strict=True):
            optimizer.param_groups[0]["lr"] = lr * learning_rate(step, minutes / arguments.minutes)
            optimizer.step()

        finished = minutes >= arguments.minutes
        if worker == 0 and (finished or minutes >= next_save):
            save(model, tokenizer, progress.report(arguments), arguments.out)
            next_save = minutes + arguments.save_every
        if worker == 0 and (finished or step % 20 == 0):
            print(json.dumps(progress.report(arguments)), flush=True)
        if finished:
            break


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=55.0, help="wall time to train for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--rows", type=int, default=16, help="packed rows a step, over all workers")
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=5e-3)
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between intermediate checkpoints")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    arguments = parser.parse_args()
    if arguments.rows % arguments.workers:
        parser.error(f"--rows {arguments.rows} cannot be shared by {arguments.workers} workers")

    parameters = sum(p.numel() for p in build_model(build_tokenizer(), arguments.seed).parameters())
    print(f"{parameters:,} parameters", flush=True)
    slots = torch.zeros(2, arguments.workers, STATISTICS + parameters).share_memory_()
    exchange = Exchange(slots, multiprocessing.get_context("spawn").Barrier(arguments.workers))
    spawn(train, (arguments, exchange), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
