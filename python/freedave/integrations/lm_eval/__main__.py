"""The harness's own command line, where `--model freedave` is known and its decodes' metrics are shown."""

from lm_eval.__main__ import cli_evaluate

from freedave.integrations.lm_eval.evaluation import decoding_metrics_in_results

with decoding_metrics_in_results():
    cli_evaluate()
