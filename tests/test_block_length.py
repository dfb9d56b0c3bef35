"""How long a published checkpoint's blocks are: what its files say, else its name, else what is usual in the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from published_layouts import write_published

import freedave
from freedave.models.conversion import convert_checkpoint


def write_silent(folder: Path, **changes: Any) -> Path:
    """SDAR as it is published: no file names the block length."""
    return write_published(folder, "sdar", **({"block_size": ...} | changes))[0]


@pytest.mark.parametrize("length", [4, 8, 16, 32, 64])
def test_the_name_says_the_block_length(tmp_path, length):
    name = f"SDAR-8B-Chat-b{length}"
    folder = write_silent(tmp_path / name)
    with pytest.warns(UserWarning, match=f"no block_length: {length} is used, since the name {name} says so") as warned:
        lm = freedave.load_model(folder)
    assert lm.block_length == length and len(warned) == 1
    with pytest.warns(UserWarning, match=f"since the name {name} says so"):
        converted = convert_checkpoint(folder, tmp_path / "native").folder
    assert freedave.load_model(converted).block_length == length


def test_names_of_links_caches_and_origins(tmp_path, monkeypatch):
    plain = write_silent(tmp_path / "model")
    (tmp_path / "SDAR-b8").symlink_to(plain)
    (tmp_path / "latest").symlink_to(write_silent(tmp_path / "SDAR-b16"))
    snapshot = write_silent(tmp_path / "hub" / "models--JetLM--SDAR-8B-Chat-b32" / "snapshots" / "0123")
    origin = write_silent(tmp_path / "mine", _name_or_path="JetLM/SDAR-8B-Chat-b64")
    both = write_silent(tmp_path / "mine-b8", _name_or_path="JetLM/SDAR-8B-Chat-b64")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "SDAR-b16")
    for path, length in [
        (tmp_path / "SDAR-b8", 8),
        (tmp_path / "latest", 16),
        (".", 16),
        (snapshot, 32),
        ("JetLM/SDAR-8B-Chat-b32", 32),
        (origin, 64),
        (both, 8),
    ]:
        with pytest.warns(UserWarning, match=f"no block_length: {length} is used, since the name"):
            assert freedave.load_model(path).block_length == length


@pytest.mark.parametrize("name", ["SDAR-4B-Chat", "SDAR-7b", "x-b16bit", "x-b5", "b16"])
def test_names_that_say_nothing(tmp_path, name):
    with pytest.warns(UserWarning, match="no block_length: 4 is used, the usual one of the family; if this model was"):
        assert freedave.load_model(write_silent(tmp_path / name)).block_length == 4


def test_the_files_are_believed_before_the_name(tmp_path):
    folder = write_silent(tmp_path / "SDAR-b16", block_size=4, _name_or_path="SDAR-b32")
    with pytest.warns(
        UserWarning, match="name block_length 4, which is used, though the name SDAR-b16 says 16"
    ) as warned:
        assert freedave.load_model(folder).block_length == 4
    assert len(warned) == 1


@pytest.mark.parametrize("key", ["block_length", "block_size", "bd_size", "block_len", "diffusion_block_size"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_every_name_of_the_block_length(tmp_path, recwarn, key, file):
    folder = write_silent(tmp_path)
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(values | {key: 8}))
    assert freedave.load_model(folder).block_length == 8
    assert not recwarn
