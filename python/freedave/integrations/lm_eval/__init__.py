"""lm-evaluation-harness: `--model freedave --model_args pretrained=...,draft_steps=8`.

The harness finds models of its own only, so importing this package registers the model. `python -m
freedave.integrations.lm_eval` does that and hands over to the harness's own command line; `evaluate` is the same for
Python, and what `freedave evaluate` calls.

Beside a task's own metrics stand those of its decodes (`DecodingTally`): tokens per forward, tokens per second, and with
`check_lossless` the share of compared requests whose decode was identical to static decoding.

Answers are decoded by `freedave.generate` (greedily; sampling is refused). Likelihoods are the Monte-Carlo bound of
`likelihood.py`, as LLaDA's published evaluation uses it: `mc_num` noise samples a continuation. The bound is good for
choosing between answers and for comparing diffusion models under the same estimate; a perplexity made of it is an upper
bound, not to be compared with that of an autoregressive model.
"""

try:
    from freedave.integrations.lm_eval.evaluation import TASKS, add_decoding_metrics, evaluate
    from freedave.integrations.lm_eval.model import FreeDaveLM
    from freedave.integrations.lm_eval.tally import DecodingTally
except ImportError as error:
    # Under this package's own name `python -m` shows the error in one line.
    raise ImportError(f"{error}: evaluations need pip install 'freedave-kernels[lm-eval]'", name=__name__) from error

__all__ = ["TASKS", "DecodingTally", "FreeDaveLM", "add_decoding_metrics", "evaluate"]
