"""What is wrong with a published checkpoint is said in one error, in the publisher's names, before a weight is read."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from published_layouts import PUBLISHED, write_published
from safetensors.torch import load_file, save_file

import freedave
from freedave.models import weights
from freedave.models.conversion import convert_checkpoint
from freedave.models.description import Description

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """LLaDA2 in three shards; nothing may be loaded from it."""

    def loaded(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "stream", loaded)
    return write_published(tmp_path / "published", "llada2", shards=3)[0]


def error(folder: Path) -> freedave.CheckpointError:
    with pytest.raises(freedave.CheckpointError) as caught:
        freedave.load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return caught.value


def change_shard(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / SHARD) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SHARD)


def change_index(folder: Path, **places: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= places
    (folder / INDEX).write_text(json.dumps(index))


def names_in(shard: Path) -> list[str]:
    return sorted(load_file(shard))


def test_example(folder):
    first, second, *_ = names_in(folder / SHARD)
    change_shard(folder, **{first: None, second: torch.zeros(3, 5), "model.vision.weight": torch.zeros(2)})
    (folder / "model-00003-of-00003.safetensors").unlink()
    problems = error(folder).problems
    assert sorted(problem.split(":")[0] for problem in problems) == [
        "missing shards",
        "not in the shard that the index names",
        "unexpected keys",
        "wrong shapes",
    ]
    assert f"not in the shard that the index names: {first} ({SHARD})" in problems
    assert any(
        re.fullmatch(rf"wrong shapes: {re.escape(second)} is \[3, 5\], by config.json \[.+\]", p) for p in problems
    )
    assert "unexpected keys: model.vision.weight" in problems
    assert "missing shards: model-00003-of-00003.safetensors" in problems


def test_everything_is_listed_and_the_message_stays_short(folder):
    names = names_in(folder / SHARD)
    change_shard(folder, **dict.fromkeys(names, None), other=torch.zeros(1))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name not in names} | {
        "other": SHARD
    }
    (folder / INDEX).write_text(json.dumps(index))
    caught = error(folder)
    assert f"missing keys: {names[0]}, " in str(caught) and f"and {len(names) - 6} more; unexpected keys: other" in str(
        caught
    )
    assert caught.problems == (*(f"missing keys: {name}" for name in names), "unexpected keys: other")


def test_a_missing_shard_is_one_problem(folder):
    (folder / SHARD).unlink()
    assert error(folder).problems == (f"missing shards: {SHARD}",)


@pytest.mark.parametrize(
    ("content", "diagnosis"),
    [
        (lambda whole: whole[:-100], "truncated: [0-9]+ of [0-9]+ bytes"),
        (lambda whole: whole[:5000], "not safetensors|truncated"),
        (lambda whole: whole[:4], "not safetensors"),
        (lambda whole: b"", "not safetensors"),
        (lambda whole: whole + b"more", "not safetensors"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs pointer"),
        (lambda whole: b"PK\x03\x04" + whole, "a pickle, not safetensors"),
        (lambda whole: b"\x80\x02}q\x00." + whole, "a pickle, not safetensors"),
        (lambda whole: b"\x10" + bytes(7) + b'{"a": [1, 2, 3]}' + whole, "not safetensors"),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_files_that_are_not_whole(tmp_path, content, diagnosis, shards):
    folder = write_published(tmp_path, "sdar", shards=shards)[0]
    file = folder / ("model.safetensors" if shards == 1 else SHARD)
    file.write_bytes(content(file.read_bytes()))
    problems = error(folder).problems
    assert len(problems) == 1
    assert re.fullmatch(rf"damaged files: {file.name} \(.*({diagnosis}).*\)", problems[0])


def test_the_index(folder):
    name = names_in(folder / SHARD)[0]
    change_index(folder, **{name: f"../{SHARD}"})
    assert f"shards outside the folder: ../{SHARD}" in error(folder).problems
    change_index(folder, **{name: "model-00001-of-00003.safetensors"})
    assert error(folder).problems == (
        f"not in the shard that the index names: {name} (model-00001-of-00003.safetensors)",
    )
    (folder / INDEX).write_text("{}")
    assert "has no weight_map" in str(error(folder))
    (folder / INDEX).write_text("{")
    assert f"{INDEX} is not valid JSON" in str(error(folder))
    (folder / INDEX).unlink()
    assert "but neither model.safetensors nor model.safetensors.index.json" in str(error(folder))


def test_a_tensor_in_two_files(folder):
    twice = names_in(folder / "model-00001-of-00003.safetensors")[0]
    change_shard(folder, **{twice: torch.zeros(1)})
    assert f"in two files: {twice} (model-00001-of-00003.safetensors, {SHARD})" in error(folder).problems


def test_only_safetensors(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    assert "has no .safetensors weights; other formats are not read, since they can run code" in str(error(folder))


def test_quantised_weights(folder):
    name = next(name for name in names_in(folder / SHARD) if name.endswith("proj.weight"))
    change_shard(folder, **{name: load_file(folder / SHARD)[name].to(torch.float8_e4m3fn)})
    assert error(folder).problems == (f"stored in a type that is not supported: {name} (F8_E4M3)",)


# ---------------------------------------------------------------------------------------------------- files that are none


@pytest.fixture
def impatient() -> Iterator[None]:
    """Ends a test that waits for a named pipe's other end."""

    def too_long(*_: object) -> None:
        raise AssertionError("it waits")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a named pipe": os.mkfifo,
    "a link to nothing": lambda file: file.symlink_to("nowhere"),
    "not readable": lambda file: file.symlink_to(file.name),
}


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX, "model.safetensors"],
)
def test_what_stands_in_a_file_s_place(folder, impatient, what, name):
    (folder / name).unlink(missing_ok=True)
    NO_FILES[what](folder / name)
    assert f"{folder / name} is {what}" in str(error(folder))


@pytest.mark.parametrize("what", ["a folder", "a named pipe"])
def test_what_stands_in_a_shard_s_place(folder, impatient, what):
    (folder / SHARD).unlink()
    NO_FILES[what](folder / SHARD)
    assert error(folder).problems == (f"damaged files: {SHARD} ({what})",)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX])
def test_json_that_is_nested_too_deeply(folder, name):
    (folder / name).write_text('{"a": ' + 20_000 * "[" + 20_000 * "]" + "}")
    assert f"{folder / name} is nested too deeply" in str(error(folder))


def test_a_header_that_is_nested_too_deeply(tmp_path):
    folder = write_published(tmp_path, "sdar")[0]
    header = b'{"a": ' + 20_000 * b"[" + 20_000 * b"]" + b"}"
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "damaged files: model.safetensors (not safetensors" in error(folder).problems[0]


# ------------------------------------------------------------------------------------------------------------ config.json

UNSUPPORTED = [
    ("llada", {"alibi": True, "rope": ...}, ["alibi is true, and only false", "rope is missing, which means false"]),
    ("llada", {"block_type": "sequential"}, ['block_type is "sequential", and only "llama" is supported']),
    ("llada", {"include_bias": True, "scale_logits": True}, ["include_bias is true", "scale_logits is true"]),
    (
        "llada",
        {"d_model": ..., "n_heads": "4", "n_layers": 0},
        ["d_model missing", "an integer, got '4'", "at least 1, got 0"],
    ),
    ("llada", {"rope_theta": ...}, ["rope_theta missing"]),
    ("llada", {"rope_theta": -1}, ["rope_theta must be a positive number, got -1"]),
    ("llada", {"weight_tying": "yes"}, ["weight_tying must be true or false, got 'yes'"]),
    ("llada", {"quantization_config": {"bits": 4}}, ["convert the checkpoint that is not quantised"]),
    ("llada", {"mask_token_id": ...}, ["the family's, 126336, is outside the vocabulary of 96 tokens"]),
    ("llada", {"mask_token_id": 96}, ["mask_token_id 96 is outside the model's vocabulary of 96 tokens"]),
    ("dream", {"architectures": ["DreamForCausalLM"]}, ["the architecture DreamForCausalLM is not DreamModel"]),
    ("llada", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling asks for 'yarn' rotary embeddings"]),
    ("dream", {"rope_parameters": {"rope_type": "dynamic"}}, ["rope_parameters asks for 'dynamic' rotary embeddings"]),
    ("dream", {"rope_scaling": {"type": "yarn"}}, ["rope_scaling.factor missing, by which 'yarn' scales"]),
    (
        "dream",
        {"rope_scaling": {"type": "linear", "factor": 0, "beta_fast": 1, "truncate": True}},
        [
            "rope_scaling.factor must be a positive number, got 0",
            "has beta_fast, of which 'linear'",
            "truncate must be",
        ],
    ),
    ("sdar", {"rope_scaling": {"type": ["yarn"], "factor": 4.0}}, ["asks for ['yarn'] rotary embeddings"]),
    ("dream", {"use_sliding_window": True}, ["use_sliding_window is true"]),
    ("sdar", {"block_size": 0}, ["block_size must be at least 1, got 0"]),
    ("sdar", {"hidden_act": "gelu"}, ['hidden_act is "gelu"']),
    (
        "sdar",
        {"model_type": "sedd"},
        ["unknown model family 'sedd'; known are llada (LLaDA-MoE), lladamoe (LLaDA-MoE), llada (LLaDA), Dream"],
    ),
    ("llada2", {"score_function": "softmax"}, ['score_function is "softmax", and only "sigmoid" is supported']),
    ("llada2", {"use_bias": ...}, ["use_bias is missing, which means true"]),
    ("llada2", {"rotary_dim": 16}, ["rotary_dim 16 is not partial_rotary_factor 0.5 of head_dim 16"]),
    ("llada2", {"n_group": 3}, ["3 of 16 experts cannot be chosen from the best 2 of 3 groups"]),
    ("llada2", {"topk_group": 5}, ["3 of 16 experts cannot be chosen from the best 5 of 4 groups"]),
    ("llada2", {"num_shared_experts": 0}, ["num_shared_experts must be at least 1, got 0"]),
    ("sdar_moe", {"num_experts_per_tok": 13}, ["num_experts_per_tok is 13, and there are 12 experts"]),
    ("sdar_moe", {"mlp_only_layers": [True]}, ["mlp_only_layers must be a list of layers, got [True]"]),
    ("sdar_moe", {"norm_topk_prob": ...}, ["norm_topk_prob missing"]),
    ("llada_moe", {"moe_layer_freq": [1]}, ["moe_layer_freq must have a number for each of 2 layers, got [1]"]),
    ("llada_moe", {"num_experts_per_tok": 13}, ["num_experts_per_tok is 13, and there are 12 experts"]),
    ("llada_moe", {"shared_expert_intermediate_size": 24}, ["shared_expert_intermediate_size is 24, and only null"]),
    ("llada_moe", {"qk_layernorm": ...}, ["qk_layernorm is missing, which means false, and only true is supported"]),
    ("llada_moe", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5, and only 1.0 is supported"]),
    # LLaDA2.2 and LLaDA2.0-Uni have the class and the tensors of LLaDA2.0.
    (
        "llada2",
        {"expert_capacity": 48, "delete_token_id": 90, "split_token_id": 0},
        [
            "expert_capacity is 48: LLaDA2.2's routing",
            "delete_token_id is 90: LLaDA2.2's tokens that",
            "split_token_id is 0",
        ],
    ),
    ("llada2", {"image_token_offset": 157184}, ["image_token_offset is 157184: models of more than text"]),
    ("llada2", {"vocab_size": 173568}, ["vocab_size is 173568: that of LLaDA2.0-Uni"]),
    ("llada2", {"moe_router_enable_expert_bias": False, "norm_softmax": True}, ["enable_expert_bias", "norm_softmax"]),
    *[
        (family, changes, [message])
        for family in PUBLISHED
        for changes, message in [
            ({"clip_qkv": 8.0}, "clip_qkv is 8.0: clipped queries, keys and values are not computed"),
            ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0: capped logits are not computed"),
            ({"compression_config": {"format": "int"}}, "weights that an older compressed-tensors wrote are not read"),
            ({"use_regular_causal": True}, "use_regular_causal is true: token-causal attention is not block diffusion"),
            ({"rope_scaling": {"factor": 4.0}}, "rope_scaling has factor, but no rope_type that says how to scale"),
            ({"rope_parameters": {"rope_theta": 7.0}}, "rope_parameters.rope_theta 7.0 and rope_theta "),
            ({"rope_theta": float("inf")}, "rope_theta is inf, not a number"),
            ({"rope_parameters": {"rope_theta": float("nan")}, "rope_theta": ...}, "rope_parameters.rope_theta is nan"),
            ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, not a number"),
            ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number, got 1000"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is "),
            ({"num_blocks": 3}, "num_blocks of config.json speaks of blocks, and is not understood"),
            ({"block_length": 7, "bd_size": 16, "block_size": ...}, "block_length of config.json, 7, and bd_size of "),
        ]
    ],
    ("llada", {"rope_full_precision": False}, ["rope_full_precision is false, and only true is supported"]),
    ("sdar", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5, and only 1.0 is supported"]),
    ("sdar", {"rope_scaling": {"rope_type": "default", "type": "yarn"}}, ["rope_scaling.rope_type 'default' and "]),
]

WRAPPED = "wrapped: freedave.DiffusionLM(model, mask_token_id=..., attention=..., block_length=...)"


@pytest.mark.parametrize(("family", "changes", "messages"), UNSUPPORTED)
def test_configurations(tmp_path, family, changes, messages):
    folder = write_published(tmp_path, family)[0]
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    caught = error(folder)
    for message in messages:
        assert message in str(caught)
    assert len(caught.problems) == len(messages)


IMPOSSIBLE = [
    *[
        (family, {key: 10**8}, "missing keys: 100000000 layers by config.json, [23] in the weights")
        for family, key in (("llada", "n_layers"), ("dream", "num_hidden_layers"), ("llada2", "num_hidden_layers"))
    ],
    ("llada2", {"num_experts": 10**8}, "missing keys: 100000000 experts by config.json, 16 in the weights"),
    ("sdar_moe", {"num_experts": 10**8}, "missing keys: 100000000 experts by config.json, 12 in the weights"),
    ("sdar_moe", {"moe_intermediate_size": 10**13}, "wrong shapes: model.layers.0.mlp.experts.0.gate_proj.weight is "),
    *[
        ("llada", {key: 10**13}, "wrong shapes: model.transformer.*, by config.json .*10000000000000")
        for key in ("d_model", "embedding_size", "mlp_hidden_size")
    ],
    *[
        ("llada2", {key: 10**13}, "wrong shapes: model.*, by config.json .*[0-9]{14}")
        for key in ("hidden_size", "vocab_size", "intermediate_size", "moe_intermediate_size", "num_shared_experts")
    ],
    ("sdar", {"head_dim": 10**13 + 1}, "wrong shapes|cannot be rotated"),
    ("sdar", {"num_key_value_heads": 10**13, "num_attention_heads": 10**13}, "wrong shapes: model.layers.0.self_attn"),
]


@pytest.mark.parametrize(("family", "changes", "message"), IMPOSSIBLE)
def test_sizes_are_compared_before_a_model_is_built(tmp_path, monkeypatch, family, changes, message):
    def built(_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(Description, "on_meta", built)
    folder, config, _ = write_published(tmp_path, family)
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert re.search(message, str(error(folder)))


def test_sizes_of_dense_layers_among_those_with_experts(tmp_path):
    folder, config, _ = write_published(tmp_path, "sdar_moe", mlp_only_layers=[1])
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 10**13}))
    assert "wrong shapes: model.layers.1.mlp.gate_proj.weight is [48, 32], by config.json" in str(error(folder))


def test_nothing_is_built_where_nothing_can_be_compared(tmp_path):
    folder, config, _ = write_published(tmp_path, "sdar")
    (folder / "model.safetensors").write_bytes(b"PK")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**8}))
    assert error(folder).problems == ("damaged files: model.safetensors (a pickle, not safetensors)",)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sdar", {"head_dim": 7}, "heads of 7 features (head_dim, or width 32 / 4 heads) cannot be rotated"),
        ("dream", {"hidden_size": 36}, "heads of 9 features (head_dim, or width 36 / 4 heads) cannot be rotated"),
        ("llada2", {"head_dim": 6, "rotary_dim": ...}, "turn pairs of features, and 3 is odd"),
        ("llada", {"n_kv_heads": 3}, "4 attention heads cannot share 3 key-value heads evenly"),
    ],
)
def test_heads_that_cannot_be_computed(tmp_path, family, changes, message):
    assert message in str(error(write_published(tmp_path, family, **changes)[0]))


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("junk", ["junk", [], -1])
def test_junk_in_any_field_loads_or_is_a_checkpoint_error(tmp_path, family, junk):
    folder, config, _ = write_published(tmp_path, family)
    refused = 0
    for key in config:
        (folder / "config.json").write_text(json.dumps(config | {key: junk}))
        try:
            freedave.load_model(folder)
        except freedave.CheckpointError:
            refused += 1
    assert refused > len(config) / 3


@pytest.mark.parametrize(
    ("family", "changes", "helps"),
    [
        ("sdar", {"model_type": "sedd"}, True),
        ("sdar", {"model_type": "wedlm"}, False),
        ("dream", {"architectures": ["DreamForCausalLM"]}, True),
        ("llada", {"clip_qkv": 8.0}, True),
        ("llada", {"layer_norm_type": "low_precision"}, True),
        ("dream", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, True),
        ("llada2", {"expert_capacity": 48}, False),
        ("llada2", {"expert_capacity": 48, "clip_qkv": 8.0}, False),
        ("sdar", {"use_regular_causal": True}, False),
        ("sdar", {"rope_theta": -1}, False),
    ],
)
def test_refusals_name_the_way_out_where_there_is_one(tmp_path, family, changes, helps):
    assert (WRAPPED in str(error(write_published(tmp_path, family, **changes)[0]))) == helps


def test_routing_in_a_native_layout(tmp_path):
    folder = convert_checkpoint(write_published(tmp_path / "published", "llada2")[0], tmp_path / "native").folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_group": 3}))
    assert "3 of 16 experts cannot be chosen from the best 2 of 3 groups" in str(error(folder))


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])  # of older and of newer versions of transformers
def test_experts_in_a_native_layout(tmp_path, key):
    folder = convert_checkpoint(write_published(tmp_path / "published", "sdar_moe")[0], tmp_path / "native").folder
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("num_local_experts") == 12
    (folder / "config.json").write_text(json.dumps(config | {key: 12}))
    assert type(freedave.load_model(folder).model).__name__ == "Qwen3MoeForCausalLM"
    (folder / "config.json").write_text(json.dumps(config | {key: 2}))
    assert "num_experts_per_tok is 3, and there are 2 experts" in str(error(folder))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights(tmp_path, name, shards):
    folder = write_published(tmp_path, "sdar", shards=shards)[0]
    (folder / name).write_text("{}")
    assert f"{name}, of an adapter, which would not be applied" in str(error(folder))
