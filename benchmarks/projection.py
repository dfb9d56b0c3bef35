"""From the features of a forward to its predictions: logits in slices of the vocabulary, as the decoder makes them, against
all of them at once. Time, and the most memory that either takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import transformers

import freedave
import freedave_kernels as fk
from benchmarks import eager
from benchmarks.cases import Call, dtype_name
from benchmarks.peak_memory import PeakMemory
from benchmarks.processor import Processor
from benchmarks.record import Record, shape_text
from benchmarks.scenes import MASK
from freedave.forward.prediction import Predictor

ROUNDS, BUDGET = 20, 4.0
SLICES, WHOLE, EAGER = "slices", "all logits", "all logits, eager"
ROWS = [4, 32, 256]  # a step of static decoding in blocks of 4 and 32, and eight drafts of it
PROJECTIONS = [(151936, 1024), (32768, 256)]  # V and H


def run(record: Record, quick: bool) -> None:
    processor = Processor(3, quick=True) if quick else Processor(ROUNDS, BUDGET)
    shapes = [(5000, 16)] if quick else PROJECTIONS
    for (vocab, width), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        lm = language_model(vocab, width, dtype)
        for rows in [4, 8] if quick else ROWS:
            calls = providers(lm, rows, width, dtype)
            shape = {"V": vocab, "H": width, "rows": rows}
            record.add("projection", shape, dtype_name(dtype), processor.times(calls), baseline=WHOLE)
            for provider, call in calls.items():
                count(record, shape, dtype_name(dtype), provider, call)


def language_model(vocab: int, width: int, dtype: torch.dtype) -> freedave.DiffusionLM:
    """Nothing but a projection is used of it."""
    config = transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=8,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    model: torch.nn.Module = transformers.Qwen3ForCausalLM(config)
    return freedave.DiffusionLM(model.to(dtype=dtype), MASK, block_length=32)


def providers(lm: freedave.DiffusionLM, rows: int, width: int, dtype: torch.dtype) -> dict[str, Call]:
    features, input_ids = torch.randn(rows, width).to(dtype), torch.full((rows,), MASK)
    predictor = Predictor(lm)
    return {
        SLICES: lambda: predictor(features, input_ids),
        WHOLE: lambda: fk.predict_tokens(lm.project(features), input_ids, MASK, suppress_tokens=[MASK]),
        EAGER: lambda: eager.predict_tokens(lm.project(features)[None], input_ids[None], MASK),
    }


def count(record: Record, shape: dict[str, int], dtype: str, provider: str, call: Callable[[], object]) -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        call()
    text = f"{'':<16}{shape_text(shape):<36}{dtype:<10}{provider:<20}at most {memory.peak / 2**20:.1f} MiB"
    record.put("memory", text, op="projection", shape=shape, dtype=dtype, provider=provider, peak_bytes=memory.peak)
