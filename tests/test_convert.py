"""freedave convert: what it writes is a native checkpoint, for `load_model` and for transformers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published_configs import EOS, MASK
from published_layouts import PUBLISHED, write_checkpoint, write_code_tokenizer, write_published
from safetensors.torch import load_file
from test_published_checkpoints import LENGTH, assert_agree, logits, reference, settings, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import freedave
from freedave.cli import main
from freedave.forward.attention import block_causal_mask
from freedave.models.conversion import convert_checkpoint

FAMILIES = list(PUBLISHED)


def test_example(tmp_path, capsys):
    source = write_published(tmp_path / "published", "llada", shards=2)[0]
    target = tmp_path / "native"
    assert main(["convert", str(source), str(target)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"{target}: LLaDA as LlamaForCausalLM, 21 tensors, 0.1 MB in 1 file" in said.out
    assert "without a tokenizer: no tokenizer files" in said.out
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(
        logits(freedave.load_model(target), token_ids()), logits(freedave.load_model(source), token_ids())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    source, _, tensors = write_published(tmp_path / "published", family, shards=3)
    converted = convert_checkpoint(source, tmp_path / "native", max_file_bytes=20_000)
    assert len(converted.files) > 4 and converted.bytes < 1.2 * sum(t.numel() * 4 for t in tensors.values())
    ours, theirs = freedave.load_model(converted.folder), freedave.load_model(source)
    assert settings(ours) == settings(theirs)
    assert type(ours.model) is type(theirs.model)
    for (name, one), (other_name, other) in zip(
        sorted(ours.model.state_dict().items()), sorted(theirs.model.state_dict().items()), strict=True
    ):
        assert name == other_name and torch.equal(one, other)
    ids = token_ids()
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    again = convert_checkpoint(converted.folder, tmp_path / "again")  # a native layout, copied
    assert load_file(again.folder / "model.safetensors").keys() == {
        name for file in converted.files for name in load_file(converted.folder / file)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_alone_loads_it(family, tied, tmp_path, recwarn):
    source, config, tensors = write_published(tmp_path / "published", family, **{PUBLISHED[family].tying: tied})
    folder = convert_checkpoint(source, tmp_path / "native", max_file_bytes=50_000).folder
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ids = token_ids()
    # Full attention needs nothing; the block-causal mask is the caller's, as for any custom mask.
    block = freedave.load_model(folder).block_length
    mask = None if block is None else block_causal_mask(LENGTH, block, ids.device)
    with torch.no_grad():
        answer = model(ids[None], attention_mask=mask).logits[0]
    assert_agree(answer, reference(family, config, tensors, ids))


def test_weights_keep_their_type(tmp_path):
    source, config, tensors = write_published(tmp_path / "published", "llada2")
    stored = {name: t if name.endswith("expert_bias") else t.bfloat16() for name, t in tensors.items()}
    folder = convert_checkpoint(write_checkpoint(source, config, stored), tmp_path / "native").folder
    written = load_file(folder / "model.safetensors")
    assert {name for name, t in written.items() if t.dtype != torch.bfloat16} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)
    }
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_config_says_how_to_decode_and_names_no_code(tmp_path):
    source = write_published(tmp_path / "published", "dream")[0]
    config = json.loads((convert_checkpoint(source, tmp_path / "native").folder / "config.json").read_text())
    assert "auto_map" not in config and config["is_causal"] is False
    assert config["model_type"] == "qwen2" and config["architectures"] == ["Qwen2ForCausalLM"]
    assert [config[key] for key in ("mask_token_id", "attention", "block_length", "logits_shift", "eos_token_id")] == [
        MASK,
        "full",
        None,
        True,
        EOS,
    ]


# ------------------------------------------------------------------------------------------------------------- refusals


def converting_fails(source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(target.parent.iterdir())
    assert main(["convert", str(source), str(target)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert sorted(target.parent.iterdir()) == before  # neither a half-written nor a temporary folder
    return said.err


def test_nothing_is_overwritten(tmp_path, capsys):
    source = write_published(tmp_path / "published", "llada")[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty, and nothing is overwritten" in converting_fails(source, tmp_path / "full", capsys)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert "is a file; give a new folder" in converting_fails(source, tmp_path / "full" / "mine.txt", capsys)
    assert "is not empty" in converting_fails(source, source, capsys)
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(source), str(tmp_path / "empty")]) == 0
    assert main(["convert", str(source), str(tmp_path / "new" / "deep" / "er")]) == 0
    assert freedave.load_model(tmp_path / "empty").mask_token_id == MASK


def test_a_damaged_source_leaves_nothing_behind(tmp_path, capsys):
    source = write_published(tmp_path / "published", "llada2", shards=3)[0]
    (source / "model-00002-of-00003.safetensors").unlink()
    said = converting_fails(source, tmp_path / "native", capsys)
    assert "missing shards: model-00002-of-00003.safetensors" in said


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_published(tmp_path / "published", "llada")[0]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("freedave.models.conversion.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "native")
    assert [folder.name for folder in tmp_path.iterdir()] == ["published"]


# ------------------------------------------------------------------------------------------------------------- tokenizer


def test_the_tokenizer_is_written(tmp_path):
    source = write_published(tmp_path / "published", "dream")[0]
    write_code_tokenizer(source)
    folder = convert_checkpoint(source, tmp_path / "native").folder
    assert not list(folder.glob("*.py"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "Qwen2Tokenizer"
    assert not settings.keys() & {"auto_map", "is_local", "local_files_only"}
    theirs, ours = freedave.load_model(source).tokenizer, AutoTokenizer.from_pretrained(folder)
    text = "abba <|mask|> cab"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "ab"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
