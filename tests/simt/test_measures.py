"""A measure that is new to the enumeration does not compile before each room has an answer for it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import planting
import pytest

HEADER = "csrc/freedave/online_softmax.h"


def command_of(source: str) -> tuple[list[str], str]:
    """How the build compiles a file, and where."""
    for entry in json.loads((planting.BUILD / "compile_commands.json").read_text()):
        if Path(entry["file"]).resolve() == planting.ROOT / source and "nvcc" not in entry["command"].split()[0]:
            return shlex.split(entry["command"]), entry["directory"]
    raise AssertionError(f"{planting.BUILD} does not compile {source}; run `make simt`")


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("csrc/cpu/merge_predictions.cpp", [HEADER]),
        ("csrc/cpu/scan_logits_baseline.cpp", [HEADER, "csrc/cpu/scan_logits_simd.h"]),
        ("csrc/cuda/scan_logits.cu", [HEADER, "csrc/cuda/scan_logits.cu"]),
    ],
)
def test_a_new_measure_needs_an_answer_in_every_switch(source, where, tmp_path):
    header = tmp_path / HEADER.removeprefix("csrc/")
    header.parent.mkdir()
    changes = {"kNegEntropy, kLogOdds };": "kNegEntropy, kLogOdds, kMaxLogit };"}
    header.write_text(planting.patched((planting.ROOT / HEADER).read_text(), changes, HEADER))
    command, folder = command_of(source)
    command[1:1] = [f"-I{tmp_path}", f"-fmacro-prefix-map={tmp_path}/=csrc/", "-fsyntax-only"]
    environment = os.environ | {"LC_ALL": "C"}  # plain quotes
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    output = result.stderr.replace(str(tmp_path), "csrc").replace(f"{planting.ROOT}/", "")
    places = set(re.findall(r"^(\S+?):\d+:\d+: error: .*'kMaxLogit' not handled in switch", output, re.M))
    assert places == set(where)
