"""Weights that torchao quantised, and that stay so in memory: what they compute, and decoding with them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from quantised_checkpoints import SINGLE, by_torchao, change_config, decode, load, rewrite, write_native
from safetensors.torch import load_file
from test_published_checkpoints import assert_agree, logits, reference, token_ids

import freedave
from freedave.cli import main
from freedave.decode.graph_executor import _read_by_steps
from freedave.forward.fused_projections import FusedProjections
from freedave.models import quantisation
from freedave.models.inspection import inspect_checkpoint

pytest.importorskip("torchao", reason="pip install -r requirements/torchao.txt; make test runs this file with it")

EXECUTORS = pytest.mark.parametrize("executor", ["planned", "graph"])
INT8, FLOAT8, INT4 = KINDS = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def dense_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in float64: quantised numbers times the scale of their row, or of their part of a row."""
    stored = {name: tensor.double() for name, tensor in load_file(folder / SINGLE).items()}
    dense = {name: tensor for name, tensor in stored.items() if "._weight_" not in name}
    for name, numbers in stored.items():
        module, _, part = name.partition("._weight_")
        if part == "qdata":
            scale = stored[f"{module}._weight_scale"].reshape(len(numbers), -1, 1)
            parts = numbers.reshape(len(numbers), scale.shape[1], -1)
            dense[f"{module}.weight"] = (parts * scale).reshape(numbers.shape)
    return dense


@EXECUTORS
@pytest.mark.parametrize("kind", KINDS)
def test_example(kind, executor, tmp_path):
    """A converted folder that transformers quantised, and the published one with its weights."""
    native = write_native(tmp_path, "sdar")
    folder = by_torchao(native, tmp_path / "quantised", kind)
    lm = load(folder)
    ids, config = token_ids(), json.loads((tmp_path / "published" / "config.json").read_text())
    assert_agree(logits(lm, ids), reference("sdar", config, dense_tensors(folder), ids))
    assert (logits(lm, ids) - logits(load(native), ids)).abs().max() > 1e-3
    assert lm.has_plain_head and lm.takes_draft_attention and lm.projection is lm.model.lm_head
    found = decode(lm, executor)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    shutil.copy(folder / SINGLE, tmp_path / "published" / SINGLE)
    change_config(tmp_path / "published", quantization_config=settings)
    assert torch.equal(decode(load(tmp_path / "published"), executor), found)


@pytest.mark.parametrize("kind", [INT8, FLOAT8])
@pytest.mark.parametrize("family", ["llada", "dream", "sdar_moe", "llada2"])
def test_native_layouts(family, kind, tmp_path):
    """One of every native class, against the dense model with the same weights."""
    native = write_native(tmp_path, family)
    folder = by_torchao(native, tmp_path / "quantised", kind)
    rewrite(
        native, lambda dense: dense.update({name: tensor.float() for name, tensor in dense_tensors(folder).items()})
    )
    lm, dense = load(folder), load(native)
    ids = token_ids()
    # Both round in float32: one scales the product, the other the weights.
    assert (logits(lm, ids) - logits(dense, ids)).abs().max() <= 5e-5
    for executor in ("planned", "graph"):
        decode(lm, executor)


@pytest.mark.parametrize("compile", [False, True])
def test_compiled_and_replaced(compile, tmp_path, monkeypatch):
    """Quantised layers are not joined, and a captured step is not used once they are others."""
    monkeypatch.setattr("freedave.forward.compiled_layers.BACKEND", "aot_eager")
    native = write_native(tmp_path, "sdar")
    lm = load(by_torchao(native, tmp_path / "quantised", INT8))
    assert not FusedProjections(lm.model)._replaced
    found = decode(lm, "graph", compile=compile)
    assert torch.equal(found, decode(lm, "planned"))
    executor = lm.idle_executor
    assert torch.equal(decode(lm, "graph", compile=compile), found) and lm.idle_executor is executor
    assert 0 not in _read_by_steps(lm.model)  # an address each
    first, second = (layer.self_attn.q_proj for layer in lm.model.model.layers)
    first.weight, second.weight = second.weight, first.weight
    changed = decode(lm, "graph", compile=compile)
    assert lm.idle_executor is not executor
    assert torch.equal(changed, decode(lm, "planned")) and not torch.equal(changed, found)


@EXECUTORS
def test_a_quantised_head(executor, tmp_path):
    native = write_native(tmp_path, "sdar")
    lm = load(by_torchao(native, tmp_path / "quantised", INT8, include_input_output_embeddings=True))
    assert type(lm.model.lm_head.weight) is not torch.nn.Parameter
    assert lm.projection is None and lm.has_plain_head
    decode(lm, executor)


@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits(kind, tmp_path):
    """Lossless in the graph executor's steps of one shape; the weights compute in the type that they were quantised in."""
    folder = by_torchao(write_native(tmp_path, "sdar"), tmp_path / "quantised", kind, torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"in torch.bfloat16 .* cannot be used in torch.float32: load it with dtype=torch.bf"
    ):
        freedave.load_model(folder)
    lm = load(folder, dtype="auto")
    assert lm.model.lm_head.weight.dtype == torch.bfloat16
    decode(lm, "graph", draft_steps=8)


def test_inspect(tmp_path, capsys):
    """The memory is what the loaded model takes."""
    native = write_native(tmp_path, "sdar")
    folder = by_torchao(native, tmp_path / "quantised", INT8)
    assert main(["inspect", str(folder)]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["quantised"] == "torchao, Int8WeightOnlyConfig"
    found, dense = inspect_checkpoint(folder), inspect_checkpoint(native)
    assert (found.parameters, found.quantisation, dense.quantisation) == (dense.parameters, lines["quantised"], None)
    taken = 0
    for weight in load(folder).model.parameters():
        inside = type(weight) is not torch.nn.Parameter and weight.__tensor_flatten__()[0]
        taken += sum(getattr(weight, name).nbytes for name in inside) if inside else weight.nbytes
    assert found.memory["float32"]["weights"] == taken < dense.memory["float32"]["weights"]
    assert found.memory["bfloat16"]["weights"] < taken


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return by_torchao(write_native(tmp_path, "sdar"), tmp_path / "quantised", INT8)


def test_the_library_is_missing(folder, monkeypatch):
    monkeypatch.setattr(quantisation, "is_torchao_available", lambda: False)
    with pytest.raises(
        ValueError, match="quantised by torchao, which is not installed, or too old: pip install torchao"
    ):
        freedave.load_model(folder)
    inspect_checkpoint(folder)  # needs none


@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_a_part_is_missing(part, folder):
    rewrite(folder, lambda tensors: tensors.pop(f"{Q_PROJ}._weight_{part}"))
    with pytest.raises(ValueError, match=rf"incomplete quantised weights: {Q_PROJ}.weight lacks _weight_{part}"):
        freedave.load_model(folder)


def test_other_tensors_are_missing_or_too_many(folder):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        for part in ("qdata", "scale", "zero_point"):
            tensors[f"model.extra._weight_{part}"] = torch.zeros(1)

    rewrite(folder, change)
    with pytest.raises(ValueError, match="missing keys: model.norm.weight; unexpected keys: model.extra.weight"):
        freedave.load_model(folder)
