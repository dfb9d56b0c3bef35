"""load_model: checkpoints in a native transformers layout. Published layouts: test_published_checkpoints.py."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import MASK, golden_lm, golden_model, prompt

import freedave


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A native checkpoint of the tiny block-causal model."""
    model = golden_model("block_causal")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    config = json.loads((Path(__file__).parent / "golden" / "block_causal.config.json").read_text())
    config |= {"mask_token_id": MASK, "attention": "block_causal", "block_length": 4, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_example(folder):
    lm = freedave.load_model(folder)
    assert (lm.mask_token_id, lm.attention, lm.block_length, lm.eos_token_id) == (MASK, "block_causal", 4, 5)
    assert lm.vocab_size == 64 and lm.max_positions == 512 and lm.tokenizer is None
    lm.eos_token_id = None
    ours = freedave.generate(lm, prompt(), max_new_tokens=16, draft_steps=4)
    theirs = freedave.generate(golden_lm(), prompt(), max_new_tokens=16, draft_steps=4)
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.step_map, theirs.step_map)


def test_the_embedded_model():
    lm = freedave.load_model("demo")
    assert lm.attention == "block_causal" and lm.block_length == 16 and lm.tokenizer is not None
    assert lm.tokenizer.convert_tokens_to_ids("<mask>") == lm.mask_token_id
    assert next(lm.model.parameters()).dtype == torch.float32
    assert 0.8e6 < sum(parameter.numel() for parameter in lm.model.parameters()) < 3e6


def test_dtype(folder):
    assert next(freedave.load_model(folder, dtype=torch.bfloat16).model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "named", "expected"),
    [("dtype", "bfloat16", torch.bfloat16), ("torch_dtype", "float16", torch.float16), ("dtype", None, torch.float32)],
)
def test_the_dtype_of_the_checkpoint(folder, key, named, expected):
    change_config(folder, **({"dtype": None, "torch_dtype": None} | {key: named}))
    assert next(freedave.load_model(folder, dtype="auto").model.parameters()).dtype == expected


def test_a_dtype_of_the_checkpoint_that_cannot_be_used(folder):
    change_config(folder, dtype="float64")
    with pytest.raises(freedave.CheckpointError, match="names the dtype 'float64'; load it as one of torch.float32"):
        freedave.load_model(folder, dtype="auto")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bfloat16"])
def test_a_dtype_that_cannot_be_used(folder, dtype):
    with pytest.raises(TypeError, match="dtype must be torch.float32, torch.bfloat16, torch.float16, got"):
        freedave.load_model(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["nonsense", "cpu:x", "cuda:99"])
def test_a_device_that_cannot_be_used(folder, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here: "):
        freedave.load_model(folder, device=device)


def test_of_several_ends_of_sequence_the_first_counts(folder):
    change_config(folder, eos_token_id=[7, 5])
    assert freedave.load_model(folder).eos_token_id == 7


def test_it_is_what_transformers_loads(folder):
    """The same weights, configuration and requires_grad as from_pretrained gives."""
    ours = freedave.load_model(folder).model
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder)
    for (name, one), (other_name, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other_name and torch.equal(one, other) and one.requires_grad == other.requires_grad
    for (name, one), (other_name, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other_name and torch.equal(one, other)
    ignored = {"_name_or_path", "architectures"}
    assert {k: v for k, v in ours.config.to_dict().items() if k not in ignored} == {
        k: v for k, v in theirs.config.to_dict().items() if k not in ignored
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},  # holds all positions
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},  # of no layer
        {"use_sliding_window": False, "sliding_window": 8},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_a_sliding_window_without_effect(folder, recwarn, changes):
    change_config(folder, eos_token_id=None, **changes)
    ours = freedave.generate(freedave.load_model(folder), prompt(), max_new_tokens=16, draft_steps=4)
    assert torch.equal(
        ours.sequences, freedave.generate(golden_lm(), prompt(), max_new_tokens=16, draft_steps=4).sequences
    )
    assert not recwarn


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_scaled_rotary_embeddings_are_the_native_class_s(folder, rope):
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    scaling = {"rope_type": rope, "factor": 2.0} | (extra if rope == "llama3" else {})
    change_config(folder, rope_scaling=scaling)
    ours = freedave.load_model(folder).model.model.rotary_emb.inv_freq
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    assert torch.equal(ours, theirs) and not torch.equal(ours, golden_model("block_causal").model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding_window 8 of 512 positions",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window None of 512 positions"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "only full attention is computed"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling has factor, but no rope_type"),
        ({"rope_scaling": {"type": "longrope"}}, "asks for 'longrope' rotary embeddings, and supported are default, "),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_parameters.rope_theta 7.0 and rope_theta 10000.0 disagree"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, not a number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, not a number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which Qwen3ForCausalLM cannot use"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"compression_config": {"format": "int"}}, "weights that an older compressed-tensors wrote are not read"),
        ({"use_regular_causal": True}, "use_regular_causal is true"),
        ({"block_size": 8}, "block_length of config.json, 4, and block_size of config.json, 8, disagree"),
        ({"block_length": "4"}, "block_length must be an integer, got '4'"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be an integer, got '4'"),
    ],
)
def test_what_would_be_computed_otherwise(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(freedave.CheckpointError) as caught:
        freedave.load_model(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_names_of_the_block_length(folder):
    change_config(folder, block_length=None, bd_size=8)
    assert freedave.load_model(folder).block_length == 8


def test_keys_that_are_not_known_are_named(folder):
    change_config(folder, temperature=0.7, zeta=1, rope_full_precision=False)
    with pytest.warns(UserWarning, match="are not known here, and were ignored: rope_full_precision, zeta$"):
        freedave.load_model(folder)


@pytest.mark.parametrize("junk", ["junk", [], -1, {"junk": [1]}, 10**400, 0.5])
def test_junk_in_any_field_loads_or_is_a_checkpoint_error(folder, junk):
    keys = transformers.Qwen3Config().to_dict().keys() | {"rope_theta", "rope_scaling", "mask_token_id", "attention"}
    for key in sorted(keys - {"transformers_version"}):
        config = (folder / "config.json").read_text()
        change_config(folder, **{key: junk})
        with contextlib.suppress(freedave.CheckpointError):
            freedave.load_model(folder)
        (folder / "config.json").write_text(config)


def damage_missing_folder(folder):
    shutil.rmtree(folder)


def damage_no_config(folder):
    (folder / "config.json").unlink()


def damage_config_syntax(folder):
    (folder / "config.json").write_text("{")


def damage_family(folder):
    change_config(folder, model_type="gpt2")


def damage_no_mask(folder):
    change_config(folder, mask_token_id=...)


def damage_mask_type(folder):
    change_config(folder, mask_token_id="<mask>")


def damage_mask_range(folder):
    change_config(folder, mask_token_id=64)


def damage_no_block_length(folder):
    change_config(folder, block_length=...)


def damage_attention(folder):
    change_config(folder, attention="sideways")


def damage_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_missing_key(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def damage_extra_key(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.7.bias": torch.zeros(3)}, folder / "model.safetensors")


def damage_shape(folder):
    change_config(folder, intermediate_size=96)


def damage_layers(folder):
    change_config(folder, num_hidden_layers=10**8)


def damage_head(folder):
    change_config(folder, head_dim=7)


def damage_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing_folder, "no checkpoint folder at .*give a local folder, or 'demo'"),
        (damage_no_config, "has no config.json"),
        (damage_config_syntax, "config.json is not valid JSON"),
        (damage_family, r"unknown model family 'gpt2'; known are .*llada \(LLaDA\), Dream \(Dream\), .*glm4_moe"),
        (damage_no_mask, "mask_token_id missing"),
        (damage_mask_type, "mask_token_id must be an integer, got '<mask>'"),
        (damage_mask_range, "mask_token_id 64 is outside the model's vocabulary of 64 tokens"),
        (damage_no_block_length, "block_length is needed for block-causal attention"),
        (damage_attention, "attention must be one of block_causal, full, got 'sideways'"),
        (damage_no_weights, "has no .safetensors weights"),
        (damage_truncated, "the weights cannot be loaded"),
        (damage_missing_key, "missing keys: model.layers.1.mlp.up_proj.weight"),
        (damage_extra_key, "unexpected keys: model.layers.7.bias"),
        (damage_shape, "model.layers.0.mlp"),
        (damage_layers, "missing keys: 100000000 layers by config.json, 2 in the weights"),
        (damage_head, r"heads of 7 features \(head_dim, or width 64 / 4 heads\) cannot be rotated"),
        (damage_tokenizer, "the tokenizer cannot be loaded"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_checkpoints(folder, damage, message):
    damage(folder)
    with pytest.raises(freedave.CheckpointError, match=message) as caught:
        freedave.load_model(folder)
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_never_run(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    assert freedave.load_model(folder).block_length == 4
