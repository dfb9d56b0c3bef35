"""Builds the native libraries: checks what is needed first, then hands over to CMake (the one build description)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "freedave_kernels"
LIBRARIES = ("libfreedave_ops.so", "_C.so")


def find_tool(name: str) -> str | None:
    """The tool of this Python environment where there is one, otherwise the one on PATH."""
    scripts = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]))


def require(found: object, what: str, remedy: str) -> None:
    if not found:
        raise SystemExit(f"freedave-kernels: {what} not found; {remedy}")


class CMakeBuild(build_ext):
    def run(self) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        wanted = os.environ.get("CXX", "").split()[:1]  # may carry flags
        compiler = next(filter(None, map(find_tool, wanted or ("c++", "g++", "clang++"))), None)
        require(
            compiler,
            " ".join(["C++ compiler", *wanted]),
            "install one that knows C++20 (Debian/Ubuntu: apt install g++) or set CXX",
        )
        require(cmake, "cmake", "install it with: pip install cmake")
        require(ninja, "ninja", "install it with: pip install ninja")
        require(importlib.util.find_spec("pybind11"), "pybind11", "install it with: pip install pybind11")
        require(
            importlib.util.find_spec("torch"),
            "torch",
            "install it with: pip install 'torch>=2.10' (or build without --no-build-isolation)",
        )

        build = Path(os.environ.get("FREEDAVE_BUILD_FOLDER") or ROOT / "build" / "cmake").absolute()
        command = [
            str(cmake),
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFREEDAVE_VERSION={self.distribution.get_version()}",
        ]
        if not wanted:
            command.append(f"-DCMAKE_CXX_COMPILER={compiler}")
        self.call(command)
        self.call([str(cmake), "--build", str(build)])
        for library in LIBRARIES:
            target = self.target_folder() / library
            target.parent.mkdir(parents=True, exist_ok=True)
            # A library that a running process has open must be replaced, not overwritten.
            target.unlink(missing_ok=True)
            shutil.copy2(build / library, target)

    def call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"freedave-kernels: the native build failed (see the lines above): {error}") from None

    def target_folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return ROOT / PACKAGE if in_place else Path(self.build_lib) / PACKAGE

    def get_outputs(self) -> list[str]:
        return [str(self.target_folder() / library) for library in LIBRARIES]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=find_packages(include=[f"{PACKAGE}*"]) + find_packages("python", include=["freedave*"]),
    ext_modules=[Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
