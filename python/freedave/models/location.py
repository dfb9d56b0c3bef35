"""Which folder a checkpoint's name means: a local folder, the embedded model, or an entry of the Hugging Face cache.

Nothing is ever downloaded. The cache keeps a model as `models--ORG--NAME/` with `refs/REVISION` (a commit) and
`snapshots/COMMIT/` (the files).
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants

from freedave.models.errors import CheckpointError

DEMO_CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint.

    Args:
        path: a folder, "demo", or a model's name on the hub ("ORG/NAME") whose files are in the local cache.
        revision: branch, tag or commit of a hub model; None is "main".

    Raises:
        CheckpointError: no such folder, model or revision; a revision of a folder.
    """
    folder = DEMO_CHECKPOINT if str(path) == "demo" else Path(path)
    if not folder.is_dir() and isinstance(path, str) and HUB_NAME.fullmatch(path):
        return _cached(path, "main" if revision is None else revision)
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint folder at {folder}; give a local folder, or 'demo' for the embedded model, or the name of a "
            "model in the Hugging Face cache, such as GSAI-ML/LLaDA-8B-Instruct"
        )
    if revision is not None:
        raise CheckpointError(f"revision {revision!r}: {folder} is a folder, and only models of the hub have revisions")
    return folder


def names_of(folder: Path, name: str) -> tuple[str, ...]:
    """What a checkpoint is called: as it was asked for, its folder, its entry in the Hugging Face cache (which may be "")."""
    folder = folder.resolve()
    cached = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    return Path(name).name, folder.name, cached


def _cached(name: str, revision: str) -> Path:
    cache = Path(constants.HF_HUB_CACHE)
    entry = cache / f"models--{name.replace('/', '--')}"
    if not entry.is_dir():
        raise CheckpointError(
            f"there is neither a folder {name} nor a model {name} in the Hugging Face cache {cache}; nothing is "
            f"downloaded here: `hf download {name}` does"
        )
    references = {str(file.relative_to(entry / "refs")): file for file in (entry / "refs").rglob("*") if file.is_file()}
    snapshots = {folder.name: folder for folder in (entry / "snapshots").glob("*") if folder.is_dir()}
    commit = references[revision].read_text(encoding="utf-8").strip() if revision in references else revision
    if commit not in snapshots:
        known = ", ".join(sorted({*references, *snapshots})) or "none"
        raise CheckpointError(
            f"the files of {name} at revision {revision!r} are not in the Hugging Face cache {cache} (revisions there: "
            f"{known}); nothing is downloaded here: `hf download {name} --revision {revision}` does"
        )
    return snapshots[commit]
