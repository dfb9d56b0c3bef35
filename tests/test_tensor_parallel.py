"""Tensor parallelism: a model in shards, one a process, decodes what it decodes whole."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from published_configs import MASK
from published_layouts import write_published
from quantised_checkpoints import change_config, scheme, write_native
from tensor_parallel_shards import decode

import freedave
from freedave.cli import main
from freedave.forward.shards import Ranks, ShardedHead, vocabulary_bounds
from freedave.models.description import describe
from freedave.models.tensor_parallel import shard

SECONDS = 300  # a machine that many tests share; alone, it takes a tenth


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A program that starts processes, which all end with it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as program:
        try:
            out, err = program.communicate(timeout=SECONDS)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(arguments, program.returncode, out, err)


def random_prompts(count: int, length: int = 7) -> list[list[int]]:
    return torch.randint(MASK, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


DRAWN = {"temperature": 0.8, "seed": 5}
# The changes to a published configuration, and how to decode. A vocabulary of 9,000 is three states of `partial_predictions`.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llada", {}, {"draft_steps": 1}),
    ("llada", {}, {"draft_steps": 8}),
    ("llada", {"weight_tying": True}, {"draft_steps": 8, "cache": "dual", "block_length": 8}),
    ("dream", {}, {"draft_steps": 1}),
    ("dream", {}, {"draft_steps": 8}),
    ("dream", {}, {"draft_steps": 8, "executor": "graph", "cache": "prefix", "block_length": 8}),
    ("sdar", {}, {"draft_steps": 1}),
    ("sdar", {}, {"draft_steps": 8}),
    ("sdar", {}, {"draft_steps": 8, "executor": "graph"}),
    ("sdar", {}, {"draft_steps": "auto"}),
    ("sdar", {}, {"draft_steps": "auto", "executor": "graph"}),
    ("sdar", {}, {"draft_steps": 8, **DRAWN}),
    ("sdar", {"vocab_size": 9000}, {"draft_steps": 8, **DRAWN}),
    ("sdar", {"vocab_size": 9000}, {"draft_steps": 8, **DRAWN, "top_k": 40}),
    ("sdar", {"vocab_size": 9000}, {"draft_steps": 8, "measure": "neg_entropy"}),
    ("stable_diffcoder", {"attention_bias": True, "mlp_bias": True}, {"draft_steps": 8}),
    ("fast_dllm", {}, {"draft_steps": 8, "executor": "graph"}),
]


def write_cases(folder: Path) -> list[dict[str, Any]]:
    cases = []
    for number, (family, changes, options) in enumerate(CASES):
        model, _, _ = write_published(folder / str(number), family, **changes)
        options = {"max_new_tokens": 32, **options}
        cases.append({"folder": str(model), "count": 2, "options": options, "prompts": random_prompts(2)})
    # With four processes, what they sum has an order.
    four, _, _ = write_published(folder / "four", "llada", n_kv_heads=4)
    for draft_steps in (1, 8):
        options = {"max_new_tokens": 32, "draft_steps": draft_steps}
        cases.append({"folder": str(four), "count": 4, "options": options, "prompts": random_prompts(2)})
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 20}
    cases.append({"folder": str(four), "count": 2, "options": options, "prompts": random_prompts(1)})
    return cases


def test_shards_decode_what_the_whole_model_decodes(tmp_path: Path) -> None:
    """One test, as starting processes takes most of its time."""
    cases = write_cases(tmp_path)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("tensor_parallel_shards.py")
    program = run_program(str(worker), str(tmp_path / "cases.json"), str(tmp_path))
    assert program.returncode == 0, program.stderr
    found: dict[int, Any] = {}
    for count in (2, 4):
        texts = [(tmp_path / f"{rank}-of-{count}.json").read_text() for rank in range(count)]
        assert len(set(texts)) == 1  # a seed that chance gave, and the number of drafts that a clock chose, too
        found[count] = iter(json.loads(texts[0]))
    for case in cases:
        ours, options = next(found[case["count"]]), case["options"]
        if options.get("temperature") and "seed" not in options:
            continue
        whole = decode(freedave.load_model(case["folder"]), case["prompts"], options)
        if options["draft_steps"] == "auto":  # clocks choose
            del ours["forwards"], whole["forwards"]
        assert ours == whole, f"{case['folder']} in {case['count']} shards with {options}"


def test_the_command_line(tmp_path: Path) -> None:
    folder, _, _ = write_published(tmp_path, "sdar")
    options = ["--max-new-tokens", "32", "--dtype", "float32", "--device", "cpu", "--json", "--draft-steps", "8"]
    command = ["generate", str(folder), "--prompt-ids", "1,2,3,4,5", "--tensor-parallel", "--check-lossless", *options]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "freedave.cli"]
    program = run_program(*start, *command)
    assert program.returncode == 0, program.stderr
    assert program.stdout.count("\n") == 1  # the first process speaks for all
    whole = freedave.generate(
        freedave.load_model(folder), torch.tensor([[1, 2, 3, 4, 5]]), max_new_tokens=32, draft_steps=8
    )
    result = json.loads(program.stdout)
    assert result["step_map"] == whole.step_map[0].tolist() and result["num_forwards"] == whole.num_forwards
    assert result["token_ids"] == whole.sequences[0, 5 : 5 + len(result["token_ids"])].tolist()
    assert result["static"]["identical"]


def test_the_command_line_in_a_process_that_was_started_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["generate", "demo", "--prompt", "1+1=", "--device", "cpu", "--tensor-parallel"]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err


def on_meta(folder: Path, family: str, **changes: Any) -> Any:
    written, _, _ = write_published(folder, family, **changes)
    return describe(written).on_meta()


@pytest.mark.parametrize("count", [2, 4])
def test_each_process_holds_its_share_of_the_weights(tmp_path: Path, count: int) -> None:
    whole = on_meta(tmp_path, "sdar", num_key_value_heads=4)
    names = dict(whole.named_parameters())
    norms = sum(parameter.numel() for name, parameter in names.items() if "norm" in name)
    divided = sum(parameter.numel() for parameter in names.values()) - norms
    held = dict.fromkeys(names, 0)
    for rank in range(count):
        model = describe(tmp_path).on_meta()
        parts = shard(model, Ranks(rank, count))
        own = dict(model.named_parameters())
        assert own.keys() == names.keys()
        assert sum(parameter.numel() for parameter in own.values()) == norms + divided // count
        for name, parameter in own.items():
            assert names[name][parts.get(name, ())].shape == parameter.shape
            held[name] += parameter.numel()
    for name, parameter in names.items():
        assert held[name] == parameter.numel() * (count if "norm" in name else 1)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("vocab", [33, 96, 9000, 126464, 151936, 157184])
def test_a_vocabulary_in_parts(vocab: int, count: int) -> None:
    bounds = vocabulary_bounds(vocab, count)
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == vocab and min(sizes) > 0
    unit = 4096 if vocab >= 4096 * count else 4
    assert all(bound % unit == 0 for bound in bounds[:-1])
    assert max(sizes) - min(sizes) < 2 * unit  # one more, and a last one that is cut short


def test_states_of_uneven_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """9,000 tokens are three states: one process has one, and the other two."""
    import freedave_kernels as fk

    whole = torch.nn.Linear(16, 9000, bias=False)
    features, ids = torch.randn(5, 16), torch.full((5,), 9000)
    heads = [ShardedHead(whole, Ranks(rank, 2)) for rank in range(2)]
    states = [
        fk.partial_predictions(
            features @ whole.weight[head.bounds[rank] : head.bounds[rank + 1]].T, ids, 9000, first_token_id=head.first
        )
        for rank, head in enumerate(heads)
    ]
    assert [part.shape[-2] for part in states] == [1, 2]
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Ranks, "gather", lambda _, tensor: (seen.append(tensor), torch.stack([tensor] * 2))[1])
    for head, part in zip(heads, states, strict=True):
        head.all_states(part)
    gathered = torch.cat(seen, -2)
    assert gathered.shape == (5, 4, 6)
    expected = fk.merge_predictions(torch.cat(states, -2), ids)
    for ours, theirs in zip(fk.merge_predictions(gathered, ids), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("family", "changes", "count", "problem"),
    [
        ("sdar", {}, 3, r"3 processes cannot share 4 attention heads, 2 key-value heads evenly.*: 1, 2$"),
        ("sdar", {}, 4, r"4 processes cannot share 2 key-value heads evenly"),
        (
            "sdar",
            {"intermediate_size": 51},
            2,
            r"cannot share 51 features of the MLP \(intermediate_size\) evenly.*: 1$",
        ),
        ("sdar_moe", {}, 2, r"Qwen3MoeForCausalLM has .*experts.*mixtures of experts are loaded whole"),
        ("llada2", {}, 2, r"Glm4MoeForCausalLM has .*experts.*mixtures of experts are loaded whole"),
    ],
)
def test_what_cannot_be_divided(tmp_path: Path, family: str, changes: dict, count: int, problem: str) -> None:
    model = on_meta(tmp_path, family, **changes)
    modules = list(map(id, model.modules()))
    with pytest.raises(freedave.CheckpointError, match=problem):
        shard(model, Ranks(0, count))
    assert list(map(id, model.modules())) == modules


def test_a_process_that_was_started_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = write_published(tmp_path, "sdar")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        freedave.load_model(folder, tensor_parallel=True)


def test_quantised_weights_are_not_divided(tmp_path: Path) -> None:
    folder = write_native(tmp_path, "sdar")
    change_config(folder, quantization_config=scheme("pack-quantized", 4))
    with pytest.raises(freedave.CheckpointError, match="tensor_parallel does not divide quantised weights"):
        freedave.load_model(folder, tensor_parallel=True)
