"""Decodes with SGLang's own engine on a CPU: its scheduler, model runner, SDAR model, radix cache and attention.

Usage: sglang_engine.py SETTINGS OUTPUT, two JSON files: what `main` takes, and the tokens of two rounds of requests. The
scheduler and the detokenizer are processes of their own, which load our plug-in as those of a server do.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def save_model(folder: Path) -> None:
    """A random model of two layers that SGLang takes for SDAR: blocks of 4, mask 151669."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=151680, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        intermediate_size=96, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"architectures": ["SDARForCausalLM"]}))


def main(model: str, settings: str, algorithm: str, fdfo: bool, slots: int, rows: int) -> dict[str, Any]:
    import sglang

    engine = sglang.Engine(
        model_path=model, device="cpu", dtype="float32", attention_backend="torch_native", sampling_backend="pytorch",
        grammar_backend="none", skip_tokenizer_init=True, disable_cuda_graph=True, disable_overlap_schedule=True,
        mem_fraction_static=0.05, max_total_tokens=slots, max_running_requests=rows, log_level="error",
        dllm_algorithm=algorithm, dllm_algorithm_config=settings, dllm_fdfo=fdfo,
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (8,), generator=random).tolist()
    prompts = [torch.randint(1000, (length,), generator=random).tolist() for length in lengths]
    rounds, cached = [], []
    for _ in range(2):
        sampling = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        rounds.append([answer["output_ids"] for answer in answers])
        cached.append(sum(answer["meta_info"]["cached_tokens"] for answer in answers))
        # The second round goes on from keys and values that the first one has left in the cache.
        prompts = [prompt + answer[:12] for prompt, answer in zip(prompts, rounds[0], strict=True)]
        time.sleep(2)  # an idle scheduler looks for slots and rows that are lost, and ends where there are
    engine.generate(input_ids=[[1, 2, 3]], sampling_params=sampling)
    engine.shutdown()
    return {"rounds": rounds, "cached": cached}


if __name__ == "__main__":
    found = main(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
