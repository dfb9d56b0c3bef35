"""lm-evaluation-harness on a local task with the embedded model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -r requirements/lm-eval.txt")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import freedave
from freedave.cli import main
from freedave.demo.tasks import TASKS
from freedave.integrations.likelihood import log_likelihood_bound
from freedave.integrations.lm_eval import FreeDaveLM

PROBLEMS = 6
TASK = """
task: scratchpad_addition
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 96, do_sample: false}}
filter_list:
  - name: answer
    filter: [{{function: regex, regex_pattern: "#(\\\\d+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of held-out additions, as lm-eval reads it from disk."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rng = random.Random(0)
    with (tmp_path / "additions.jsonl").open("w") as data:
        for _ in range(PROBLEMS):
            left, right = rng.randrange(10_000, 100_000), rng.randrange(1_000, 10_000)
            data.write(json.dumps({"prompt": f"{left}+{right}=", "answer": f"{left + right:06d}"[-6:]}) + "\n")
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "additions.jsonl"))
    return tmp_path


def test_the_command_line(task_folder, capsys):
    output = task_folder / "results"
    code = main(
        ["evaluate", "--model_args", "pretrained=demo,draft_steps=8,check_lossless=True", "--batch_size", "3",
         "--tasks", "scratchpad_addition", "--include_path", str(task_folder), "--output_path", str(output)]
    )  # fmt: skip
    assert code == 0
    captured = capsys.readouterr()
    assert "scratchpad_addition" in captured.out and "exact_match" in captured.out
    assert f"{PROBLEMS} of {PROBLEMS} identical to static decoding" in captured.err
    reported = json.loads(captured.out.splitlines()[-1])["freedave"]
    (written,) = output.rglob("results_*.json")
    written = json.loads(written.read_text())
    assert written["config"]["freedave"]["draft_steps"] == 8
    assert written["config"]["freedave"]["tokens_per_forward"] == reported["tokens_per_forward"] > 3
    assert reported["requests"] == reported["compared"] == PROBLEMS and reported["identical_rate"] == 1
    assert reported["tokens_per_second"] > 0
    scores = written["results"]["scratchpad_addition"]
    assert scores["exact_match,answer"] >= 0.8


def test_batches_and_drafts_do_not_change_scores(task_folder):
    def texts(**arguments: object) -> list[str]:
        results = simple_evaluate(
            FreeDaveLM("demo", **arguments),
            tasks=["scratchpad_addition"],
            task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
            log_samples=True,
        )
        return [sample["resps"][0][0] for sample in results["samples"]["scratchpad_addition"]]

    statically = texts(draft_steps=1)
    assert len(statically) == PROBLEMS and all("#" in text for text in statically)
    assert texts(draft_steps=8, batch_size=4) == statically


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def model() -> FreeDaveLM:
    return FreeDaveLM("demo", mc_num=24)


def test_texts_end_before_their_until_string(model):
    whole, cut = model.generate_until(
        [request("generate_until", "48392+7715=", {"until": until, "max_gen_toks": 96}) for until in ([], ["#", ":0"])]
    )
    assert "#056107" in whole
    assert cut == whole[: min(whole.index("#"), whole.index(":0"))]


def test_likelihoods_prefer_the_right_answer(model):
    right, wrong = TASKS["sorting"].solve("sorted([3,1,2])="), TASKS["sorting"].solve("sorted([3,1,4])=")
    scores = model.loglikelihood([request("loglikelihood", "sorted([3,1,2])=", text) for text in (right, wrong)])
    assert scores[0][0] > scores[1][0] + 5
    assert scores[0][1] is True and scores[1][1] is False
    (whole,) = model.loglikelihood_rolling([request("loglikelihood_rolling", "sorted([3,1,2])=" + right)])
    assert whole < scores[0][0]


def test_what_cannot_be_asked(model):
    for arguments, message in [
        ({"do_sample": True}, "asks for sampling"),
        ({"temperature": 0.7, "do_sample": True}, "decodes greedily; pass --gen_kwargs"),
        ({"num_beams": 4}, "generation arguments num_beams are not known"),
        ({"max_gen_toks": 10**6}, "leaves no room for a prompt"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate_until([request("generate_until", "1+1=", arguments)])
    with pytest.raises(ValueError, match="batch_size must be a number, got 'auto'"):
        FreeDaveLM("demo", batch_size="auto")
    with pytest.raises(ValueError, match="dtype must be one of"):
        FreeDaveLM("demo", dtype="int3")


def test_errors_of_a_run_are_one_line(capsys):
    assert main(["evaluate", "--model_args", "pretrained=/nowhere", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("freedave: error:")


def test_the_bound_of_a_short_text_is_exact():
    """One token: the bound is the model's own probability of it, given the rest masked."""
    lm = freedave.load_model("demo")
    context = lm.tokenizer("48392+7715=").input_ids
    probabilities = []
    for token_id in range(lm.vocab_size):
        if token_id != lm.mask_token_id:
            probabilities.append(log_likelihood_bound(lm, context, [token_id], samples=4))
    total = sum(2.718281828459045**value for value in probabilities)
    assert total == pytest.approx(1, abs=0.05)  # the mask token has the rest
