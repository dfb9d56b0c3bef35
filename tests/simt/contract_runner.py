"""Runs contract tests on libraries with planted faults, one after another, each in a fork of this process.

Importing torch takes seconds, under a sanitizer most of ten; a fork costs nothing. Reads from standard input, a line of JSON
each: {"library": path, "tests": [pytest arguments], "output": path}. Answers each with the exit status, on a line.
"""

from __future__ import annotations

import json
import os
import sys

import hypothesis
import numpy  # noqa: F401  (what tests import anyway, as is the next)
import pytest
import torch
import torch._dynamo

torch.set_num_threads(1)


class FirstFailureIsEnough:
    def pytest_sessionstart(self) -> None:
        """No search for a smaller example of a failure."""
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        contract = hypothesis.settings.get_profile("contract")
        hypothesis.settings.register_profile("planted", contract, phases=phases, database=None)
        hypothesis.settings.load_profile("planted")


def run(job: dict) -> int:
    """In the child: what the tests print goes to a file, so that a report of a sanitizer is in it too."""
    descriptor = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["FREEDAVE_EMULATED_LIBRARY"] = job["library"]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--capture=no", "--tb=short"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, *job["tests"]], plugins=[FirstFailureIsEnough()]))


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = run(json.loads(line))
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
