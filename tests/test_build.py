"""What was built says so, and a build that cannot work says in one line what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import freedave_kernels as fk
from freedave_kernels import _C

ROOT = Path(__file__).parents[1]


def test_build_information():
    assert _C.build["version"] == fk.__version__
    assert _C.build["compiler"] and _C.build["git_commit"]
    assert _C.build["cuda"] == bool(_C.build["cuda_architectures"])
    assert _C.cpu_isa() in _C.usable_cpu_isas()
    assert set(_C.usable_cpu_isas()) <= set(_C.build["cpu_isas"])


def refused(*command: str, **environment: str) -> str:
    """The last line that a build which must fail prints."""
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_missing_compiler(tmp_path):
    line = refused(sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), CXX="no-such-compiler")
    assert "C++ compiler no-such-compiler not found; install one that knows C++20" in line


def test_missing_torch(tmp_path):
    """-S: an interpreter that sees no installed packages but setuptools."""
    import setuptools

    (tmp_path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    for module in ("pybind11", "_distutils_hack", "packaging"):
        found = Path(setuptools.__file__).parents[1] / module
        if found.exists():
            (tmp_path / module).symlink_to(found)
    line = refused(sys.executable, "-S", "setup.py", "-q", "build_ext", PYTHONPATH=str(tmp_path))
    assert "torch not found; install it with: pip install torch==2.13.0" in line


@pytest.mark.parametrize(
    ("value", "message"),
    [("maybe", "FREEDAVE_CUDA is 'maybe'; expected auto, on or off"), ("on", "FREEDAVE_CUDA=on, but")],
)
def test_cuda_option(tmp_path, value, message):
    cmake = Path(sys.executable).with_name("cmake")
    result = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, f"-DFREEDAVE_CUDA={value}", f"-DPython_EXECUTABLE={sys.executable}"],
        env=os.environ | {"PATH": f"{cmake.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
