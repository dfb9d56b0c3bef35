"""Which rooms of the package may know which: decoding without transformers, and imports that point down."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import freedave

PACKAGE = Path(freedave.__file__).parent
# From the top down. A module may import from its own floor and from those below it; the last is the ground.
FLOORS = (
    ("cli", "integrations", "demo", "picture"),
    ("decode",),
    ("models",),
    ("forward",),
    ("integers", "mkl_mode"),
)
FLOOR_OF = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules(room: str) -> list[str]:
    """Every module of a room, by its full name."""
    files = sorted((PACKAGE / room).rglob("*.py"))
    names = [".".join(("freedave", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def without(package: str, names: list[str]) -> subprocess.CompletedProcess[str]:
    """Imports modules, each in the order given, in an interpreter in which a package cannot be imported."""
    code = (
        f"import sys, importlib; sys.modules[{package!r}] = None\nfor name in {names!r}: importlib.import_module(name)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("room", ["decode", "forward"])
def test_an_engine_decodes_without_transformers(room: str) -> None:
    names = modules(room)
    assert len(names) > 5
    result = without("transformers", names)
    assert result.returncode == 0, result.stderr


def test_a_missing_package_would_be_noticed() -> None:
    assert "transformers" in without("transformers", ["freedave.models.diffusion_lm"]).stderr


def test_options_of_the_command_line_need_no_torch() -> None:
    result = without("torch", ["freedave.cli.command_line"])
    assert result.returncode == 0, result.stderr


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports, within functions too, but for those that only types are taken from."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are spelled out, so that they can be found"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from imported(node)


def test_imports_point_down() -> None:
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # names of every room, imported when they are asked for
        assert room in FLOOR_OF, f"{file}: which floor?"
        for name in imported(ast.parse(file.read_text())):
            package, _, rest = name.partition(".")
            if package == "freedave":
                floor = FLOOR_OF.get(
                    rest.partition(".")[0]
                )  # None: a name of the package's root, which knows all rooms
                if floor is None or floor > FLOOR_OF[room]:
                    wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)
