"""freedave inspect: what a checkpoint is, and why, without loading its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published_configs import EOS, MASK, VOCABULARY
from published_layouts import PUBLISHED, write_checkpoint, write_code_tokenizer, write_published
from test_cli import error_of, run_json

import freedave
from freedave.cli import main
from freedave.models import weights
from freedave.models.conversion import convert_checkpoint
from freedave.models.inspection import inspect_checkpoint

README = Path(__file__).parents[1] / "README.md"


def test_example(tmp_path, capsys):
    folder = write_published(tmp_path / "SDAR-8B-Chat-b8", "sdar", shards=2, block_size=..., zeta=1)[0]
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = [re.split(r"  +", line, maxsplit=1) for line in said.out.splitlines()]
    assert lines[:10] == [
        ["folder", str(folder)],
        ["family", "SDAR or TraDo, computed by Qwen3ForCausalLM"],
        ["attention", "block_causal (the family's architecture), logits aligned"],
        ["mask", f"{MASK} (config.json)"],
        ["ends", f"{EOS} (config.json)"],
        ["block", "8 (the name SDAR-8B-Chat-b8)"],
        ["positions", "256"],
        ["tokenizer", "none: no tokenizer files"],
        ["keys ignored", "zeta"],
        ["weights", "0.03 million parameters; 25 tensors in 2 files, 0.11 MB"],
    ]
    assert lines[10] == [
        "memory",
        "float32: 0.11 MB, and 0.51 MB for each 1,000 positions; bfloat16: 0.06 MB, and 0.26 MB for each 1,000 positions; "
        "while loading: 0.07 MB more",
    ]
    assert lines[11] == ["start with", f"freedave generate {folder} --prompt ... --draft-steps 8"]
    assert [line[0] for line in lines[12:]] == ["warning", "warning"]


@pytest.mark.parametrize("family", PUBLISHED)
def test_it_says_what_is_loaded(family, tmp_path):
    folder, _, tensors = write_published(tmp_path / "published", family)
    found = inspect_checkpoint(folder)
    lm = freedave.load_model(folder)
    assert found.native_class == type(lm.model).__name__ and found.max_positions == lm.max_positions
    assert (found.mask.value, found.attention.value) == (lm.mask_token_id, lm.attention)
    assert (found.block_length.value, found.logits_shift) == (lm.block_length, lm.logits_shift)
    assert tuple(end.value for end in found.ends) == lm.eos_token_ids
    assert found.parameters == sum(parameter.numel() for parameter in lm.model.parameters())
    assert found.stored is not None and found.stored.tensors == len(tensors)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert (found.stored.bytes, found.stored.largest_file) == (stored, stored)
    layers, groups, features, dtype = lm.key_layout()
    assert found.memory["float32"]["keys_and_values"] == 1000 * 2 * layers * groups * features * dtype.itemsize
    assert found.remarks == () and found.unknown_keys == ()
    assert freedave.generate(lm, torch.tensor([[1, 2, 3]]), max_new_tokens=8, **found.suggested).sequences.shape == (
        1,
        11,
    )


@pytest.mark.parametrize("family", PUBLISHED)
def test_files_that_say_nothing(family, tmp_path):
    silent: dict[str, Any] = {
        "mask_token_id": ...,
        "eos_token_id": ...,
        "block_size": ...,
        "bd_size": ...,
        "vocab_size": 157184,
    }
    silent |= {"embedding_size": 157184} if family == "llada" else {}
    narrow = {"d_model": 4, "n_heads": 2} if family == "llada" else {"hidden_size": 4, "num_attention_heads": 2}
    narrow |= {"n_kv_heads": 2} if family == "llada" else {"num_key_value_heads": 2}
    found = inspect_checkpoint(write_published(tmp_path, family, **silent, **narrow)[0])
    usual = "the usual one of the family"
    assert found.mask.origin == usual and [end.origin for end in found.ends] == [usual]
    assert found.block_length.origin == ("no file says one" if found.attention.value == "full" else usual)
    (remark,) = found.remarks
    assert f"no mask_token_id: {found.mask.value} is used" in remark


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_converted_folder_says_it_all_in_config_json(family, tmp_path):
    published = write_published(tmp_path / "published", family)[0]
    native = convert_checkpoint(published, tmp_path / "native").folder
    one, other = inspect_checkpoint(native), inspect_checkpoint(published)
    assert {one.mask.origin, one.attention.origin, *(end.origin for end in one.ends)} == {"config.json"}
    assert one.block_length.value == other.block_length.value
    assert one.memory == other.memory and one.suggested["draft_steps"] == "auto"


def test_tokens_and_every_file_that_says_something(tmp_path):
    folder = write_published(tmp_path, "dream", mask_token_id=..., eos_token_id=3)[0]
    write_code_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7], "block_length": 16}))
    found = inspect_checkpoint(folder)
    assert (found.mask.value, found.mask.token, found.mask.origin) == (MASK, "<|mask|>", "the tokenizer")
    assert [(end.value, end.origin) for end in found.ends] == [
        (3, "config.json"),
        (7, "generation_config.json"),
        (EOS, "the tokenizer"),
    ]
    assert (found.block_length.value, found.block_length.origin) == (16, "block_length of generation_config.json")
    assert found.tokenizer is not None and found.tokenizer.startswith("Qwen2Tokenizer")
    assert found.suggested == {"draft_steps": 4, "cache": "dual", "block_length": 16}


def test_json(tmp_path, capsys):
    folder = write_published(tmp_path, "llada")[0]
    found = run_json(capsys, "inspect", str(folder))
    assert found["folder"] == str(folder) and found["family"] == "LLaDA"
    assert found["mask"] == {"value": MASK, "origin": "config.json", "token": None}
    assert found["suggested"] == {"draft_steps": 4, "cache": "dual", "block_length": 32}


@pytest.mark.parametrize("family", PUBLISHED)
def test_before_the_weights_are_there(family, tmp_path, capsys):
    folder = write_published(tmp_path, family)[0]
    whole = inspect_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    found = inspect_checkpoint(folder)
    assert found.stored is None and f"{folder} has no .safetensors weights" in (found.no_weights or "")
    assert found.memory == whole.memory
    config = json.loads((folder / "config.json").read_text())
    layers = "n_layers" if family == "llada" else "num_hidden_layers"
    (folder / "config.json").write_text(json.dumps(config | {layers: 10**8, "moe_layer_freq": None}))
    assert "config.json claims 100000000 layers" in error_of(capsys, "inspect", str(folder))


def test_no_weight_is_read(tmp_path, monkeypatch):
    """Not even those of a head that is stored although it is tied, which `load_model` compares with the embedding."""
    folder, config, tensors = write_published(tmp_path, "dream", tie_word_embeddings=True)
    write_checkpoint(folder, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    for name in ("stream", "read", "_equal"):
        monkeypatch.setattr(weights, name, read)
    assert inspect_checkpoint(folder).stored.tensors == len(tensors) + 1
    with pytest.raises(AssertionError, match="weights were read"):
        freedave.load_model(folder)


def test_what_cannot_be_loaded_is_one_line(tmp_path, capsys):
    folder, config, _ = write_published(tmp_path, "llada2", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "missing shards: model-00002-of-00003" in error_of(capsys, "inspect", str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"expert_capacity": 48}))
    assert "expert_capacity is 48: LLaDA2.2's routing" in error_of(capsys, "inspect", str(folder))
    assert "no checkpoint folder at" in error_of(capsys, "inspect", str(tmp_path / "nowhere"))
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": VOCABULARY}))
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    assert f"outside the model's vocabulary of {VOCABULARY}" in error_of(capsys, "inspect", str(folder))


@pytest.mark.parametrize(
    ("row", "family"),
    [
        ("SDAR-8B", "sdar"),
        ("SDAR-30B-A3B", "sdar_moe"),
        ("Stable-DiffCoder-8B", "stable_diffcoder"),
        ("Fast_dLLM_v2_7B", "fast_dllm"),
        ("LLaDA-8B", "llada"),
        ("Dream-7B", "dream"),
        ("LLaDA2.0-mini", "llada2"),
    ],
)
def test_the_readme_starts_with_the_same_settings(row, family, tmp_path):
    suggested = inspect_checkpoint(write_published(tmp_path, family)[0]).suggested
    (line,) = re.findall(rf"^\| {re.escape(row)}.*$", README.read_text(), flags=re.MULTILINE)
    _, cache, block_length, draft_steps, *_ = line.strip("| ").split(" | ")
    assert draft_steps == str(suggested["draft_steps"])
    assert cache.startswith(f"`{suggested.get('cache', 'auto')}`")
    assert block_length.startswith(str(suggested.get("block_length", "its own")))
