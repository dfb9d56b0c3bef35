"""What config.json says of quantised weights, as far as it is refused; no library that quantises is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from published_layouts import write_published
from quantised_checkpoints import change_config, scheme

import freedave
from freedave.models.inspection import inspect_checkpoint

PACKED = scheme("pack-quantized", 4)


def torchao(kind: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind}}}


def refused(tmp_path: Path, family: str, settings: Any) -> str:
    folder = write_published(tmp_path, family)[0]
    change_config(folder, quantization_config=settings)
    with pytest.raises(ValueError, match="config.json: quantization_config") as loading:
        freedave.load_model(folder)
    with pytest.raises(ValueError, match="config.json: quantization_config") as inspecting:
        inspect_checkpoint(folder)
    assert str(loading.value) == str(inspecting.value)
    return str(loading.value)


@pytest.mark.parametrize("settings", [torchao("Int8WeightOnlyConfig"), PACKED], ids=["torchao", "compressed-tensors"])
@pytest.mark.parametrize(("family", "name"), [("llada", "LLaDA"), ("llada2", "LLaDA2")])
def test_a_layout_that_is_renamed(family, name, settings, tmp_path):
    said = refused(tmp_path, family, settings)
    assert (
        f"native layouts only, and {name} is published in another; convert the checkpoint that is not quantised" in said
    )
    assert said.endswith("(freedave convert), then quantise the converted folder with transformers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quant_method is 'gptq', and only torchao and compressed-tensors are read",
        ),
        (["torchao"], "quant_method is None, and only"),
        ({"quant_method": ["torchao"]}, "quant_method is ['torchao'], and only"),
        (
            torchao("Int8DynamicActivationInt8WeightConfig"),
            "quant_type is Int8DynamicActivationInt8WeightConfig, and only",
        ),
        (torchao(None), "quant_type is None, and only Int8WeightOnlyConfig"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "'int8_weight_only' is of an older torchao"),
        ({"quant_method": "torchao", "quant_type": {"default": "int8"}}, "quant_type is None, and only"),
        (
            scheme("pack-quantized", 4, input_activations={"num_bits": 8}),
            "input_activations: only weights may be quantised",
        ),
        (PACKED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: only weights may be quantised"),
        (
            PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config: only weights may be quantised, and",
        ),
        (scheme("int-quantized", 8), "int-quantized experts are not unpacked by transformers"),
        (scheme("nvfp4-pack-quantized", 4), "the format is nvfp4-pack-quantized, and only int-quantized"),
        (PACKED | {"config_groups": {"a": {}, "b": {}}}, "config_groups has 2 groups, and one"),
        (PACKED | {"config_groups": {"a": 1}}, "config_groups does not say how weights are quantised"),
        (PACKED | {"config_groups": None}, "config_groups has 0 groups"),
    ],
    ids=str,
)
def test_settings(settings, message, tmp_path):
    assert message in refused(tmp_path, "sdar_moe", settings)


@pytest.mark.parametrize("settings", [None, False, {}])
def test_settings_that_say_nothing(settings, tmp_path):
    folder = write_published(tmp_path, "llada")[0]
    change_config(folder, quantization_config=settings)
    freedave.load_model(folder)
    assert inspect_checkpoint(folder).quantisation is None
