"""Checkpoints in their published layouts compute what their architectures define, and decode as their files say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from published_configs import EOS, MASK
from published_layouts import PUBLISHED, write_checkpoint, write_published

import freedave
from freedave.forward.attention import block_causal_mask
from freedave.models.conversion import convert_checkpoint
from freedave.models.description import describe

FAMILIES = list(PUBLISHED)
LENGTH = 21


def logits(lm: freedave.DiffusionLM, ids: torch.Tensor) -> torch.Tensor:
    """Of every position, under the model's own attention."""
    mask = block_causal_mask(len(ids), lm.block_length, ids.device) if lm.attention == "block_causal" else None
    with torch.no_grad():
        return lm.logits(ids[None], torch.arange(len(ids)), attention_mask=mask)


def token_ids(seed: int = 0) -> torch.Tensor:
    """Text with masks in it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(MASK, (LENGTH,), generator=generator)
    ids[torch.rand(LENGTH, generator=generator) < 0.3] = MASK
    return ids


def reference(family: str, config: dict, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    return PUBLISHED[family].forward(config, {name: tensor.double() for name, tensor in tensors.items()}, ids)


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32 and theirs.dtype == torch.float64
    assert theirs.std() > 0.5  # logits that differ from each other, so that agreement means something
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_example(family, tmp_path):
    folder, config, tensors = write_published(tmp_path, family, shards=3)
    lm = freedave.load_model(folder)
    ids = token_ids()
    assert_agree(logits(lm, ids), reference(family, config, tensors, ids))


VARIANTS = [
    ("llada", {"weight_tying": True}),
    ("llada", {"n_kv_heads": None}),
    ("llada", {"embedding_size": 128}),
    ("dream", {"tie_word_embeddings": True}),
    ("sdar", {"tie_word_embeddings": True}),
    ("sdar", {"block_size": 8, "num_key_value_heads": 4}),
    ("sdar_moe", {"tie_word_embeddings": True}),
    ("sdar_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    ("sdar_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}),
    ("sdar_moe", {"decoder_sparse_step": 2}),
    ("stable_diffcoder", {"tie_word_embeddings": True, "head_dim": None}),
    ("stable_diffcoder", {"attention_bias": True, "mlp_bias": True, "block_size": 8}),
    ("fast_dllm", {"tie_word_embeddings": True, "bd_size": 4}),
    ("llada_moe", {"tie_word_embeddings": True, "model_type": "lladamoe"}),
    ("llada_moe", {"moe_layer_freq": [0, 1, 1], "num_hidden_layers": 3, "num_key_value_heads": 2}),
    ("llada2", {"tie_word_embeddings": True}),
    ("llada2", {"use_qkv_bias": True}),
    ("llada2", {"first_k_dense_replace": 0, "num_shared_experts": 1}),
    ("llada2", {"num_experts_per_tok": 1}),
    ("llada2", {"n_group": 1, "topk_group": 1, "partial_rotary_factor": 1.0, "rotary_dim": 16}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_variants(family, changes, tmp_path):
    folder, config, tensors = write_published(tmp_path, family, **changes)
    ids = token_ids(1)
    assert_agree(logits(freedave.load_model(folder), ids), reference(family, config, tensors, ids))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALED = [
    {"rope_type": "linear", "factor": 2.5},
    YARN,
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.5},  # of all 256 positions
    YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]


@pytest.mark.parametrize("scaling", SCALED, ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llada"])
def test_scaled_positions(family, scaling, tmp_path):
    """Against frequencies of our own; a converted folder keeps them. Other frequencies would show."""
    folder, config, tensors = write_published(tmp_path / "published", family, rope_scaling=scaling, rope_theta=10000.0)
    ids = token_ids(1)
    expected = reference(family, config, tensors, ids)
    lm = freedave.load_model(folder)
    assert_agree(logits(lm, ids), expected)
    assert_agree(logits(freedave.load_model(convert_checkpoint(folder, tmp_path / "native").folder), ids), expected)
    assert (expected - reference(family, config | {"rope_scaling": None}, tensors, ids)).abs().max() > 1e-2
    lm.eos_token_id = None
    freedave.generate(
        lm, torch.arange(5)[None], max_new_tokens=16, block_length=lm.block_length or 8, check_lossless=True
    )


def test_older_names_of_scaled_positions(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    older = freedave.load_model(write_published(tmp_path / "older", "sdar", rope_scaling=scaling)[0])
    newer = {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_theta": ..., "rope_scaling": ...}
    assert torch.equal(
        logits(older, token_ids()),
        logits(freedave.load_model(write_published(tmp_path / "newer", "sdar", **newer)[0]), token_ids()),
    )


def test_a_factor_that_is_not_that_of_the_lengths(tmp_path):
    """As Qwen's own instructions have it: 4 times 32768 positions, in a configuration of 40960."""
    scaling = YARN | {"original_max_position_embeddings": 128}
    folder, config, tensors = write_published(tmp_path, "sdar", rope_scaling=scaling)
    with pytest.warns(
        UserWarning, match="by the factor 4.0, which is used, and from 128 to 256 positions, which is 2: "
    ):
        lm = freedave.load_model(folder)
    assert_agree(logits(lm, token_ids()), reference("sdar", config, tensors, token_ids()))


FIELDS = [
    *[(family, "rope_theta", 10000.0) for family in FAMILIES],
    *[(family, "rms_norm_eps", 0.05) for family in FAMILIES],
    ("sdar_moe", "norm_topk_prob", False),
    ("sdar_moe", "num_experts_per_tok", 2),
    ("llada_moe", "num_experts_per_tok", 2),
    ("llada2", "routed_scaling_factor", 1.0),
    ("llada2", "num_experts_per_tok", 2),
    ("llada2", "topk_group", 1),
    ("llada2", "n_group", 2),
]


@pytest.mark.parametrize(("family", "field", "value"), FIELDS)
def test_the_comparison_sees_every_field(family, field, value, tmp_path):
    """What leaves no trace in the shapes is read from config.json: another value gives other logits, by far."""
    folder, config, tensors = write_published(tmp_path, family)
    expected = reference(family, config, tensors, token_ids())
    write_published(folder, family, **{field: value})
    assert (logits(freedave.load_model(folder), token_ids()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("executor", ["planned", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_lossless(family, executor, tmp_path):
    lm = freedave.load_model(write_published(tmp_path, family)[0])
    lm.eos_token_id = None
    prompt = torch.randint(EOS, (1, 7), generator=torch.Generator().manual_seed(3))
    blocks = lm.block_length or 8
    out = freedave.generate(
        lm, prompt, max_new_tokens=24, draft_steps=4, block_length=blocks, check_lossless=True, executor=executor
    )
    assert MASK not in out.sequences


SIZES = {  # parameters in billions at the published configurations; the model cards say 8, 7, 8, 30, 8, 7, 7 and 16
    "LLaDA 8B": (
        "llada",
        {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288},
        {"vocab_size": 126464, "embedding_size": 126464},
        8.02,
    ),
    "Dream 7B": (
        "dream",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        {"num_key_value_heads": 4, "vocab_size": 152064},
        7.62,
    ),
    "SDAR 8B, TraDo 8B": (
        "sdar",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        8.19,
    ),
    "SDAR-30B-A3B": (
        "sdar_moe",
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32},
        {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
        30.53,
    ),
    "Stable-DiffCoder 8B": (
        "stable_diffcoder",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        {"num_key_value_heads": 8, "head_dim": None, "vocab_size": 155136},
        8.25,
    ),
    "Fast-dLLM v2 7B": (
        "fast_dllm",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        {"num_key_value_heads": 4, "vocab_size": 152064, "layer_types": None},
        7.62,
    ),
    "LLaDA-MoE 7B-A1B": (
        "llada_moe",
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16},
        {"moe_layer_freq": [1] * 16, "expert_intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}
        | {"dense_intermediate_size": 8192, "vocab_size": 157184},
        7.36,
    ),
    "LLaDA2 mini": (
        "llada2",
        {
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "num_hidden_layers": 20,
            "num_attention_heads": 16,
            "head_dim": 128,
        },
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
        }
        | {"topk_group": 4, "num_shared_experts": 1, "rotary_dim": 64, "vocab_size": 157184},
        16.26,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_size_at_the_published_configuration(name, tmp_path):
    family, layers, rest, billions = SIZES[name]
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[family].config | layers | rest))
    model = describe(tmp_path).on_meta()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


# ---------------------------------------------------------------------------------------------------- generation settings

SETTINGS = {  # attention, shift and block length that the family has where its files say nothing
    "llada": ("full", False, None, 126336, 126081),
    "dream": ("full", True, None, 151666, 151643),
    "sdar": ("block_causal", False, 4, 151669, 151643),
    "sdar_moe": ("block_causal", False, 4, 151669, 151643),
    "stable_diffcoder": ("block_causal", False, 4, 5, 2),
    "fast_dllm": ("block_causal", True, 32, 151665, 151645),
    "llada_moe": ("full", False, None, 156895, 156892),
    "llada2": ("block_causal", False, 32, 156895, 156892),
}


def settings(lm: freedave.DiffusionLM) -> tuple:
    return lm.attention, lm.logits_shift, lm.block_length, lm.mask_token_id, lm.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_the_files(family, tmp_path):
    lm = freedave.load_model(write_published(tmp_path, family)[0])
    attention, shift, *_ = SETTINGS[family]
    assert settings(lm)[:2] == (attention, shift)
    assert lm.mask_token_id == MASK and lm.tokenizer is None
    assert lm.block_length == {"sdar": 4, "sdar_moe": 4, "stable_diffcoder": 4, "fast_dllm": 8, "llada2": 8}.get(family)
    assert lm.eos_token_id == (None if family == "llada2" else EOS)  # 156892 is outside this vocabulary
    assert lm.max_positions == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_the_family(family, tmp_path):
    """A large vocabulary, and files that say nothing."""
    silent = {"mask_token_id": ..., "eos_token_id": ..., "block_size": ..., "bd_size": ..., "vocab_size": 157184}
    silent |= {"embedding_size": 157184} if family == "llada" else {}
    narrow = {"d_model": 4, "n_heads": 2} if family == "llada" else {"hidden_size": 4, "num_attention_heads": 2}
    narrow |= {"n_kv_heads": 2} if family == "llada" else {"num_key_value_heads": 2}
    with pytest.warns(UserWarning, match="its files name no ") as warned:
        lm = freedave.load_model(write_published(tmp_path, family, **silent, **narrow)[0])
    assert settings(lm) == SETTINGS[family]
    _, _, block, mask, eos = SETTINGS[family]
    said = str(warned[0].message)
    assert len(warned) == 1 and said.startswith(f"{tmp_path}: its files name no ")
    assert f"no mask_token_id: {mask} is used" in said and f"no eos_token_id: {eos} is used" in said
    assert (f"no block_length: {block} is used, the usual one" in said) == (block is not None)


def test_settings_of_the_other_files(tmp_path):
    folder = write_published(tmp_path, "llada2", mask_token_id=..., block_size=...)[0]
    (folder / "generation_config.json").write_text(json.dumps({"block_length": 16, "eos_token_id": [EOS, 3]}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"mask_token": "<|mask|>", "added_tokens_decoder": {"88": {"content": "<|mask|>"}}})
    )
    with pytest.warns(UserWarning, match="without a tokenizer"):
        lm = freedave.load_model(folder)
    assert (lm.mask_token_id, lm.block_length, lm.eos_token_id) == (88, 16, EOS)


def test_a_mask_token_that_only_the_map_of_special_tokens_names(tmp_path):
    """As Stable-DiffCoder's tokenizer has it."""
    folder = write_published(tmp_path, "stable_diffcoder", mask_token_id=...)[0]
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<[MASK_TOKEN]>"}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"7": {"content": "<[MASK_TOKEN]>", "special": True}}})
    )
    with pytest.warns(UserWarning, match="without a tokenizer"):
        assert freedave.load_model(folder).mask_token_id == 7


@pytest.mark.parametrize("architectures", [..., None, [], ["LlamaForCausalLM"]])
def test_a_llama_of_no_published_family_is_a_native_layout(tmp_path, architectures):
    said = {"attention": "full", "block_size": ...} if architectures != ["LlamaForCausalLM"] else {"block_size": ...}
    folder = write_published(tmp_path, "stable_diffcoder", architectures=architectures, **said)[0]
    if "attention" in said:
        assert freedave.load_model(folder).attention == "full"
    else:
        with pytest.raises(freedave.CheckpointError, match="attention missing; a diffusion language model needs"):
            freedave.load_model(folder)


def test_a_mask_that_ends_sequences(tmp_path):
    folder = write_published(tmp_path, "llada_moe", mask_token_id=EOS)[0]
    with pytest.warns(UserWarning, match=f"its files name {EOS} as the mask token and as an end of sequence"):
        freedave.load_model(folder)


def test_config_json_has_the_last_word(tmp_path):
    folder = write_published(tmp_path, "sdar")[0]
    (folder / "generation_config.json").write_text(
        json.dumps({"block_length": 4, "eos_token_id": 1, "mask_token_id": 2})
    )
    assert settings(freedave.load_model(folder)) == ("block_causal", False, 4, MASK, EOS)


@pytest.mark.parametrize("named_by", ["folder", "origin", "cache"])
def test_a_model_that_was_published_with_editing_says_that_there_is_none(tmp_path, named_by):
    folder = {"cache": "models--inclusionAI--LLaDA2.1-mini/snapshots/0123", "folder": "LLaDA2.1-mini"}.get(
        named_by, "x"
    )
    origin = {"_name_or_path": "inclusionAI/LLaDA2.1-mini"} if named_by == "origin" else {}
    source = write_published(tmp_path / folder, "llada2", **origin)[0]
    with pytest.warns(
        UserWarning, match="committed tokens stay, and answers can differ from those of its own"
    ) as warned:
        freedave.load_model(source)
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="this one does not: committed tokens stay"):
        convert_checkpoint(source, tmp_path / "native")


def test_a_model_without_editing_says_nothing_of_it(tmp_path, recwarn):
    freedave.load_model(write_published(tmp_path / "LLaDA2.0-mini", "llada2")[0])
    assert not recwarn


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_configuration_gives_no_warning(family, tmp_path, recwarn):
    folder = write_published(tmp_path / "published", family)[0]
    freedave.load_model(folder)
    freedave.load_model(convert_checkpoint(folder, tmp_path / "native").folder)
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_not_known_are_named_in_one_warning(family, tmp_path):
    folder = write_published(
        tmp_path / "x", family, zeta=0, alpha=False, omega=None, use_regular_causal=False, clip_qkv=None
    )[0]
    with pytest.warns(
        UserWarning, match="config.json has keys that are not known here, and were ignored: alpha, zeta$"
    ) as w:
        lm = freedave.load_model(folder)
    assert len(w) == 1
    assert torch.equal(
        logits(lm, token_ids()), logits(freedave.load_model(write_published(tmp_path / "y", family)[0]), token_ids())
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(family, dtype, tmp_path):
    folder, _, tensors = write_published(tmp_path / "float32", family, shards=2)
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    folder = write_checkpoint(tmp_path / "bfloat16", json.loads((folder / "config.json").read_text()), stored, shards=2)
    lm = freedave.load_model(folder, dtype=dtype)
    assert {parameter.dtype for parameter in lm.model.parameters()} == {dtype}
    embedding = next(tensor for name, tensor in stored.items() if "embed" in name or "wte" in name)
    assert torch.equal(lm.model.get_input_embeddings().weight, embedding.to(dtype))
    for name, buffer in lm.model.named_buffers():  # kept exact: the rotary frequencies, the experts' selection bias
        assert buffer.dtype == torch.float32, name
    assert torch.isfinite(logits(lm, token_ids())).all()


def test_a_tied_head_that_is_stored_must_equal_the_embedding(tmp_path):
    folder, config, tensors = write_published(tmp_path, "dream", tie_word_embeddings=True)
    embedding = tensors["model.embed_tokens.weight"]
    write_checkpoint(folder, config, tensors | {"lm_head.weight": embedding}, shards=2)
    (folder / "model.safetensors").unlink()
    lm = freedave.load_model(folder)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    write_checkpoint(folder, config, tensors | {"lm_head.weight": embedding + 1}, shards=2)
    with pytest.raises(freedave.CheckpointError, match="not equal: lm_head.weight and model.embed_tokens.weight"):
        freedave.load_model(folder)


def test_stored_rotary_frequencies_are_not_needed(tmp_path):
    folder, config, tensors = write_published(tmp_path, "dream")
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    freedave.load_model(write_checkpoint(folder, config, tensors | extra))


PEAK = """
import sys, torch, freedave, freedave.models.checkpoint
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
freedave.load_model(sys.argv[1])  # whatever is loaded once for all: tiny
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = status("VmRSS")
lm = freedave.load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in lm.model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("family", "dtype"), [("llada2", "float32"), ("llada", "float16")])
def test_peak_memory_is_the_model_and_one_file(family, dtype, tmp_path):
    wide = (
        {"mlp_hidden_size": 16384, "d_model": 64, "n_layers": 6}
        if family == "llada"
        else {"moe_intermediate_size": 4096, "hidden_size": 64}
    )
    small = write_published(tmp_path / "small", family)[0]
    large, _, tensors = write_published(tmp_path / "large", family, shards=8, **wide)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    largest = max(file.stat().st_size for file in large.glob("*.safetensors"))
    run = [sys.executable, "-c", PEAK, str(small), str(large), dtype]
    peak, model = map(int, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert stored > 70e6 and largest < stored / 4
    assert peak <= model + largest + 8e6, (
        f"{peak / 1e6:.1f} MB for a model of {model / 1e6:.1f} MB in files of {largest / 1e6:.1f}"
    )
