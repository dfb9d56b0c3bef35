"""Plants faults in copies of kernels: patches the text, compiles the copy as the emulator's build does, links, runs."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIMT = Path(__file__).parent
BUILD = Path(os.environ.get("FREEDAVE_SIMT_BUILD") or ROOT / "build/simt")

SANITIZE = {
    "plain": [],
    "address": ["-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all", "-g1"],
    "thread": ["-fsanitize=thread", "-g1"],
}
# What tests/simt/CMakeLists.txt compiles kernels with, but for the optimisation: these are compiled often and run once.
FLAGS = ["-std=c++20", "-O0", "-UNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
FLAGS += ["-ftrivial-auto-var-init=pattern"]
# A report ends the process; addresses are not randomised, which ThreadSanitizer needs.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=77",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "halt_on_error=0:exitcode=77:die_after_fork=0:report_thread_leaks=0:ignore_noninstrumented_modules=1",
}


@dataclass(frozen=True, eq=False)
class Fault:
    """`changes` to `file` (old text: new text); `show` is what whoever catches it prints, a regular expression."""

    name: str
    build: str
    file: str  # from the root
    changes: dict[str, str]
    show: str
    run: str  # what brings it to light: a case of the selftest, or a contract test


def patched(text: str, changes: dict[str, str], where: str) -> str:
    for old, new in changes.items():
        found = text.count(old)
        assert found == 1, f"{where} has changed: a planted fault expects this once, found {found} times:\n{old}"
        text = text.replace(old, new)
    return text


@cache
def parts() -> dict[str, str]:
    path = BUILD / "simt_parts.json"
    assert path.exists(), f"{path} is missing; run `make simt`"
    return json.loads(path.read_text())


def compile_kernels(source: Path, build: str, output: Path, *includes: Path, flags: tuple[str, ...] = ()) -> None:
    """`includes` come before the folders that the kernels are in."""
    folders = [*includes, ROOT / "csrc", SIMT / "include", SIMT / "selftest"]
    command = [parts()["compiler"], *FLAGS, *SANITIZE[build], *flags, *(f"-I{folder}" for folder in folders)]
    run([*command, "-x", "c++", "-c", str(source), "-o", str(output)])


def link(objects: list[Path | str], build: str, output: Path, *flags: str) -> None:
    emulator = parts()[build]
    run([parts()["compiler"], *SANITIZE[build], *map(str, objects), emulator, *flags, "-pthread", "-o", str(output)])


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def unrandomised(command: list[str]) -> list[str]:
    return ["setarch", platform.machine(), "-R", *command]


def runtime_library(name: str) -> str:
    answer = subprocess.run(
        [parts()["compiler"], f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def python_command(build: str) -> tuple[list[str], dict[str, str]]:
    """How to start a Python that can load libraries instrumented for `build`, and the environment for it."""
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1", "FREEDAVE_EMULATED_LIBRARY": ""}
    libraries = {"plain": [], "address": ["libasan.so", "libubsan.so", "libstdc++.so"], "thread": ["libtsan.so"]}[build]
    if build == "address":
        environment["PYTHONMALLOC"] = "malloc"
    # The preload must not reach setarch itself: it is set by env(1), behind it.
    preload = [f"LD_PRELOAD={' '.join(map(runtime_library, libraries))}"] if libraries else []
    command = ["env", *preload, sys.executable]
    return (unrandomised(command) if build == "thread" else command), environment


def expect_shown(fault: Fault, status: int, output: str) -> None:
    """A run with the fault must fail and print what it is."""
    flat = " ".join(output.split())
    assert status != 0 or "ThreadSanitizer: data race" in output, f"the fault '{fault.name}' was not caught:\n{output}"
    assert re.search(fault.show, flat), f"the fault '{fault.name}' was caught, but not as {fault.show!r}:\n{output}"
