"""What was built says so, and a build that cannot work says in one line what to install."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import freedave_kernels as fk
from freedave_kernels import _C

ROOT = Path(__file__).parents[1]


def test_build_information():
    assert _C.build["version"] == fk.__version__
    assert _C.build["compiler"] and _C.build["git_commit"]
    assert _C.build["cuda"] == bool(_C.build["cuda_architectures"])
    assert _C.cpu_isa() in _C.usable_cpu_isas()
    assert set(_C.usable_cpu_isas()) <= set(_C.build["cpu_isas"])


def test_the_contract_of_the_native_library():
    """What C++ and Python both have to know, as C++ has it: every op, and the words that its arguments may be."""
    contract = _C.contract
    logits, ids = torch.randn(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64)
    step = fk.draft_step(ids[:, None], ids[:, None], logits[:, None, :, 0], torch.ones(1, dtype=torch.int32), 0, 2)
    for op in contract["ops"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"freedave::{op}", "CPU"), op
    for measure in contract["measures"]:
        torch.ops.freedave.predict_tokens(logits, ids, 0, measure=measure)
    for order in contract["orders"]:
        torch.ops.freedave.rank_positions(logits[..., 0], ids == 0, order)
    for fallback in contract["fallbacks"]:
        torch.ops.freedave.select_transfer(logits[..., 0], ids == 0, fallback=fallback)
    for match in contract["matches"]:
        torch.ops.freedave.verify_drafts(ids[:, None], ids[:, None], match=match, mask_token_id=0)
    for column, counter in enumerate(contract["counters"]):
        assert torch.equal(getattr(step, counter), step.record[:, column]), counter
    states = torch.ops.freedave.partial_predictions(torch.randn(1, 3, contract["tokens_per_state"] + 1), ids, 0)
    assert states.shape == (1, 3, 2, contract["state_fields"])
    known = {"measures", "orders", "matches", "draftings", "fallbacks", "counters"}
    assert all(len(contract[words]) == len(set(contract[words])) > 1 for words in known)


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
    assert "torch not found; install it with: pip install 'torch>=2.10'" in line


def test_torch_too_old(tmp_path):
    """Before 2.10 the stable ABI lacks what the ops need; the compiler would say so in a hundred lines."""
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    line = failure(tmp_path / "build", FREEDAVE_CUDA="off", PYTHONPATH=str(tmp_path))
    assert "torch 2.9.1 is too old; install a newer one: pip install 'torch>=2.10'" in line


def test_the_ops_compile_without_what_torch_2_13_added():
    """`make check-torch` compiles them against torch 2.10, which has one macro less. Here its name is taken away.

    Without CUDA, as no other test here does it, and without a warning.
    """
    source = """
        #include <torch/csrc/stable/device.h>
        #include <torch/csrc/stable/library.h>
        #include <torch/csrc/stable/ops.h>
        #include <torch/csrc/stable/tensor.h>
        #undef STABLE_TORCH_ERROR_CODE_CHECK
        #include "torch/ops.cpp"
    """
    defined = ["TORCH_TARGET_VERSION=0x020a000000000000", "FREEDAVE_HAS_CUDA=0", "FREEDAVE_EMULATED=0"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    options = ["-std=c++20", *warnings, *(f"-D{name}" for name in defined)]
    folders = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).with_name("include"))]
    command = [os.environ.get("CXX", "c++"), "-fsyntax-only", *options, *folders, "-x", "c++", "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def pyproject() -> dict[str, Any]:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def pins(file: str) -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_the_ranges_of_pyproject_begin_where_check_torch_tests():
    project, oldest = pyproject(), pins("oldest.txt")
    for line in [*project["dependencies"], *project["optional-dependencies"]["decode"]]:
        requirement = Requirement(line)
        (pin,) = oldest[canonicalize_name(requirement.name)].specifier
        lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        assert [Version(version) for version in lowest] == [Version(pin.version)], line
        assert not any(bound.operator == "==" for bound in requirement.specifier), line


def test_the_ranges_of_pyproject_hold_what_development_tests():
    extras = pyproject()["optional-dependencies"]
    tested = {extra: pins(f"{extra}.txt") for extra in ("decode", "lm-eval")}
    assert {canonicalize_name(Requirement(line).name) for line in extras["decode"]} == set(tested["decode"])
    for extra, pinned in tested.items():
        for requirement in map(Requirement, extras[extra]):
            if requirement.name == "freedave-kernels":
                continue
            pin = pinned[canonicalize_name(requirement.name)]
            versions = [bound.version for bound in pin.specifier if bound.operator == "=="]
            assert all(version in requirement.specifier for version in versions), requirement
    assert extras["demo"] == ["freedave-kernels[decode]"]  # its name before


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    cmake = Path(sys.executable).with_name("cmake")
    path = f"{cmake.parent}:{environment.pop('PATH', os.environ['PATH'])}"
    return subprocess.run(
        [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options],
        env=os.environ | {"PATH": path, "FREEDAVE_CUDA": "auto"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def failure(build: Path, *options: str, **environment: str) -> str:
    """The one line in which a configuration that must fail says what is wrong and what to do."""
    result = configure(build, *options, **environment)
    assert result.returncode != 0
    (line,) = [line.strip() for line in result.stderr.splitlines() if "freedave-kernels:" in line]
    return line


ENUMS = {
    "Order": "total_order.h",
    "Measure": "online_softmax.h",
    "Match": "verify_drafts.h",
    "Fallback": "select_transfer.h",
    "Drafting": "draft_step.h",
    "PooledDrafting": "pooled_step.h",
    "Counter": "draft_step.h",
}


@pytest.fixture(scope="module")
def compile_commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """How each file is compiled, the CUDA kernels as the emulator compiles them."""
    build = tmp_path_factory.mktemp("build")
    result = configure(build, "-DFREEDAVE_SIMT=ON", FREEDAVE_CUDA="off")
    assert result.returncode == 0, result.stderr
    commands = json.loads((build / "compile_commands.json").read_text())
    return {command["file"]: shlex.split(command["command"]) for command in commands}


def test_every_source_of_a_room_is_built(compile_commands):
    sources = {str(path) for folder in ("cpu", "cuda", "torch") for path in (ROOT / "csrc" / folder).glob("*.c*")}
    sources -= {str(path) for path in (ROOT / "csrc").rglob("*.cuh")}
    assert {file for file in compile_commands if file.startswith(str(ROOT / "csrc"))} == sources


@pytest.mark.parametrize("enum", ENUMS)
def test_a_new_value_of_an_enum_does_not_compile_where_a_switch_lacks_it(compile_commands, tmp_path, enum):
    """So it can have no other value's name, and take no other value's way."""
    ours = {file: command for file, command in compile_commands.items() if file.startswith(str(ROOT / "csrc"))}
    assert all("-Werror=switch" in command for command in ours.values())
    shutil.copytree(ROOT / "csrc" / "freedave", tmp_path / "freedave")
    header = tmp_path / "freedave" / ENUMS[enum]

    def compiled() -> subprocess.CompletedProcess[str]:
        command = [*ours[str(ROOT / "csrc/torch/ops.cpp")][:1], "-std=c++20", "-Werror=switch", "-fsyntax-only"]
        return subprocess.run(
            [*command, f"-I{tmp_path}", "-x", "c++", str(header)], capture_output=True, text=True, check=False
        )

    assert compiled().returncode == 0
    text, count = re.subn(rf"(enum class {enum} : int32_t {{[^}}]*?),?\s*}};", r"\1, kNew };", header.read_text())
    assert count == 1
    header.write_text(text)
    assert re.search(r"error: enumeration value .kNew. not handled in switch", compiled().stderr)


def test_cuda_option(tmp_path):
    assert "FREEDAVE_CUDA is 'maybe'; expected auto, on or off" in failure(tmp_path, FREEDAVE_CUDA="maybe")


def fake_nvcc(folder: Path, script: str) -> str:
    """An nvcc that does what the test needs; the first line of `script` answers --version."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


VERSION = 'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {}, V{}.1"; exit; fi'
ARCHITECTURES = 'if [ "$1" = --list-gpu-arch ]; then printf "compute_80\\ncompute_90\\n"; exit; fi'


def test_nvcc_not_found(tmp_path):
    line = failure(tmp_path, FREEDAVE_CUDA="on", CUDACXX="/nowhere/nvcc")
    assert "/nowhere/nvcc does not run as nvcc; install the CUDA toolkit and put nvcc on PATH or set CUDACXX" in line
    assert "build without CUDA: FREEDAVE_CUDA=off" in line


def test_nvcc_too_old(tmp_path):
    line = failure(tmp_path, CUDACXX=fake_nvcc(tmp_path, VERSION.format("11.8", "11.8")))
    assert "nvcc 11.8" in line and "too old for the kernels, which need CUDA 12.0; install a newer CUDA toolkit" in line


def test_architecture_unknown_to_nvcc(tmp_path):
    nvcc = fake_nvcc(tmp_path, VERSION.format("12.4", "12.4") + "\n" + ARCHITECTURES)
    line = failure(tmp_path, CUDACXX=nvcc, FREEDAVE_CUDA_ARCHS="90;120")
    assert "nvcc 12.4 cannot compile for architecture 120 (it knows 80 90); set FREEDAVE_CUDA_ARCHS to" in line


def test_architecture_too_old_for_the_kernels(tmp_path):
    nvcc = fake_nvcc(tmp_path, VERSION.format("12.4", "12.4") + "\n" + ARCHITECTURES.replace("80", "75"))
    line = failure(tmp_path, CUDACXX=nvcc, FREEDAVE_CUDA_ARCHS="75")
    assert "the kernels need architecture 80 or later, FREEDAVE_CUDA_ARCHS asks for 75" in line


def chosen(folder: Path, gpus: str | None, **environment: str) -> str:
    """The architectures that a build chooses where nvidia-smi names these GPUs (None: it fails)."""
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text("#!/bin/sh\n" + ("exit 9\n" if gpus is None else f'printf "{gpus}"\n'))
    (folder / "nvidia-smi").chmod(0o755)
    listed = ARCHITECTURES.replace("compute_90", "compute_86\\ncompute_90\\ncompute_120")
    nvcc = fake_nvcc(folder, "\n".join([VERSION.format("12.4", "12.4"), listed, "exit 1"]))
    result = configure(folder, CUDACXX=nvcc, PATH=f"{folder}:{os.environ['PATH']}", **environment)
    lines = [line for line in result.stdout.splitlines() if "CUDA kernels for architectures: " in line]
    return lines[-1].partition(": ")[2] if lines else result.stderr


def test_architectures_of_the_gpus_that_are_here(tmp_path):
    assert chosen(tmp_path, "9.0\\n9.0\\n") == "90"
    assert chosen(tmp_path, "12.0\\n8.6\\n", FREEDAVE_CUDA_ARCHS="native") == "120 86"
    assert chosen(tmp_path, "9.0\\n", FREEDAVE_CUDA_ARCHS="80;86") == "80 86"
    assert chosen(tmp_path, "9.0\\n", FREEDAVE_CUDA_ARCHS="all") == "80 86 90 120"


def test_all_architectures_where_no_gpu_decides(tmp_path):
    for gpus in (None, "", "[N/A]\\n", "7.5\\n", "9.0\\n10.3\\n"):  # too old for the kernels, unknown to this nvcc
        assert chosen(tmp_path, gpus, FREEDAVE_CUDA_ARCHS="auto") == "80 86 90 120", gpus


def test_native_where_there_is_no_gpu(tmp_path):
    for gpus in (None, ""):
        error = chosen(tmp_path, gpus, FREEDAVE_CUDA_ARCHS="native")
        assert "FREEDAVE_CUDA_ARCHS=native, but nvidia-smi names no GPU here; name the architectures" in error
    assert "the kernels need architecture 80 or later, FREEDAVE_CUDA_ARCHS asks for 75" in chosen(
        tmp_path, "7.5\\n", FREEDAVE_CUDA_ARCHS="native"
    )


def test_a_build_folder_does_not_remember_the_environment(tmp_path):
    assert chosen(tmp_path, None, FREEDAVE_CUDA_ARCHS="90") == "90"
    assert chosen(tmp_path, None, FREEDAVE_CUDA_ARCHS="86") == "86"


def test_host_compiler_too_new(tmp_path):
    refusal = (
        'echo "host_config.h: error: #error -- unsupported GNU version! gcc versions later than 13 are not supported!"'
    )
    script = "\n".join([VERSION.format("12.4", "12.4"), ARCHITECTURES, f"{refusal} >&2", "exit 1"])
    line = failure(tmp_path, CUDACXX=fake_nvcc(tmp_path, script))
    assert "nvcc 12.4 does not support the host compiler (" in line
    assert "install an older one and name it, for example CUDAHOSTCXX=g++-12" in line


def test_nvcc_that_cannot_compile(tmp_path):
    script = "\n".join([VERSION.format("12.4", "12.4"), ARCHITECTURES, 'echo "fatal error: no cicc" >&2', "exit 1"])
    line = failure(tmp_path, CUDACXX=fake_nvcc(tmp_path, script))
    assert "cannot compile: fatal error: no cicc; repair the CUDA toolkit" in line


def test_without_cuda(tmp_path):
    """FREEDAVE_CUDA=off does not look at nvcc, not even at a broken one."""
    assert configure(tmp_path, FREEDAVE_CUDA="off", CUDACXX="/nowhere/nvcc").returncode == 0
