"""Which of a checkpoint's files can be read: nothing else is opened, since a named pipe, for one, would wait for ever."""

from __future__ import annotations

import stat
from pathlib import Path

from freedave.models.errors import CheckpointError, first_line


def not_a_file(path: Path) -> str | None:
    """What stands in a file's place, such as "a folder"; None for a file, and where nothing is."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else None
    except OSError as error:  # a link to itself, a folder that may not be entered
        return f"not readable ({first_line(error)})"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device or a socket"


def is_file(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        CheckpointError: there is something else.
    """
    what = not_a_file(path)
    if what is not None:
        raise CheckpointError(f"{path} is {what}, and should be a file")
    return path.exists()
