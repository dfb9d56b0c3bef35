"""Products in which a row's bits do not depend on the number of rows: asked for, tried, and missed with a warning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_wrapped_modules import Wrapper
from tiny_models import golden_lm, golden_model, prompt

import freedave
from freedave.cli import main
from freedave.decode.output import compare_with_static
from freedave.forward import reproducible_products
from freedave.forward.reproducible_products import difference, try_products
from freedave.models.diffusion_lm import DiffusionLM

with_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies with another library")


@pytest.fixture
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproducible_products, "_tried", {})
    monkeypatch.setattr(reproducible_products, "_difference", None)


@pytest.fixture
def other_bits(monkeypatch: pytest.MonkeyPatch, nothing_tried: None) -> list[tuple[int, ...]]:
    """Products round otherwise with less than 16 rows, as on an Intel Sapphire Rapids; which weights were tried."""
    tried = []
    linear = F.linear

    def rounds_with_few_rows(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        tried.append(tuple(weight.shape))
        products = linear(rows, weight)
        return products.nextafter(torch.tensor(9.0)) if len(rows) < 16 else products

    monkeypatch.setattr(reproducible_products, "F", SimpleNamespace(linear=rounds_with_few_rows))
    return tried


def layers(*shapes: tuple[int, int], **options: Any) -> torch.nn.Module:
    return torch.nn.ModuleList(torch.nn.Linear(*shape, **options) for shape in shapes)


def test_example(nothing_tried):
    """On a processor where tests pass, nothing is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freedave.generate(DiffusionLM(golden_model("block_causal"), 63, block_length=4), prompt(), 8)
    assert difference() is None and reproducible_products._tried


@pytest.mark.parametrize("shape", [(64, 64), (1024, 64), (1024, 1024), (1024, 3072), (3072, 1024)])
def test_holds_here(shape, threads, nothing_tried):
    """In the mode that freedave sets, on any processor that has it."""
    try_products(layers(shape))
    assert difference() is None


def python(code: str, **environment: str) -> str:
    """What a new process prints."""
    inherited = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout


@with_mkl
def test_the_mode_is_set_when_freedave_is_imported():
    """Also after torch, which has not multiplied anything yet."""
    code = """
import ctypes, pathlib, torch
import freedave
torch.randn(8, 8) @ torch.randn(8, 8)
(library,) = pathlib.Path(torch.__file__).parent.glob("lib/*torch_cpu.so")
print(ctypes.CDLL(str(library)).mkl_serv_cbwr_get(-1) >> 16)
"""
    assert python(code) == "1\n"  # MKL_CBWR_STRICT is 0x10000


def test_the_users_own_mode_is_kept():
    code = "import os, freedave; print(os.environ['MKL_CBWR'])"
    assert python(code, MKL_CBWR="AVX2") == "AVX2\n"
    assert python(code) == f"{freedave.MKL_MODE}\n"


@with_mkl
def test_a_mode_in_which_it_does_not_hold():
    """Products in the mode COMPATIBLE, and what is said of them."""
    code = """
import json, sys, warnings, torch
from freedave.forward.reproducible_products import FEW, MANY, difference, try_products
torch.manual_seed(0)
layer = torch.nn.Linear(1024, 1024, bias=False)
rows = torch.randn(MANY, 1024)
same = all(torch.equal(layer(rows[:few]), layer(rows)[:few]) for few in FEW)
with warnings.catch_warnings(record=True) as caught:
    try_products(layer)
print(json.dumps([same, difference(), [str(warning.message) for warning in caught]]))
"""
    same, found, caught = json.loads(python(code, MKL_CBWR="COMPATIBLE"))
    assert (found is None) == same
    assert caught == [found] if found else not caught
    if found:
        assert "start Python with MKL_CBWR=AVX512,STRICT" in found and found.endswith("(MKL_CBWR is COMPATIBLE)")


def test_a_difference_is_said_once_and_before_the_first_decode(other_bits):
    for expected in (1, 0):
        lm = DiffusionLM(golden_model("block_causal"), 63, block_length=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            freedave.generate(lm, prompt(), 8)
        texts = [str(warning.message) for warning in caught if "lossless" in str(warning.message)]
        assert len(texts) == expected
    assert difference().startswith("float32 is not lossless here: in matrix products (64 features to ")
    assert "4 rows have other bits than the same rows among 128" in difference()


def test_wrapped_modules_are_tried_too(other_bits):
    with pytest.warns(RuntimeWarning, match="float32 is not lossless here"):
        freedave.generate(DiffusionLM(Wrapper(golden_model("block_causal")), 63, block_length=4), prompt(), 4)


def test_a_difference_is_part_of_the_error_and_of_info(other_bits, capsys):
    with pytest.warns(RuntimeWarning, match="float32 is not lossless here"):
        try_products(layers((8, 8)))
    out = freedave.generate(golden_lm(), prompt(), 8)
    other = freedave.generate(golden_lm(), prompt(8, 1), 8)
    with pytest.raises(freedave.LosslessnessError, match="differ from static decoding.*float32 is not lossless here"):
        compare_with_static(out, other)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"]["cpu"]["float32"] == difference()


def test_each_shape_is_tried_once_for_each_number_of_threads(other_bits, threads):
    model = layers((8, 16), (8, 16), (16, 8))
    with pytest.warns(RuntimeWarning):
        try_products(model)
    assert set(other_bits) == {(16, 8), (8, 16)}
    tried = len(other_bits)
    try_products(model)
    assert len(other_bits) == tried
    torch.set_num_threads(3 - threads)
    try_products(model)
    assert len(other_bits) == 2 * tried


def test_a_large_vocabulary_is_tried_in_slices(other_bits):
    """As `prediction.py` multiplies with it: the more rows, the fewer tokens at a time."""
    model = layers((8, 20_000))
    with pytest.warns(RuntimeWarning):
        try_products(model, model[0])
    assert set(other_bits) == {(8192, 8), (4096, 8)}


def test_broken_weights_say_nothing_about_products(nothing_tried):
    module = layers((32, 40))
    with torch.no_grad():
        next(module.parameters())[0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reproducible_products.try_products(module)
    assert not reproducible_products._tried


def test_what_is_not_float32_on_a_cpu_is_not_tried(other_bits):
    try_products(layers((8, 8), dtype=torch.bfloat16))
    try_products(layers((8, 8), device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        try_products(layers((8, 8)))
    assert not other_bits and difference() is None
