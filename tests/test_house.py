"""How the house is built: imports point one way, no function is longer than a screen, the binding is smaller than kernels."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"freedave_kernels": ROOT / "freedave_kernels", "freedave": ROOT / "python/freedave"}
LONGEST_FUNCTION = 80
MOST_BINDING = 900


def modules() -> dict[str, Path]:
    """Every module of both packages by its full name; a package's is its __init__.py."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, within functions too, but for what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_for_type_checkers(child):
            children: list[ast.AST] = list(child.orelse)
        else:
            children = [child]
        for each in children:
            yield each
            yield from executed(each)


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """The modules of both packages that a module imports, at its top or when a function runs."""
    names = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return {name for name in names if name in MODULES and name != module}


IMPORTS = {module: imported(path.read_text(), module, path.name == "__init__.py") for module, path in MODULES.items()}


def test_imports_are_found_wherever_they_stand():
    source = (
        "from typing import TYPE_CHECKING\n"
        "import freedave_kernels as fk\n"
        "from freedave_kernels.ops.keep import keep\n"
        "from freedave_kernels import registry, use_backend\n"
        "from . import contract\n"
        "from ..ops.draft_step import draft_step\n"
        "if TYPE_CHECKING:\n    from freedave_kernels import dispatch\n"
        "else:\n    from freedave_kernels import _library\n"
        "def late():\n    import freedave_kernels.backends\n    importlib.import_module('freedave_kernels.arguments')\n"
    )
    names = "ops.keep registry _library backends arguments"
    expected = {"freedave_kernels", *(f"freedave_kernels.{name}" for name in names.split())}
    assert expected <= imported(source, "freedave_kernels.triton.launch", False)
    assert "freedave_kernels.dispatch" not in imported(source, "freedave_kernels.triton.launch", False)
    assert "freedave_kernels.ops.draft_step" in imported(source, "freedave_kernels.triton.launch", False)
    assert "freedave_kernels.contract" in imported(source, "freedave_kernels", True)
    assert IMPORTS["freedave_kernels.ops.keep"] >= {"freedave_kernels.arguments", "freedave_kernels.dispatch"}


def test_imports_make_no_circle():
    """Neither do those that a function makes when it runs: a circle that is cut open at run time is one to a reader."""
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_kernels_know_no_decoder():
    assert [name for name in IMPORTS if name.startswith("freedave_kernels")]
    for module, names in IMPORTS.items():
        if module.split(".")[0] == "freedave_kernels":
            assert not [name for name in names if name.split(".")[0] == "freedave"], module


@pytest.mark.parametrize("room", ["reference", "cpu", "triton"])
def test_rooms_of_kernels_import_nothing_from_the_ops(room):
    in_room = {name: names for name, names in IMPORTS.items() if name.startswith(f"freedave_kernels.{room}.")}
    assert in_room
    for module, names in in_room.items():
        assert not [name for name in names if f"{name}.".startswith("freedave_kernels.ops.")], module


def test_no_function_is_longer_than_a_screen():
    functions = [
        (node.end_lineno - node.lineno + 1, f"{module}.{node.name}")
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None
    ]
    assert len(functions) > 500
    assert not sorted(function for function in functions if function[0] > LONGEST_FUNCTION)


def test_the_binding_is_smaller_than_what_it_binds():
    """What csrc/ has besides the kernels and the headers that they share."""
    csrc = ROOT / "csrc"
    rooms = {csrc / "cpu", csrc / "cuda", csrc / "freedave"}
    binding = [path for path in csrc.rglob("*") if path.is_file() and not rooms & {*path.parents}]
    assert binding
    assert sum(len(path.read_text().splitlines()) for path in binding) <= MOST_BINDING
