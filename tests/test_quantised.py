"""Quantised weights, by transformers' own loaders: what they compute, and that decoding with them is lossless."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import write_published
from quantised_checkpoints import SINGLE, by_compressed_tensors, by_torchao, change_config, write_native
from safetensors.torch import load_file, save_file
from test_published_checkpoints import assert_agree, logits, reference, token_ids

import freedave
from freedave.cli import main
from freedave.decode.graph_executor import _read_by_steps
from freedave.forward.fused_projections import FusedProjections
from freedave.models import quantisation
from freedave.models.conversion import convert_checkpoint
from freedave.models.inspection import inspect_checkpoint

pytest.importorskip("torchao", reason="pip install -r requirements/dev.txt")
pytest.importorskip("compressed_tensors", reason="pip install -r requirements/dev.txt")

EXECUTORS = pytest.mark.parametrize("executor", ["planned", "graph"])
TORCHAO = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"]
COMPRESSED = [("int-quantized", 8), ("float-quantized", 8), ("pack-quantized", 8), ("pack-quantized", 4)]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def load(folder: Path, **options: Any) -> freedave.DiffusionLM:
    lm = freedave.load_model(folder, **options)
    lm.eos_token_id = None
    return lm


def decode(lm: freedave.DiffusionLM, executor: str, **options: Any) -> torch.Tensor:
    blocks = lm.block_length or 8
    options = {"max_new_tokens": 16, "draft_steps": 4, "check_lossless": True, "block_length": blocks} | options
    out = freedave.generate(lm, torch.arange(5)[None], executor=executor, **options)
    assert out.num_forwards < out.static.num_forwards
    return out.sequences


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torchao folder: whole numbers or bytes, times the scale of their row or of their part of one."""
    dense = {}
    for name, tensor in load_file(folder / SINGLE).items():
        module, quantised, part = name.partition("._weight_")
        dense[f"{module}.weight" if part == "qdata" else name] = tensor.double()
        if part == "qdata":
            scale = load_file(folder / SINGLE)[f"{module}._weight_scale"].double()
            parts = tensor.double().reshape(len(tensor), scale.numel() // len(tensor), -1)
            dense[f"{module}.weight"] = (parts * scale.reshape(len(tensor), -1, 1)).reshape(tensor.shape)
        elif quantised:
            del dense[name]
    return dense


@EXECUTORS
@pytest.mark.parametrize("kind", TORCHAO)
def test_example(kind, executor, tmp_path):
    """A converted folder that transformers quantised, and the published one with its weights."""
    native = write_native(tmp_path, "sdar")
    folder = by_torchao(native, tmp_path / "quantised", kind)
    lm = load(folder)
    ids, config = token_ids(), json.loads((tmp_path / "published" / "config.json").read_text())
    assert_agree(logits(lm, ids), reference("sdar", config, unpacked(folder), ids))
    assert (logits(lm, ids) - logits(load(native), ids)).abs().max() > 1e-3
    assert lm.has_plain_head and lm.takes_draft_attention and lm.projection is lm.model.lm_head
    found = decode(lm, executor)
    shutil.copy(folder / SINGLE, tmp_path / "published" / SINGLE)
    change_config(
        tmp_path / "published",
        quantization_config=json.loads((folder / "config.json").read_text())["quantization_config"],
    )
    published = load(tmp_path / "published")
    assert torch.equal(decode(published, executor), found) and published.block_length == lm.block_length


@EXECUTORS
@pytest.mark.parametrize(("kind", "bits"), COMPRESSED)
def test_unpacked_weights(kind, bits, executor, tmp_path):
    source, config, _ = write_published(tmp_path / "published", "sdar")
    folder, tensors = by_compressed_tensors(source, tmp_path / "quantised", kind, bits)
    lm = load(folder)
    ids = token_ids()
    assert_agree(logits(lm, ids), reference("sdar", config, tensors, ids))
    assert (logits(lm, ids) - logits(load(source), ids)).abs().max() > 1e-3
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    decode(lm, executor)


@pytest.mark.parametrize("family", ["llada", "dream", "sdar_moe", "llada2"])
def test_native_layouts(family, tmp_path):
    """One of every native class, against the dense model with the same weights."""
    native = write_native(tmp_path, family)
    quantised = [by_torchao(native, tmp_path / kind, kind) for kind in TORCHAO[:2]]
    quantised.append(by_compressed_tensors(native, tmp_path / "packed", "pack-quantized", 4)[0])
    for folder in quantised:
        lm, dense = load(folder), load(native)
        for name, weight in lm.model.named_parameters():
            dense.model.get_parameter(name).data.copy_(
                weight if type(weight) is torch.nn.Parameter else weight.dequantize()
            )
        ids = token_ids()
        # Both round in float32: one scales the weights, the other the product.
        assert (logits(lm, ids) - logits(dense, ids)).abs().max() <= 5e-5
        for executor in ("planned", "graph"):
            decode(lm, executor)


@pytest.mark.parametrize("compile", [False, True])
def test_in_another_place_or_compiled(compile, tmp_path, monkeypatch):
    """Quantised layers are not joined, and a captured step is not used once they are others."""
    monkeypatch.setattr("freedave.forward.compiled_layers.BACKEND", "aot_eager")
    native = write_native(tmp_path, "sdar")
    lm = load(by_torchao(native, tmp_path / "quantised", TORCHAO[0]))
    assert not FusedProjections(lm.model)._replaced
    found = decode(lm, "graph", compile=compile)
    assert torch.equal(found, decode(lm, "planned"))
    executor = lm.idle_executor
    assert torch.equal(decode(lm, "graph", compile=compile), found) and lm.idle_executor is executor
    assert len(set(_read_by_steps(lm.model))) > len(list(lm.model.parameters()))  # scales, too
    first, second = (layer.self_attn.q_proj for layer in lm.model.model.layers)
    first.weight, second.weight = second.weight, first.weight
    changed = decode(lm, "graph", compile=compile)
    assert lm.idle_executor is not executor
    assert torch.equal(changed, decode(lm, "planned")) and not torch.equal(changed, found)


@EXECUTORS
def test_a_quantised_head(executor, tmp_path):
    native = write_native(tmp_path, "sdar")
    lm = load(by_torchao(native, tmp_path / "quantised", TORCHAO[0], include_input_output_embeddings=True))
    assert type(lm.model.lm_head.weight) is not torch.nn.Parameter
    assert lm.projection is None and lm.has_plain_head
    decode(lm, executor)


@pytest.mark.parametrize("kind", TORCHAO)
def test_in_16_bits(kind, tmp_path):
    """Lossless in the graph executor's steps of one shape; torchao's weights compute in the type they were quantised in."""
    native = write_native(tmp_path, "sdar")
    folder = by_torchao(native, tmp_path / "quantised", kind, torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"quantised in torch.bfloat16 .* cannot be used in torch.float32: load it with dtype="
    ):
        freedave.load_model(folder)
    lm = load(folder, dtype="auto")
    assert lm.model.lm_head.weight.dtype == torch.bfloat16
    out = freedave.generate(lm, torch.arange(5)[None], 16, draft_steps=8, check_lossless=True, executor="graph")
    assert out.num_forwards < out.static.num_forwards
    packed = by_compressed_tensors(
        write_published(tmp_path / "other", "sdar")[0], tmp_path / "packed", "int-quantized"
    )[0]
    assert {parameter.dtype for parameter in load(packed, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------- inspect


def test_inspect(tmp_path, capsys):
    """The memory is what the loaded model takes."""
    native = write_native(tmp_path, "sdar")
    folder = by_torchao(native, tmp_path / "quantised", TORCHAO[0])
    assert main(["inspect", str(folder)]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["quantised"] == "torchao, Int8WeightOnlyConfig"
    found, dense = inspect_checkpoint(folder), inspect_checkpoint(native)
    assert (found.parameters, found.quantisation, dense.quantisation) == (dense.parameters, lines["quantised"], None)
    model = load(folder).model
    parts = [getattr(weight, name) for weight in model.parameters() for name in _parts_of(weight)]
    parts += [weight for weight in model.parameters() if not _parts_of(weight)]
    assert found.memory["float32"]["weights"] == sum(part.nbytes for part in parts)
    assert found.memory["float32"]["weights"] < dense.memory["float32"]["weights"]
    packed = by_compressed_tensors(native, tmp_path / "packed", "pack-quantized", 4)[0]
    assert inspect_checkpoint(packed).memory == dense.memory
    assert inspect_checkpoint(packed).quantisation == "compressed-tensors, pack-quantized int4, unpacked while loading"


def _parts_of(weight: torch.Tensor) -> list[str]:
    return [] if type(weight) is torch.nn.Parameter else list(weight.__tensor_flatten__()[0])


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "function"),
    [("torchao", "is_torchao_available"), ("compressed-tensors", "is_compressed_tensors_available")],
)
def test_a_library_that_is_missing(method, function, tmp_path, monkeypatch):
    native = write_native(tmp_path, "sdar")
    if method == "torchao":
        folder = by_torchao(native, tmp_path / "quantised", TORCHAO[0])
    else:
        folder = by_compressed_tensors(native, tmp_path / "quantised", "int-quantized")[0]
    monkeypatch.setattr(quantisation, function, lambda: False)
    with pytest.raises(
        ValueError, match=f"quantised by {method}, which is not installed, or too old: pip install .*{method}"
    ):
        freedave.load_model(folder)
    inspect_checkpoint(folder)  # needs none


def test_converting(tmp_path):
    folder = by_compressed_tensors(
        write_published(tmp_path / "published", "sdar")[0], tmp_path / "quantised", "int-quantized"
    )[0]
    with pytest.raises(
        ValueError, match="has quantised weights .* convert the checkpoint that is not quantised, then quantise"
    ):
        convert_checkpoint(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_torchao_parts_that_are_missing(part, tmp_path):
    folder = by_torchao(write_native(tmp_path, "sdar"), tmp_path / "quantised", TORCHAO[0])
    tensors = load_file(folder / SINGLE)
    del tensors[Q_PROJ.replace("weight", f"_weight_{part}")]
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match=rf"incomplete quantised weights: {Q_PROJ}"):
        freedave.load_model(folder)


@pytest.mark.parametrize("part", ["_packed", "_scale", "_shape"])
def test_packed_parts_that_are_missing(part, tmp_path):
    source = write_published(tmp_path / "published", "sdar")[0]
    folder = by_compressed_tensors(source, tmp_path / "quantised", "pack-quantized", 4)[0]
    tensors = load_file(folder / SINGLE)
    del tensors[Q_PROJ + part]
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match=rf"incomplete quantised weights: {Q_PROJ}"):
        freedave.load_model(folder)


def test_other_tensors_that_are_missing_or_too_many(tmp_path):
    folder = by_torchao(write_native(tmp_path, "sdar"), tmp_path / "quantised", TORCHAO[0])
    tensors = load_file(folder / SINGLE)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.extra._weight_qdata"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    rewrite(folder, tensors)
    with pytest.raises(
        ValueError, match="missing keys: model.norm.weight; unexpected keys: .*extra.weight; wrong shapes: lm_head"
    ):
        freedave.load_model(folder)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(folder / SINGLE, "pt") as reader:
        metadata = reader.metadata()
    save_file(tensors, folder / SINGLE, metadata)
