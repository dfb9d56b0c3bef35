"""Decodes cases with a model in shards: a program, which tests start. It imports once, and forks a process for each shard.

    python tensor_parallel_shards.py cases.json results

cases.json: a list of {"folder", "count", "options", "prompts"}. Each process writes what it decoded to
results/RANK-of-COUNT.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

import freedave
from freedave.forward.shards import Ranks


def decode(lm: freedave.DiffusionLM, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in all processes."""
    out = freedave.generate(lm, torch.tensor(prompts), **options)
    return {"tokens": out.sequences.tolist(), "steps": out.step_map.tolist(), "forwards": out.num_forwards}


def check_sums(ranks: Ranks) -> None:
    """The sum of a row has the same bits among few rows and among many."""
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(ranks.rank))
    sums = ranks.sum(rows)
    for few in (1, 4, 12, 36):
        assert torch.equal(ranks.sum(rows[:few]), sums[:few])


def check_refusal(lm: freedave.DiffusionLM, ranks: Ranks) -> None:
    """Processes that do not decode the same say so, all of them; then they can decode."""
    last = ranks.count - 1
    for prompts, options in (
        ([[1, 2, 3 + ranks.rank // last]], {}),
        ([[1, 2, 3]], {"draft_steps": 4 + ranks.rank // last}),
    ):
        with pytest.raises(ValueError, match=f"not those of process 0 has {last}"):
            decode(lm, prompts, {"max_new_tokens": 4, **options})


def run_rank(rank: int, count: int, cases: list[dict[str, Any]], results: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # a seed that chance gives must not differ
    os.environ.pop("RANK", None)
    meeting = f"file://{results}/meeting-of-{count}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    check_sums(Ranks(rank, count))
    found = []
    for case in cases:
        lm = freedave.load_model(case["folder"], tensor_parallel=True)
        found.append(decode(lm, case["prompts"], case["options"]))
    check_refusal(lm, Ranks(rank, count))
    (results / f"{rank}-of-{count}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def main() -> None:
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for count in sorted({case["count"] for case in cases}):
        own = [case for case in cases if case["count"] == count]
        torch.multiprocessing.start_processes(run_rank, (count, own, results), nprocs=count, start_method="fork")


if __name__ == "__main__":
    main()
