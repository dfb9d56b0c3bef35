"""log(p / (1 - p)) and its inverse, which rank states that were never forwarded: equal bits, and close to the truth."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from states import INF, generator

from freedave_kernels.reference.log_odds import log_odds, sigmoid

ROOT = Path(__file__).parents[1]
NAN = float("nan")
SOURCE = """
#include "freedave/log_odds.h"
extern "C" void log_odds(const float* in, float* out, long n) { while (n--) *out++ = freedave::log_odds(*in++); }
extern "C" void sigmoid(const float* in, float* out, long n) { while (n--) *out++ = freedave::sigmoid(*in++); }
"""


def probabilities() -> torch.Tensor:
    """From the smallest normal number to the largest below 1; many are close to 0, 1/2 and 1."""
    random = generator(0)
    near_half = 0.5 + torch.randn(10**5, generator=random) * 1e-3
    parts = [torch.rand(10**6, generator=random), torch.rand(10**6, generator=random) ** 20, near_half]
    parts += [1 - torch.rand(10**6, generator=random) ** 9, torch.tensor([2.0**-126, 1 - 2.0**-24])]
    return torch.cat(parts).clamp(2.0**-126, 1 - 2.0**-24)


def scores() -> torch.Tensor:
    random = generator(1)
    return torch.cat([torch.randn(10**6, generator=random) * 9, torch.rand(10**6, generator=random) * 174 - 87])


def test_log_odds_are_close_to_the_truth():
    p = probabilities()
    truth = torch.logit(p.double())
    error = (log_odds(p).double() - truth).abs()
    assert torch.minimum(error, error / truth.abs().clamp(min=1e-30)).max() <= 4e-6


def test_sigmoid_is_close_to_the_truth():
    x = scores()
    ours = sigmoid(x)
    ulp = torch.nextafter(ours, torch.tensor(INF)) - ours
    assert ((ours.double() - torch.sigmoid(x.double())).abs() <= 2.5 * ulp).all()


def test_corners():
    """What counts as certain, as impossible, and as unknown. A certain position goes before all that are less than that."""
    assert log_odds(torch.tensor([0.5])).tolist() == [0.0]
    assert (log_odds(torch.tensor([1.0, 2.0, INF])) == log_odds(torch.tensor([1.0]))).all()
    assert log_odds(torch.tensor([1.0])) > log_odds(torch.tensor([1 - 2.0**-24])) + 0.5
    assert (log_odds(torch.tensor([0.0, -0.0, -3.5, -INF, NAN])) == log_odds(torch.tensor([2.0**-126]))).all()
    assert sigmoid(torch.tensor([17.4, 87.0, 200.0, INF])).tolist() == [1.0] * 4
    low = sigmoid(torch.tensor([-87.0, -200.0, -INF]))
    assert (low == low[0]).all() and 0 < low[0] < 2e-38


def test_certainties_are_told_apart_as_confidences_are():
    """Back and forth, a confidence near 1 stays what it is: it ties with what it tied with, and with nothing else."""
    near_one = 1 - torch.arange(2000) * 2.0**-24
    assert torch.equal(sigmoid(log_odds(near_one)), near_one)


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """As the library is compiled."""
    folder = tmp_path_factory.mktemp("log_odds")
    (folder / "log_odds.cpp").write_text(SOURCE)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    options = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler, *options, "log_odds.cpp", "-o", "log_odds.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "log_odds.so"))


@pytest.mark.parametrize("function", [log_odds, sigmoid])
def test_cpp_has_the_same_bits(in_cpp, function):
    corners = torch.tensor([0.0, -0.0, 1.0, 2.0, -1.0, 1e-40, INF, -INF])
    x = torch.cat([probabilities(), scores(), corners])
    ours = torch.empty_like(x)
    getattr(in_cpp, function.__name__)(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(ours.data_ptr()), ctypes.c_long(len(x))
    )
    assert torch.equal(ours.view(torch.int32), function(x).view(torch.int32))
