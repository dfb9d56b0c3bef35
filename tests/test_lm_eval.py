"""lm-evaluation-harness with the embedded model; no network, tasks made here or shipped with the model."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import golden_lm

import freedave
from freedave.cli import main
from freedave.demo.comparison import response_text
from freedave.demo.tasks import problems

lm_eval = pytest.importorskip("lm_eval", reason="pip install -r requirements/lm-eval.txt")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from freedave.integrations.likelihood import log_likelihood_bound  # noqa: E402
from freedave.integrations.lm_eval import TASKS, FreeDaveLM, evaluate  # noqa: E402
from freedave.integrations.lm_eval.evaluation import quiet_git  # noqa: E402

PROMPT, ANSWER = "48392+7715=", "2+5+0:07 9+1+0:10 3+7+1:11 8+7+1:16 4+0+1:05 #056107"


@pytest.fixture(scope="module")
def demo() -> freedave.DiffusionLM:
    return freedave.load_model("demo")


@pytest.fixture(scope="module")
def model(demo: freedave.DiffusionLM) -> FreeDaveLM:
    return FreeDaveLM(demo, mc_num=8)


@pytest.fixture(autouse=True)
def nothing_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local files are cached as data sets, but not in the user's home; the harness's thousands of tasks, which take many
    seconds to find, are left alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

    def own_tasks(include_path: Any = None, include_defaults: bool = False, metadata: Any = None) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_tasks)
    monkeypatch.setattr("freedave.integrations.lm_eval.evaluation.TaskManager", own_tasks)


def request(kind: str, *arguments: Any, task: str = "a_task") -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=(task, 0, 1))


def answers(model: FreeDaveLM, *prompts: str, **generation: Any) -> list[str]:
    generation = {"until": [], "max_gen_toks": 96} | generation
    return model.generate_until(
        [request("generate_until", prompt, generation) for prompt in prompts], disable_tqdm=True
    )


def token_ids(model: FreeDaveLM, text: str) -> list[int]:
    return list(model.tokenizer(text)["input_ids"])


# ------------------------------------------------------------------------------------------------------------ evaluation


def test_accuracy_and_what_it_cost(demo: freedave.DiffusionLM) -> None:
    results = evaluate(
        "demo",
        ["freedave_addition", "freedave_sorting"],
        limit=3,
        model_args={"check_lossless": True, "draft_steps": 8},
    )
    for name in ("addition", "sorting"):
        metrics = results["results"][f"freedave_{name}"]
        held_out = problems(name, "test", 3, seed=0)
        outputs = [
            freedave.generate(demo, demo.tokenizer(problem.prompt, return_tensors="pt").input_ids, 96, draft_steps=8)
            for problem in held_out
        ]
        right = [problem.check(response_text(demo, output)) for problem, output in zip(held_out, outputs, strict=True)]
        assert metrics["exact_match,none"] == sum(right) / 3 == 1
        tokens, forwards = (
            sum(values) for values in zip(*((o.stats.tokens, o.num_forwards) for o in outputs), strict=True)
        )
        assert metrics["tokens_per_forward,none"] == tokens / forwards
        assert metrics["tokens_per_forward,none"] > 3
        assert metrics["tokens_per_second,none"] > 0
        assert metrics["identical_to_static,none"] == 1
    decoding = results["config"]["freedave"]["decoding"]
    assert decoding["freedave_addition"]["requests"] == decoding["freedave_addition"]["compared"] == 3
    texts = [sample["filtered_resps"][0] for sample in results["samples"]["freedave_sorting"]]
    assert texts == [response_text(demo, output) for output in outputs]


def test_a_group_has_the_sums_of_its_tasks() -> None:
    results = evaluate("demo", limit=1)
    group, decoding = results["groups"]["freedave_demo"], results["config"]["freedave"]["decoding"].values()
    assert len(decoding) == 4
    assert group["exact_match,none"] == 1
    assert group["tokens_per_forward,none"] == sum(d["tokens"] for d in decoding) / sum(d["forwards"] for d in decoding)
    assert "identical_to_static,none" not in group


def test_a_local_task_with_a_local_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `freedave evaluate --include-path` finds them; the harness's exact match wants the whole scratchpad."""
    documents = [{"question": PROMPT, "answer": ANSWER}, {"question": "7042-658=", "answer": "#6384"}]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "sums.jsonl"}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 96, draft_steps: 4}}
metric_list: [{{metric: exact_match}}]
"""
    )
    options = ["--tasks", "sums", "--include-path", str(tmp_path), "--output", str(tmp_path / "out.json")]
    assert main(["evaluate", "demo", *options, "--check-lossless", "0.5", "--dtype", "float32", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("demo: block-causal attention, float32, pooled drafts\n")
    header, row = table.splitlines()[2:4]
    assert header.split()[:3] == ["task", "requests", "exact_match"]
    assert header.endswith("tokens/forward  tokens/s  identical to static")
    assert row.split()[:3] == ["sums", "2", "0.500"] and row.endswith("100.0%")
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["config"]["freedave"]["decoding"]["sums"]["compared"] == 1
    assert [sample["exact_match"] for sample in saved["samples"]["sums"]] == [1.0, 0.0]


def harness_command(arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `python -m freedave.integrations.lm_eval`."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments.split()])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("freedave.integrations.lm_eval", run_name="__main__")
    assert isinstance(done.value.code, int)
    return done.value.code


def test_the_command_line_of_the_harness_shows_the_decodes_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "--model freedave --model_args pretrained=demo,draft_steps=4,check_lossless=True --limit 1 --device cpu"
    arguments += f" --tasks freedave_sorting --include_path {TASKS} --output_path {tmp_path}"
    assert harness_command(arguments, monkeypatch) == 0
    printed = capsys.readouterr().out
    metrics = {
        line.split("|")[5].strip(): line.split("|")[7].strip() for line in printed.splitlines() if "none" in line
    }
    # The table gives a column as many digits as fit its numbers, of which some are speeds.
    assert float(metrics["exact_match"]) == float(metrics["identical_to_static"]) == 1
    assert float(metrics["tokens_per_forward"]) > 1
    (saved,) = tmp_path.rglob("results*.json")
    assert json.loads(saved.read_text())["config"]["freedave"]["draft_steps"] == 4


def test_json_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "demo", "--tasks", "freedave_addition", "--limit", "1", "--static", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["results"]["freedave_addition"]["exact_match,none"] == 1
    # One token a forward, but for what the cut of the last block leaves out.
    assert results["results"]["freedave_addition"]["tokens_per_forward,none"] == pytest.approx(1, abs=0.1)


# ------------------------------------------------------------------------------------------------------------ generating


def test_answers_end_at_the_first_until(model: FreeDaveLM) -> None:
    assert answers(model, PROMPT) == [ANSWER]
    assert answers(model, PROMPT, until=["#"]) == [ANSWER.split("#")[0]]
    assert answers(model, PROMPT, until=["11", " 9"]) == ["2+5+0:07"]
    assert answers(model, PROMPT, until="<eos>", max_gen_toks=9) == [ANSWER[:9]]


def test_an_end_of_sequence_within_a_block_ends_the_answer(demo: freedave.DiffusionLM) -> None:
    """What the model still writes into that block, and would write after it, is no part of the text, nor counted."""
    ending = freedave.DiffusionLM(
        demo.model, 1, block_length=16, eos_token_id=demo.tokenizer(":")["input_ids"], tokenizer=demo.tokenizer
    )
    fresh = FreeDaveLM(ending, draft_steps=1, check_lossless=True)
    assert answers(fresh, PROMPT) == ["2+5+0"]
    assert fresh.tallies["a_task"].tokens == len("2+5+0:")
    assert fresh.tallies["a_task"].forwards == 32 - len(PROMPT)  # to the end of the second block
    assert fresh.tallies["a_task"].identical == 1


def test_until_ends_the_decode_early(demo: freedave.DiffusionLM) -> None:
    forwards = []
    for until in ([], [" 9", "Question:"]):
        fresh = FreeDaveLM(demo)
        answers(fresh, PROMPT, until=until)
        forwards.append(fresh.tallies["a_task"].forwards)
    assert forwards[1] < forwards[0] / 2  # the first block of four holds it


def test_an_answer_that_a_stop_sequence_ended_is_what_was_committed(demo: freedave.DiffusionLM) -> None:
    """Without an end of sequence the rest of the answer stays masked, and is no part of it."""
    endless = FreeDaveLM(freedave.DiffusionLM(demo.model, 1, block_length=16, tokenizer=demo.tokenizer))
    assert answers(endless, PROMPT, until=[" 9"]) == ["2+5+0:07"]
    tally = endless.tallies["a_task"]
    assert tally.tokens == len("2+5+0:07 9")


def test_a_request_without_a_context(demo: freedave.DiffusionLM, model: FreeDaveLM) -> None:
    output = freedave.generate(demo, torch.tensor([[0]]), max_new_tokens=16)
    ids = output.sequences[0, 1:].tolist()
    assert answers(model, "", max_gen_toks=16) == [demo.tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)]


def test_batches_and_order_do_not_matter(demo: freedave.DiffusionLM, model: FreeDaveLM) -> None:
    prompts = ["7042-658=", PROMPT, "sorted([5,2,9,1])=", "48392*7="]
    one_by_one = [answers(model, prompt)[0] for prompt in prompts]
    for executor in ("planned", "graph"):
        assert answers(FreeDaveLM(demo, batch_size=3, executor=executor), *prompts) == one_by_one


@pytest.mark.parametrize(("share", "compared"), [(False, 0), (True, 4), (0.5, 2), (0.01, 1)])
def test_the_share_that_was_identical(
    share: float, compared: int, demo: freedave.DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One decode is made to differ: it is counted, and its answer stays FreeDave's."""
    generate = freedave.generate
    broken = []

    def differs(*arguments: Any, **settings: Any) -> freedave.DecodeOutput:
        output = generate(*arguments, **settings)
        if not settings["check_lossless"] or broken:
            return output
        broken.append(output)
        assert output.static is not None
        static = dataclasses.replace(output.static, step_map=output.static.step_map + 1)
        raise freedave.LosslessnessError("a difference", output, static)

    monkeypatch.setattr("freedave.integrations.prompts.generate", differs)
    checking = FreeDaveLM(demo, check_lossless=share)
    assert answers(checking, *[PROMPT] * 4) == [ANSWER] * 4
    tally = checking.tallies["a_task"]
    assert (tally.requests, tally.compared, tally.identical) == (4, compared, max(compared - 1, 0))
    assert tally.metrics().get("identical_to_static") == ((compared - 1) / compared if compared else None)


def test_chat_templates(demo: freedave.DiffusionLM) -> None:
    tokenizer = copy.deepcopy(demo.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    chat = freedave.DiffusionLM(demo.model, 1, block_length=16, eos_token_id=0, tokenizer=tokenizer)
    task = {
        "task": "chat",
        "custom_dataset": lambda **_: {"test": documents([{"question": PROMPT.removesuffix("=")}])},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": ANSWER,
        "generation_kwargs": {"until": [], "max_gen_toks": 96},
        "metric_list": [{"metric": "exact_match"}],
    }
    results = evaluate(chat, [task], apply_chat_template=True)
    assert results["results"]["chat"]["exact_match,none"] == 1
    assert results["samples"]["chat"][0]["arguments"][0][0] == PROMPT


def test_a_long_prompt_loses_its_beginning(demo: freedave.DiffusionLM) -> None:
    short = FreeDaveLM(demo, max_length=64)
    assert answers(short, "+" * 100 + PROMPT, max_gen_toks=53) == answers(short, PROMPT, max_gen_toks=53)
    with pytest.raises(ValueError, match="max_gen_toks 64 leaves no room for a prompt: the model has 64 positions"):
        answers(short, PROMPT, max_gen_toks=64)


# ----------------------------------------------------------------------------------------------------------- likelihoods


def documents(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def test_multiple_choice(model: FreeDaveLM) -> None:
    rows = [
        {
            "question": PROMPT,
            "choices": [ANSWER.replace("056", "057"), ANSWER, ANSWER.replace("8+7", "8+6")],
            "gold": 1,
        },
        {"question": "7*8=", "choices": ["7*8+0:56 #56", "7*8+0:54 #54"], "gold": 0},
    ]
    task = {
        "task": "which_one",
        "custom_dataset": lambda **_: {"test": documents(rows)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    results = evaluate(model.lm, [task], model_args={"mc_num": 8})
    assert results["results"]["which_one"]["acc,none"] == 1


def test_likelihoods_are_the_bound_and_say_what_greedy_decoding_writes(model: FreeDaveLM) -> None:
    wrong = ANSWER.replace("07", "08", 1)
    pairs = [request("loglikelihood", PROMPT, text) for text in (ANSWER, wrong)]
    (right, greedy), (lower, not_greedy) = model.loglikelihood(pairs, disable_tqdm=True)
    assert (greedy, not_greedy) == (True, False)
    assert right == log_likelihood_bound(model.lm, token_ids(model, PROMPT), token_ids(model, ANSWER), samples=8)
    assert lower < right < 0
    ending = freedave.DiffusionLM(
        model.lm.model, 1, block_length=16, eos_token_id=token_ids(model, ":")[0], tokenizer=model.tokenizer
    )
    assert FreeDaveLM(ending, mc_num=1).loglikelihood(pairs[:1], disable_tqdm=True)[0][1]  # a colon ends no likelihood


def test_likelihood_of_a_whole_text(demo: freedave.DiffusionLM, model: FreeDaveLM) -> None:
    text = PROMPT + ANSWER
    (whole,) = model.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    assert whole == log_likelihood_bound(demo, [0], token_ids(model, text), samples=8)
    # 40 positions: one that is given, and 39 that are predicted; the last window sees as much as fits.
    short = FreeDaveLM(demo, max_length=40, mc_num=8)
    (windowed,) = short.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    ids, length = token_ids(model, text), 39
    expected = log_likelihood_bound(demo, [0], ids[:length], samples=8)
    rest = len(ids) - length
    expected += log_likelihood_bound(demo, ids[-length - 1 : -rest], ids[-rest:], samples=8)
    assert windowed == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------- bad input


def test_the_harness_knows_the_model() -> None:
    made = get_model("freedave").create_from_arg_string(
        "pretrained=demo,draft_steps=2,threshold=0.9", {"batch_size": "2"}
    )
    assert isinstance(made, FreeDaveLM)
    settings = made.get_model_info()["freedave"]
    assert (settings["draft_steps"], settings["threshold"]) == (2, 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, got 'auto'"),
        ({"mc_num": 0}, "mc_num must be a whole number of at least 1, got 0"),
        ({"check_lossless": 2}, "check_lossless must be True, False or a share between 0 and 1, got 2"),
        ({"check_lossless": "yes"}, "check_lossless must be True, False or a share between 0 and 1, got 'yes'"),
        ({"dtype": "int4"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int4'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
    ],
)
def test_bad_model_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreeDaveLM("demo", **arguments)


def test_a_model_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no tokenizer"):
        FreeDaveLM(golden_lm("block_causal"))


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, "do_sample needs a temperature above 0, got 0"),
        ({"do_sample": True, "temperature": -0.5}, "temperature must be 0 or between 1e-30 and 1e30, got -0.5"),
        ({"do_sample": True, "seed": "one"}, "seed must be an int, got str"),
        (
            {"num_beams": 5},
            "num_beams cannot be honoured; known are until, max_gen_toks and draft_steps",
        ),
        ({"top_k": 5}, "top_k: these say what is drawn from, but nothing is drawn; set a temperature above 0"),
        ({"draft_steps": 0}, "draft_steps must be at least 1, got 0"),
        ({"draft_steps": "four"}, "draft_steps must be 'auto' or an integer of at least 1, got 'four'"),
        ({"draft_steps": [4]}, "draft_steps must be an int, got list"),
        ({"threshold": "high"}, "threshold must be a float, got str"),
        ({"order": 3}, "order must be a str, got int"),
        ({"max_gen_toks": "many"}, "many"),
        ({"max_gen_toks": [96]}, "list"),
        ({"max_gen_toks": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"until": 3}, "until must be a string or a list of strings, got 3"),
        ({"until": ["a", 3]}, r"until must be a string or a list of strings, got \['a', 3\]"),
        ({"until": {"a": 3}}, "until must be a string or a list of strings, got {'a': 3}"),
        ({"temperature": "hot"}, "could not convert string to float: 'hot'"),
        ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
    ],
)
def test_bad_generation_arguments(generation: dict[str, Any], message: str, model: FreeDaveLM) -> None:
    with pytest.raises(ValueError, match=f"^task a_task: generation_kwargs {{.*}}: .*{message}"):
        answers(model, PROMPT, **generation)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_task_may_draw(demo: freedave.DiffusionLM, batch_size: int) -> None:
    """As `generate` draws with that temperature and seed; a request that is repeated is drawn anew, in any batch."""
    model = FreeDaveLM(demo, batch_size=batch_size, seed=5)
    drawn = answers(model, PROMPT, PROMPT, PROMPT, do_sample=True, temperature=20.0)
    assert len(set(drawn)) == 3
    input_ids = demo.tokenizer(PROMPT, return_tensors="pt").input_ids
    alone = freedave.generate(demo, input_ids, max_new_tokens=96, temperature=20.0, seed=5)
    assert drawn[0] == response_text(demo, alone)
    assert answers(model, PROMPT, do_sample=True) == answers(model, PROMPT, do_sample=True, temperature=1.0)
    assert answers(model, PROMPT, do_sample=False, temperature=20.0) == [ANSWER]


@pytest.mark.parametrize("generation", ["text", [1], 3], ids=repr)
def test_a_task_file_of_wrong_types(generation: Any, tmp_path: Path, demo: freedave.DiffusionLM) -> None:
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\noutput_type: generate_until\n"
        f"test_split: test\ndoc_to_text: q\ndoc_to_target: a\ngeneration_kwargs: {json.dumps(generation)}\n"
    )
    with pytest.raises(ValueError, match=r"tasks broken: the harness cannot read the task \(TypeError: .*\)"):
        evaluate(demo, ["broken"], include_path=tmp_path)
    assert lm_eval.evaluator.TaskManager.load.__module__.startswith("lm_eval.")


def test_texts_that_cannot_be_written(model: FreeDaveLM) -> None:
    with pytest.raises(ValueError, match="the tokenizer of demo cannot write 'How many apples"):
        answers(model, "How many apples?")
    with pytest.raises(ValueError, match="the tokenizer of demo has no chat template"):
        model.apply_chat_template([{"role": "user", "content": "1+1"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "no_such_task"], "unknown tasks: no_such_task"),
        (["--include-path", "nowhere"], "no folder with task files at nowhere"),
        (["--limit", "0"], "argument --limit: must be at least 1, got 0"),
        (["--output", "nowhere/out.json"], "cannot write 'nowhere/out.json': there is no such folder"),
        (["--draft-steps", "0", "--limit", "1"], "argument --draft-steps: must be at least 1, got 0"),
        (["--check-lossless", "3"], "argument --check-lossless: must be a share between 0 and 1, got '3'"),
    ],
)
def test_bad_command_lines(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "demo", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model_args pretrained=demo,bogus=1", "--model_args: .* unexpected keyword argument 'bogus'"),
        ("--model_args pretrained=demo,draft_steps=many", "draft_steps must be 'auto' or an integer"),
        ("--model_args pretrained=demo,draft_steps=0", "draft_steps must be at least 1, got 0"),
        ("--model_args pretrained=no/such/model", "no/such/model"),
        ("--model_args pretrained=demo --tasks no_such_task", "Tasks not found: no_such_task"),
    ],
)
def test_bad_command_lines_of_the_harness(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = f"--model freedave --device cpu --tasks freedave_addition --include_path {TASKS}"
    assert harness_command(f"{tasks} {arguments}", monkeypatch) == 2
    assert re.fullmatch(f"freedave: error: .*{message}.*", capsys.readouterr().err.splitlines()[-1])


def test_outside_a_repository_git_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "demo", "--tasks", "freedave_addition", "--limit", "1"]) == 0
    assert "fatal" not in capfd.readouterr().err


def test_inside_a_repository_its_commit_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for command in (["init", "--quiet"], [*who, "commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run(["git", *command], check=True)
    with quiet_git():
        noted = lm_eval.evaluator.get_git_commit_hash()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert noted and head.startswith(noted)


def test_without_the_harness(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("freedave.integrations.lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "demo"]) == 2
    assert ": evaluations need pip install 'freedave-kernels[lm-eval]'" in capsys.readouterr().err


def test_the_device_that_the_harness_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert FreeDaveLM("demo", device="cuda:0").device == torch.device("cpu")
