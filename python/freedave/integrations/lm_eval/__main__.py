"""The harness's own command line, where `--model freedave` is known and its decodes' metrics are shown.

Errors a user can cause are one line, with the exit codes of `freedave`.
"""

import sys

from lm_eval.__main__ import cli_evaluate

from freedave.cli.reporting import run_reported
from freedave.integrations.lm_eval.evaluation import decoding_metrics_in_results, quiet_git, readable_tasks


def run() -> int:
    """Everything that the harness's command line does."""
    with decoding_metrics_in_results(), quiet_git(), readable_tasks():
        cli_evaluate()
    return 0


sys.exit(run_reported(run))
