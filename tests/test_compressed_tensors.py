"""Weights that compressed-tensors quantised: what they compute when transformers has unpacked them, and decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_layouts import write_published
from quantised_checkpoints import by_compressed_tensors, decode, load, rewrite, write_native
from test_published_checkpoints import assert_agree, logits, reference, token_ids

import freedave
from freedave.models import quantisation
from freedave.models.conversion import convert_checkpoint
from freedave.models.inspection import inspect_checkpoint

pytest.importorskip("compressed_tensors", reason="pip install -r requirements/dev.txt")

KINDS = [("int-quantized", 8), ("float-quantized", 8), ("pack-quantized", 8), ("pack-quantized", 4)]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("executor", ["planned", "graph"])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_example(kind, bits, executor, tmp_path):
    """A published checkpoint whose names are the native class's."""
    source, config, _ = write_published(tmp_path / "published", "sdar")
    folder, tensors = by_compressed_tensors(source, tmp_path / "quantised", kind, bits)
    lm = load(folder)
    ids = token_ids()
    assert_agree(logits(lm, ids), reference("sdar", config, tensors, ids))
    assert (logits(lm, ids) - logits(load(source), ids)).abs().max() > 1e-3
    assert lm.projection is lm.model.lm_head and lm.takes_draft_attention
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load(folder, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}
    decode(lm, executor)


@pytest.mark.parametrize("kind", ["pack-quantized", "float-quantized"])
@pytest.mark.parametrize("family", ["llada", "dream", "sdar_moe", "llada2"])
def test_native_layouts(family, kind, tmp_path):
    """A converted folder of every native class, experts included, against the dense model with the same weights."""
    native = write_native(tmp_path, family)
    folder, tensors = by_compressed_tensors(native, tmp_path / "quantised", kind)
    rewrite(native, lambda dense: dense.update(tensors))
    lm, dense = load(folder), load(native)
    ids = token_ids()
    assert torch.equal(logits(lm, ids), logits(dense, ids))
    assert torch.equal(decode(lm, "graph"), decode(dense, "planned"))


def test_inspect(tmp_path):
    """Memory is that of dense weights."""
    source = write_published(tmp_path / "published", "sdar")[0]
    folder = by_compressed_tensors(source, tmp_path / "quantised", "pack-quantized", 4)[0]
    found, dense = inspect_checkpoint(folder), inspect_checkpoint(source)
    assert found.memory == dense.memory and found.stored is not None and dense.stored is not None
    assert found.stored.bytes < dense.stored.bytes
    assert found.quantisation == "compressed-tensors, pack-quantized int4, unpacked while loading"


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    source = write_published(tmp_path / "published", "sdar")[0]
    return by_compressed_tensors(source, tmp_path / "quantised", "pack-quantized", 4)[0]


def test_the_library_is_missing(packed, monkeypatch):
    monkeypatch.setattr(quantisation, "is_compressed_tensors_available", lambda: False)
    with pytest.raises(
        ValueError, match="by compressed-tensors, which is not installed, or too old: pip install 'compressed-"
    ):
        freedave.load_model(packed)
    inspect_checkpoint(packed)  # needs none


def test_converting(packed, tmp_path):
    with pytest.raises(
        ValueError, match="has quantised weights .* convert the checkpoint that is not quantised, then quanti"
    ):
        convert_checkpoint(packed, tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("part", ["_packed", "_scale", "_shape"])
def test_a_part_is_missing(part, packed):
    rewrite(packed, lambda tensors: tensors.pop(Q_PROJ + part))
    with pytest.raises(ValueError, match=rf"incomplete quantised weights: {Q_PROJ} lacks weight{part}"):
        freedave.load_model(packed)
    with pytest.raises(ValueError, match="incomplete quantised weights"):
        inspect_checkpoint(packed)


def test_other_tensors_are_missing_or_too_many(packed):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(3, 3)
        for part in ("packed", "scale", "shape"):
            tensors[f"model.extra.weight_{part}"] = torch.zeros(1)

    rewrite(packed, change)
    with pytest.raises(
        ValueError, match="missing keys: model.norm.weight; unexpected keys: model.extra.weight; wrong shapes: lm_"
    ):
        freedave.load_model(packed)


def test_parts_that_do_not_fit(packed):
    """What only unpacking tells."""
    rewrite(packed, lambda tensors: tensors.update({f"{Q_PROJ}_shape": torch.tensor([64, 16])}))
    with pytest.raises(
        ValueError, match=r"transformers cannot load the weights \(compressed-tensors, pack-quantized int4"
    ):
        freedave.load_model(packed)
