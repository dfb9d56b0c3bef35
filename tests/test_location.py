"""locate: which folder a checkpoint's name means, without a network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from published_configs import MASK
from published_layouts import write_published

import freedave
from freedave.models.location import DEMO_CHECKPOINT, locate

NAME, COMMIT, OLDER = (
    "GSAI-ML/LLaDA-8B-Instruct",
    "08b83a6feb34df1a6011b80c3c00c7563e963b07",
    "9275bf8f5a5687507189baf4",
)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub cache with one model at two commits: files are links to blobs, as the hub's own client writes it."""
    entry = tmp_path / "hub" / "models--GSAI-ML--LLaDA-8B-Instruct"
    blobs = entry / "blobs"
    blobs.mkdir(parents=True)
    for commit, vocabulary in ((COMMIT, 96), (OLDER, 128)):
        written = write_published(tmp_path / commit, "llada", shards=2, embedding_size=vocabulary)[0]
        snapshot = entry / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in written.iterdir():
            blob = file.rename(blobs / f"{commit}-{file.name}")
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    for reference, commit in (("main", COMMIT), ("refs/pr/7", OLDER)):
        (entry / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
        (entry / "refs" / reference).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refused)
    return entry


def test_example(hub):
    lm = freedave.load_model(NAME, dtype=torch.bfloat16)
    assert lm.name == NAME and lm.mask_token_id == MASK and lm.vocab_size == 96


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), (COMMIT, COMMIT), (OLDER, OLDER), ("refs/pr/7", OLDER)]
)
def test_revisions(hub, revision, commit):
    assert locate(NAME, revision).name == commit
    assert freedave.load_model(NAME, revision=revision).vocab_size == {COMMIT: 96, OLDER: 128}[commit]


def test_folders(hub, tmp_path):
    assert locate("demo") == DEMO_CHECKPOINT
    assert locate(tmp_path) == locate(str(tmp_path)) == tmp_path
    (tmp_path / NAME).mkdir(parents=True)
    assert locate(NAME) == Path(NAME)  # a folder of that name comes first


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            "GSAI-ML/LLaDA-1.5",
            None,
            "neither a folder GSAI-ML/LLaDA-1.5 nor a model .* `hf download GSAI-ML/LLaDA-1.5` does",
        ),
        (NAME, "v2", f"at revision 'v2' are not .*revisions there: {COMMIT}, {OLDER}, main, refs/pr/7"),
        (NAME, "../../..", "revision '../../..' are not in the Hugging Face cache"),
        (Path(NAME), None, "no checkpoint folder at GSAI-ML/LLaDA-8B-Instruct"),
        ("nowhere", None, "no checkpoint folder at nowhere; give a local folder, or 'demo' .*or the name of a model"),
        ("a/b/c", None, "no checkpoint folder at a/b/c"),
        ("demo", "main", "revision 'main': .* is a folder, and only models of the hub have revisions"),
    ],
)
def test_what_is_not_there(hub, name, revision, message):
    with pytest.raises(freedave.CheckpointError, match=message):
        freedave.load_model(name, revision=revision)


def test_an_incomplete_download(hub):
    (hub / "blobs" / f"{COMMIT}-model-00002-of-00002.safetensors").unlink()  # leaves a dangling link
    with pytest.raises(freedave.CheckpointError, match="missing shards: model-00002-of-00002.safetensors"):
        freedave.load_model(NAME)
