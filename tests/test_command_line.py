"""The command as a process: what it needs before torch is imported, and where its output goes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from published_layouts import write_published

from freedave.cli import main, reporting

DECODER_PACKAGES = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "tqdm", "matplotlib")


def command(arguments: list[str], without: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, where some packages are not installed."""
    script = """
import sys
class NotInstalled:
    def find_spec(self, name, *_):
        if name in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"no module {name}", name=name)
sys.meta_path.insert(0, NotInstalled())
from freedave.cli import main, reporting
sys.exit(main(sys.argv[2:]))
"""
    run = [sys.executable, "-c", script, ",".join(without), *arguments]
    return subprocess.run(run, **{"capture_output": True, "text": True, "check": False} | options)


def test_info_with_torch_alone(tmp_path: Path) -> None:
    """As after a plain `pip install .`, without the extra `decode`."""
    done = command(["info"], without=DECODER_PACKAGES)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  cpu +usable$", done.stdout, re.MULTILINE)
    missing = r"embedded model: no module \w+; get what decodes with pip install 'freedave-kernels\[decode\]'"
    assert re.search(missing, done.stdout)


@pytest.mark.parametrize("name", ["generate", "demo", "convert", "inspect", "evaluate"])
def test_what_decodes_says_what_is_missing(name: str, tmp_path: Path) -> None:
    arguments = {
        "generate": ["demo", "--prompt", "1"],
        "demo": ["--picture", "a.html"],
        "convert": ["a", "b"],
        "inspect": ["a"],
        "evaluate": ["demo"],
    }[name]
    done = command([name, *arguments], without=DECODER_PACKAGES, cwd=tmp_path)
    extra = "lm-eval" if name == "evaluate" else "decode"
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("freedave: error: no module ")
    assert f"`freedave {name}` needs pip install 'freedave-kernels[{extra}]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["evaluate", "--help"], 0),
        ([], 2),
        (["serve"], 2),
        (["generate", "demo"], 2),
        (["generate", "demo", "--prompt", "1", "--draft-steps", "0"], 2),
        (["generate", "demo", "--prompt-ids", "one"], 2),
        (["generate", "demo", "--prompt", "1", "--order", "random"], 2),
        (["generate", "demo", "--prompt", "1", "--picture", "a.jpg"], 2),
        (["generate", "demo", "--prompt", "1", "--bogus"], 2),
        (["demo", "--picture", "no-such-folder/a.html"], 2),
        (["evaluate", "demo", "--output", "no-such-folder/a.json"], 2),
        (["convert", "a"], 2),
        (["inspect"], 2),
        (["info", "--yaml"], 2),
    ],
)
def test_help_and_wrong_arguments_need_no_torch(arguments: list[str], code: int) -> None:
    """Importing torch and transformers takes seconds."""
    done = command(arguments, without=("torch", *DECODER_PACKAGES))
    assert done.returncode == code
    assert "no module" not in done.stderr
    assert (done.stdout if code == 0 else done.stderr).startswith(
        "usage: freedave" if code == 0 else "freedave: error: "
    )


def test_the_library_says_what_is_missing() -> None:
    script = "import sys; sys.modules['transformers'] = None; import freedave; freedave.generate; freedave.load_model"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ModuleNotFoundError: ")
    assert message.endswith("`freedave.load_model` needs pip install 'freedave-kernels[decode]'")


# ------------------------------------------------------------------------------------------------------- standard output


WRITERS = {
    "help": ["--help"],
    "generate": ["generate", "demo", "--prompt", "1+1=", "--max-new-tokens", "8"],
}


@pytest.mark.parametrize("arguments", WRITERS.values(), ids=WRITERS)
def test_a_full_disk(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = command(arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "freedave: error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("arguments", WRITERS.values(), ids=WRITERS)
def test_a_closed_standard_output(arguments: list[str]) -> None:
    done = command(arguments, capture_output=False, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (2, "freedave: error: standard output is closed\n")


@pytest.mark.parametrize("arguments", WRITERS.values(), ids=WRITERS)
def test_a_reader_that_has_gone(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = command(arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0
    assert "Error" not in done.stderr and "Exception" not in done.stderr


def test_a_closed_standard_error() -> None:
    done = command(WRITERS["generate"], capture_output=False, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0
    assert done.stdout.startswith("1+1+")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_and_texts_that_the_encoding_lacks(encoding: str, tmp_path: Path) -> None:
    r"""\udcff is what Python makes of a byte in a name that is no text."""
    names = [str(tmp_path / "\u00e9.html"), str(tmp_path / "\udcff.html")]
    arguments = [*WRITERS["generate"], *(word for name in names for word in ("--picture", name))]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = command([*arguments, "--json"], env=environment)
    assert json.loads(done.stdout)["pictures"] == names
    assert done.returncode == 0


def test_text_that_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    reporting.write("caf\u00e9 \udcff")
    reporting.write_json(["\u00e9"])
    monkeypatch.undo()
    written.seek(0)
    assert written.read() == 'caf\\xe9 \\udcff\n["\\u00e9"]\n'


def test_the_harness_s_command_line_without_the_harness() -> None:
    script = """
import runpy, sys
sys.modules["lm_eval"] = None
sys.argv = ["-m"]
runpy._run_module_as_main("freedave.integrations.lm_eval")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "evaluations need pip install 'freedave-kernels[lm-eval]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_warnings_are_one_line(tmp_path: Path) -> None:
    """Without the place in our code; once as well with --json, whose output they are no part of."""
    folder, _, _ = write_published(tmp_path / "SDAR-b16", "sdar", block_size=..., odd_key=3)
    done = command(["generate", str(folder), "--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--json"])
    assert done.returncode == 0 and json.loads(done.stdout)
    block_length, keys = done.stderr.splitlines()
    assert re.fullmatch(r"freedave: warning: .*SDAR-b16: .*16 is used, since the name SDAR-b16 says so", block_length)
    assert re.fullmatch(r"freedave: warning: .*config\.json has keys .* were ignored: odd_key", keys)


def test_warnings_are_the_callers_again_after_a_command() -> None:
    shown = warnings.showwarning
    assert main(["info", "--bogus"]) == 2
    assert warnings.showwarning is shown
