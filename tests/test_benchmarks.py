"""The benchmarks' own code runs, and computes what it says: what it measures is looked at by people, not by tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import freedave
import freedave_kernels as fk
from benchmarks import (
    cases,
    check,
    compare,
    decode,
    decoder_step,
    eager,
    gpu,
    measure,
    record,
    report,
    roofline,
    scenes,
    vectorised,
)
from benchmarks.__main__ import GPU_ON_REQUEST, GPU_PARTS, main
from benchmarks.counts import Operators, counted
from benchmarks.gpu import checks, models
from benchmarks.gpu.machine import this_machine
from benchmarks.gpu.plan import Plan
from benchmarks.processor import Processor
from benchmarks.report import gpus, page, processors
from benchmarks.scenes import MASK
from benchmarks.targets import Found
from freedave.decode.decoder import Decoder
from freedave_kernels.contract import NATIVE_OPS, OPS

ROOT = Path(__file__).parents[1]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    # As a user's shell has it: the tests themselves ask for Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a smoke run of everything wrote, report included, and what it printed."""
    folder = tmp_path_factory.mktemp("results")
    before = (ROOT / "docs/benchmarks.md").read_text()
    result = benchmarks("all", "--quick", "--results", str(folder), "--machine", "here")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (ROOT / "docs/benchmarks.md").read_text() == before
    return folder, result.stdout


def rows(smoke: tuple[Path, str], benchmark: str, kind: str) -> list[record.Row]:
    return [row for row in record.read(smoke[0] / "here" / f"{benchmark}.jsonl") if row["kind"] == kind]


def test_every_op_is_timed_by_every_provider(smoke):
    timings = rows(smoke, "ops", "timing")
    for op in (op for op in NATIVE_OPS if OPS[op].called_by is None):
        providers = {row["provider"] for row in timings if row["op"] == op and "tiny" not in row["shape"]}
        assert providers >= {"cpu", "eager", "compiled"}, op
    for row in timings:
        assert (
            row["best_us"] <= row["lower_quartile_us"] <= row["median_us"] <= row["upper_quartile_us"]
            or row["rounds"] < 4
        )
        if row["baseline"]:
            base = next(
                other for other in timings
                if (other["op"], other["shape"], other["dtype"], other["provider"])
                == (row["op"], row["shape"], row["dtype"], row["baseline"])
            )  # fmt: skip
            assert row["ratio"] == pytest.approx(base["median_us"] / row["median_us"])


def test_drawn_tokens_beside_greedy_ones_of_both_kinds_of_logits(smoke):
    timings = [row for row in rows(smoke, "ops", "timing") if row["op"].startswith("drawn tokens")]
    assert {(row["op"], row["dtype"], row["provider"], row["baseline"]) for row in timings} == {
        (op, dtype, provider, "cpu")
        for op in ("drawn tokens", "drawn tokens, peaked")
        for dtype in ("float32", "bfloat16")
        for provider in ("cpu", "cpu, drawn")
    }
    wide = [row | {"shape": {"V": 151936, "rows": 32}, "ratio": 0.4} for row in timings]
    text = processors.table("here", {"ops": [rows(smoke, "ops", "environment")[0], *wide]})
    for logits in ("normal", "peaked"):
        assert f"the same with a temperature, {logits} logits, V=151936, bfloat16 | 2.5x the time of greedy" in text


def test_steps_of_a_decoder_beside_the_ops_alone(smoke):
    """Both executors, static and with drafts, in batches of one and several."""
    steps = rows(smoke, "step", "decoder_step")
    scale = decoder_step.QUICK
    assert {(row["provider"], row["shape"]["B"], row["shape"]["K"]) for row in steps} == {
        (executor, batch, drafts)
        for executor in decoder_step.EXECUTORS
        for batch in scale.batches
        for drafts in (decoder_step.STATIC, decoder_step.DRAFTS)
    }
    for row in steps:
        assert row["median_us"] > 0 and row["forward_us"] > 0 and row["ops_us"] > 0
        # A vocabulary of more than a slice: what is launched is no single predict_tokens.
        drafting = "draft_step" if row["shape"]["K"] == decoder_step.STATIC else "pooled_step"
        assert row["ops"][drafting] == row["ops"]["merge_predictions"] == 1 <= row["ops"]["partial_predictions"]
        assert sum(row["ops"].values()) < row["operations"] <= row["most_operations"] and row["synchronisations"] == 0
        assert ("keep" in row["ops"]) == (row["provider"] == "graph")


def test_only_the_decoders_steps(smoke, tmp_path):
    """They have a record of their own then, and their table says how they were measured."""
    result = benchmarks(
        "step", "--quick", "--only", "decoder", "--threads", "1", "--results", str(tmp_path), "--machine", "here"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = (tmp_path / "here").iterdir()
    assert path.name == "step-decoder.jsonl"
    found = record.read(path)
    assert {row["kind"] for row in found} == {"environment", "decoder_step"}
    assert found[0]["command"] == "python -m benchmarks step --only decoder"
    text = processors.table("here", {"ops": [found[0] | {"threads": 2}], "step-decoder": found})
    assert text.count("`benchmarks step --only decoder --threads 1`") == 4


def test_only_the_choices_of_drafts(smoke, tmp_path):
    """They take an hour, so that they are measured only when asked for."""
    assert not rows(smoke, "decode", "choice")
    result = benchmarks("decode", "--quick", "--only", "choices", "--results", str(tmp_path), "--machine", "here")
    assert result.returncode == 0, result.stderr[-3000:]
    found = record.read(tmp_path / "here/decode-choices.jsonl")
    environment, *choices = found
    assert environment["command"] == "python -m benchmarks decode --only choices"
    assert [(row["kind"], row["model"]) for row in choices] == [("choice", "embedded"), ("choice", "tiny")]
    for row in choices:
        speeds = {way["way"]: way["tokens_per_second"] for way in row["ways"]}
        assert len(speeds) == 10 and {"static", "auto", "K=2", "K=16, lookahead 1"} <= speeds.keys()
        assert row["against_static"] == pytest.approx(speeds["auto"] / speeds["static"])
        assert speeds[row["best"]] == max(speed for way, speed in speeds.items() if way != "auto")
        assert all(way["identical_to_static"] for way in row["ways"])
    row = choices[0] | {"against_static": 2.0, "against_best": 0.96, "best": "K=8"}
    text = processors.table("here", {"decode-choices": [environment, row, row | {"best": "static"}]})
    what = '| tokens a second with `draft_steps="auto"`, embedded model, B=2, blocks of 4 |'
    assert f"{what} 2.00x static, 0.96x the best fixed setting, K=8 | `benchmarks decode --only choices` |" in text
    assert f"{what} 2.00x static | `benchmarks decode --only choices` |" in text


def test_the_best_setting_is_told_by_other_prompts():
    """Else what is fastest on some prompts by chance would be what "auto" is held against."""

    def decoded(*seconds: float) -> list[list[decode.Decoded]]:
        return [[decode.Decoded(each, 0.0, 1, 1, torch.empty(0)), decode.Decoded(9.0, 0.0, 1, 1, torch.empty(0))]
                for each in seconds]  # fmt: skip

    static, auto, *fixed = decode.choices(1, 4)
    samples = {
        static: decoded(4, 4, 4),
        auto: decoded(2, 2, 2),
        fixed[0]: decoded(1, 3, 2),
        fixed[1]: decoded(3, 1, 2.5),
    }
    # fixed[0] is the best by all prompts. Without the first, fixed[1] is; without the second, fixed[0].
    chosen = decode.weigh(samples, 3)
    assert chosen.best == fixed[0] and chosen.against_static == 2
    assert chosen.against_best == (3 + 3 + 2) / 6
    assert decode.weigh({static: decoded(4, 4), auto: decoded(2, 2), fixed[0]: decoded(1, 1)}, 2).against_best == 0.5


def operations(lm: freedave.DiffusionLM, executor: str) -> list[int]:
    """Of each step of a decode with drafts, whose shapes have run before."""
    counted: list[Operators] = []
    scale = decoder_step.QUICK
    wanted = decoder_step.settings(lm, scale, 8, executor)
    decoder_step.decode(lm, wanted, scale, 2)
    decoder_step.decode(lm, wanted, scale, 2, counted)
    assert len(counted) == scale.steps
    return [step.operations.total() for step in counted]


@pytest.mark.parametrize("executor", decoder_step.EXECUTORS)
def test_a_decoders_steps_are_the_products(executor, monkeypatch):
    """Whatever `Decoder` came to launch beside would be counted, and nothing of the model's own forward is."""
    lm = decoder_step.language_model(decoder_step.QUICK)
    before = operations(lm, executor)
    launch = Decoder.launch

    def launch_more(self: Decoder) -> None:
        launch(self)
        torch.zeros(3).add_(1)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "launch", launch_more)
        assert operations(lm, executor) == [number + 2 for number in before]
    # Random models accept other drafts: the graph executor's steps are the same operations nevertheless.
    if executor == "graph":
        deeper = decoder_step.language_model(decoder_step.QUICK, layers=5)
        assert operations(deeper, executor)[:2] == before[:2]
    assert lm.has_plain_head and lm.projection is not None  # nothing is left hooked
    assert torch.nn.functional.linear is F.linear and F.linear.__name__ == "linear"


def test_what_cannot_run_is_listed_with_the_reason(smoke):
    absent = {row["provider"]: row["reason"] for row in rows(smoke, "ops", "absent")}
    assert set(absent) >= {"cuda", "triton"}
    assert all(absent.values())


def test_results_say_where_they_come_from(smoke):
    for path in (smoke[0] / "here").glob("*.jsonl"):
        environment = json.loads(path.read_text().splitlines()[0])
        assert {"machine", "cpu", "threads", "torch", "git_commit", "git_dirty", "load_average"} <= set(environment)
        assert environment["quick"] is True


def test_report(smoke):
    folder = smoke[0]
    pictures = sorted(path.stem for path in (folder / "here").glob("*.png"))
    assert pictures == ["decode", "draft-step", "predict-tokens-bandwidth", "predict-tokens-speedup", "scaling", "step"]


def test_each_timing_is_kept_once():
    """As JSON lines; beside them there are pictures, and nothing that repeats them."""
    kinds = {path.suffix for path in record.RESULTS.rglob("*") if path.is_file()}
    assert kinds == {".jsonl", ".png"}


def test_report_rewrites_the_sections_between_their_markers(smoke):
    machines = report.load(smoke[0])
    blank = "".join(f"before\n{page.begin(section)}\nold\n{page.END}\nafter\n" for section in page.SECTIONS)
    text = page.replaced(blank, machines)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("before\n") == text.count("after\n") == len(page.SECTIONS)
    assert "| one call on tiny tensors" in text and "| the stated targets |" in text and "B200" in text
    assert page.replaced(text, machines) == text
    with pytest.raises(ValueError, match="the page needs the line"):
        page.replaced("a text without markers", machines)
    with pytest.raises(ValueError, match="the page needs the line"):
        page.replaced(blank + blank, machines)


def test_the_page_is_what_the_committed_results_say():
    """Written by `python -m benchmarks report`, and by no hand."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert page.replaced(text, report.load(record.RESULTS)) == text


def test_report_of_a_gpu(dry_run):
    """Every kind of row that a GPU's parts write comes out in its table."""
    rows, _ = dry_run
    text = gpus.table("dry-run", {"gpu": rows})
    assert text.count("| a step, ") == len([row for row in rows if row["kind"] in ("decode_step", "host_share")])
    parts = set(re.findall(r"benchmarks gpu --only (\w+)", text))
    assert parts >= {"decode", "more", "lossless", "embedded", "chosen", "ops"}
    steps = [row for row in rows if row["kind"] == "decode_step" and row["target_ms"] is not None]
    slow = gpus.table("a GPU", {"gpu": [rows[0], steps[0] | {"ms": 99.0, "held": False}]})
    assert "**99.00 ms, missed**" in slow


def test_report_without_results(tmp_path):
    with pytest.raises(measure.CannotMeasureError, match="measure first"):
        report.load(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "ops.jsonl").write_text('{"command": "an earlier format"}\n')
    with pytest.raises(measure.CannotMeasureError, match=r"ops\.jsonl is not a result of this version"):
        report.load(tmp_path)


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_baselines_compute_the_op(batch, count):
    """A baseline that computes something else would be no baseline. (Where nothing ties and enough positions are masked.)"""
    torch.manual_seed(batch * 10 + count)
    scene = scenes.drafts(batch, count, 32)
    state, tokens, confidence = scene.drafts[:, 0], scene.token_ids[:, 0], scene.confidence[:, 0]
    masked = state == MASK
    step = fk.draft_step(
        scene.drafts, scene.token_ids, scene.confidence, scene.num_drafts, MASK, count, drafting="nested"
    )
    targets = scene.drafts.roll(-1, 1)
    targets[:, count // 2 :, 0] += 1
    logits, input_ids = scenes.logits(32 * batch, 20 * batch, 500, torch.float32)
    stretches, masks = torch.randn(3, 8192), torch.full((3,), MASK)
    expected_tokens, expected_confidence = fk.predict_tokens(logits, input_ids, MASK)
    for form in (eager, vectorised):
        predicted = form.predict_tokens(logits, input_ids, MASK)
        assert torch.equal(predicted[0], expected_tokens)
        torch.testing.assert_close(predicted[1], expected_confidence, rtol=1e-5, atol=0)
        states = fk.partial_predictions(stretches, masks, MASK)
        for part, field in zip(form.partial_predictions(stretches, masks, MASK), (0, 2, 4), strict=True):
            torch.testing.assert_close(part.double(), states[..., field], rtol=1e-5, atol=0)
        merged = form.merge_predictions(states, masks)
        assert torch.equal(merged[0], fk.merge_predictions(states, masks)[0])
        torch.testing.assert_close(merged[1], fk.merge_predictions(states, masks)[1], rtol=1e-6, atol=0)
        floor = fk.logit_floor(stretches, top_k=50, top_p=0.9)
        assert torch.equal(form.logit_floor(stretches, 50, 0.9), floor)
        assert torch.equal(form.rank_positions(confidence, masked), fk.rank_positions(confidence, masked))
        transferred = fk.select_transfer(confidence, masked, num_transfer=2)
        assert torch.equal(form.select_transfer(confidence, masked, 2), transferred)
        drafts = fk.build_drafts(state, tokens, confidence, MASK, count)[0]
        assert torch.equal(form.build_drafts(state, tokens, confidence, MASK, count), drafts)
        accepted = torch.as_tensor(form.verify_drafts(scene.drafts, targets))
        assert torch.equal(accepted, fk.verify_drafts(scene.drafts, targets))
        following = form.draft_step(scene.drafts, scene.token_ids, scene.confidence, MASK, count)
        assert torch.equal(following, step.drafts)


@pytest.mark.parametrize("batch", [1, 3])
def test_baselines_keep_the_same(batch):
    case = cases.keep(batch, 4, 8, torch.device("cpu"))
    *_, key, value = case.arguments()
    kept = []
    for call in (case.ours[""], case.eager, lambda: case.vectorised(*case.arguments())):
        key.zero_(), value.zero_()
        call()
        kept.append((key.clone(), value.clone()))
    assert kept[0][0].any() and kept[0][1].any()
    assert all(torch.equal(got, ours) for form in kept[1:] for got, ours in zip(form, kept[0], strict=True))


def test_counts():
    x = torch.zeros(256)
    counts = counted(lambda: (x + 1)[x > 0].sum().item())
    assert (counts.operators, counts.synchronisations) == (5, 2)  # add, gt, index by a mask, sum, item
    assert counts.operations == 5
    with torch.inference_mode():
        parts = counted(lambda: torch.nn.functional.linear(x.view(4, 64), torch.ones(2, 64)))
    assert (parts.operators, parts.operations) == (
        3,
        2,
    )  # view, ones, linear; ones, and the product that linear is made of
    assert counts.allocations >= 3 and counts.bytes >= x.nbytes
    logits, input_ids = torch.randn(1, 4, 16), torch.full((1, 4), MASK)
    ours = counted(lambda: fk.predict_tokens(logits, input_ids, MASK))
    assert (ours.operators, ours.synchronisations) == (1, 0)


def test_a_slow_machine_gets_fewer_rounds_but_three():
    calls = []
    timings = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 10, fill=0)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 10
    assert timings["a"].rounds == 10
    assert measure.interleaved({"a": lambda: sum(range(10000))}, 10, budget=0)["a"].rounds == 3


def test_only_rounds_with_a_fast_yardstick_count(monkeypatch):
    now, busy = 0.0, iter([False] * 2 + [True, True, True, False] * 10)  # a call before the rounds warms up
    slow = 1.0

    def yardstick():
        nonlocal now, slow
        slow = 2.0 if next(busy) else 1.0
        now += slow

    def judged():
        nonlocal now
        now += 3 * slow

    monkeypatch.setattr(measure, "timer", lambda: now)
    calls = {"yardstick": yardstick, "judged": judged}
    quiet = measure.interleaved(calls, 40, yardstick="yardstick")["judged"]
    assert (quiet.median, quiet.lower, quiet.upper, quiet.rounds, quiet.of_rounds) == (3, 3, 3, 10, 40)
    busy = iter([False] * 2 + [True, True, True, False] * 10)
    every = measure.interleaved(calls, 40)["judged"]
    assert (every.median, every.rounds, every.of_rounds) == (6, 40, 40)


def test_fits():
    sizes = [1, 2, 4, 8]
    straight = measure.line(sizes, [3 + 2 * size for size in sizes])
    assert (straight.slope, straight.at_zero, straight.distance) == (
        pytest.approx(2),
        pytest.approx(3),
        pytest.approx(0, abs=1e-9),
    )
    through = measure.proportional(sizes, [2.0, 4.0, 8.0, 16.0])
    assert (through.slope, through.distance) == (pytest.approx(2), pytest.approx(0, abs=1e-9))
    assert measure.proportional(sizes, [2.0, 4.0, 8.0, 20.0]).distance > 0.05
    assert measure.exponent(sizes, [size**2 for size in sizes]) == pytest.approx(2)


def test_limits_are_the_tensors():
    """The bytes of the model are those of the op's arguments and results."""
    scene = scenes.drafts(2, 4, 8)
    step = fk.draft_step(scene.drafts, scene.token_ids, scene.confidence, scene.num_drafts, MASK, 4)
    arguments = (scene.drafts, scene.token_ids, scene.confidence, scene.num_drafts)
    moved = sum(tensor.nbytes for tensor in (*arguments, step.record))
    assert roofline.draft_step(2, 4, 8) == moved
    assert roofline.pooled_step(2, 4, 8, 5) == moved + fk.draft_pool(2, 5, 8).memory.nbytes
    state, tokens, confidence = scene.drafts[:, 0], scene.token_ids[:, 0], scene.confidence[:, 0]
    results = fk.build_drafts(state, tokens, confidence, MASK, 4)
    assert roofline.build_drafts(2, 4, 8) == sum(t.nbytes for t in (state, tokens, confidence, *results))
    query, window, stored = (torch.zeros(shape) for shape in ((2, 3, 5, 4, 16), (2, 3, 5, 2, 16), (2, 7, 2, 16)))
    ranges, numbers = torch.zeros(2, 2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    moved = (
        2 * (query.nbytes + window.nbytes + stored.nbytes) + ranges.nbytes + numbers.nbytes + 2 * numbers.int().nbytes
    )
    assert roofline.draft_attention(2, 3, 5, stored=7, heads=4, groups=2, size=16, itemsize=4) == moved
    kept = torch.zeros(6, 2, 3, 2, 16)  # keys of three positions of each of two sequences, in six layers
    assert roofline.keep(6, 2, 3, groups=2, size=16, itemsize=4) == 4 * kept.nbytes + 4 * numbers.nbytes
    assert roofline.Limit("predict_tokens", "", "", 3_350_000_000).microseconds("H100") == pytest.approx(1000)


def test_a_shape_that_does_not_fit_is_listed(tmp_path):
    class Small(Processor):
        def free_memory(self) -> int:
            return 1000

    written = record.Record("ops", "here", tmp_path)
    case = cases.prediction(scenes.rows_of_logits(4, 100, torch.float32), 4)
    assert cases.measure(written, Small(3, quick=True), case) is None
    (absent,) = written.of_kind("absent")
    assert "GiB" in absent["reason"] and absent["op"] == "predict_tokens"


def test_check_finds_a_regression(tmp_path):
    """The same ratio holds, half of it does not; seconds do not matter."""
    committed = {
        "kind": "timing",
        "op": "draft_step",
        "shape": {"B": 1},
        "dtype": "",
        "provider": "cpu",
        "baseline": "eager",
    }
    before = check.by_case([committed | {"ratio": 40.0, "median_us": 10.0}])
    for ratio, held in ((40.0, True), (39.0, True), (20.0, False)):
        written = record.Record("check", "here", tmp_path)
        written.rows.append(committed | {"ratio": ratio, "median_us": 99.0})
        assert check.compare(written, before) is held
        assert written.of_kind("regression")[0]["held"] is held


def test_compare_two_records(tmp_path, capsys):
    """An op is slower where its ratios are, on average; other seconds of everything are none of its doing."""
    cases = {
        "kind": "timing",
        "op": "draft_step",
        "dtype": "",
        "provider": "cpu",
        "baseline": "eager",
        "median_us": 1.0,
    }
    environment = record.environment("ops", "here", False, "ops")

    def written(name: str, ratios: list[float], **changes: object) -> Path:
        rows = [environment | changes, *(cases | {"shape": {"B": b}, "ratio": ratio} for b, ratio in enumerate(ratios))]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    before = written("before.jsonl", [40.0, 40.0, 40.0])
    assert compare.run(before, written("same.jsonl", [30.0, 50.0, 42.0]))
    assert "held    draft_step            cpu           0.99" in capsys.readouterr().out
    assert not compare.run(before, written("slower.jsonl", [30.0, 30.0, 35.0]))
    out = capsys.readouterr().out
    assert "SLOWER" in out and "0.75  draft_step B=0" in out
    with pytest.raises(measure.CannotMeasureError, match="has threads"):
        compare.run(before, written("threads.jsonl", [40.0], threads=99))
    with pytest.raises(measure.CannotMeasureError, match="no timed case in common"):
        compare.run(before, written("none.jsonl", []))
    with pytest.raises(measure.CannotMeasureError, match="No such file"):
        compare.run(before, tmp_path / "nothing.jsonl")


def test_check_compares_with_what_is_committed(tmp_path):
    assert check.committed(record.Record("check", "no such machine", record.RESULTS)) == {}
    assert check.committed(record.Record("check", "here", tmp_path)) == {}


def test_targets():
    assert Found("a", 20.0, "least", 20, "x").held and not Found("a", 19.9, "least", 20, "x").held
    assert Found("a", 5.0, "most", 5, "us").held and not Found("a", 5.1, "most", 5, "us").held


def test_check_fails_where_a_target_fails(smoke, monkeypatch, tmp_path):
    monkeypatch.setattr(check.targets, "measured", lambda written, quick: iter([Found("a", 1.0, "least", 2, "x")]))
    assert check.run(record.Record("check", "here", tmp_path), quick=False) is False
    monkeypatch.setattr(check.targets, "measured", lambda written, quick: iter([Found("a", 2.0, "least", 2, "x")]))
    assert check.run(record.Record("check", "here", tmp_path), quick=False) is True


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[record.Row], str]:
    """What `benchmarks gpu --dry-run` wrote and printed; every part, in the order in which a GPU owner sees it."""
    before = set((ROOT / "benchmarks/results").rglob("*"))
    folder = tmp_path_factory.mktemp("gpu")
    # Next to no time: a dry run leaves no case out for that, on however slow a machine.
    result = benchmarks("gpu", "--dry-run", "--minutes", "0.01", "--results", str(folder))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert set((ROOT / "benchmarks/results").rglob("*")) == before
    return record.read(folder / "dry-run" / "gpu.jsonl"), result.stdout


def test_tune_dry_run():
    before = (ROOT / "freedave_kernels/triton/tunables.json").read_bytes()
    result = benchmarks("tune", "--dry-run")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "nothing written" in result.stdout
    assert (ROOT / "freedave_kernels/triton/tunables.json").read_bytes() == before


def test_gpu_dry_run(dry_run):
    rows, printed = dry_run
    assert [line[3:] for line in printed.splitlines() if line.startswith("== ")] == list(GPU_PARTS) == list(gpu.PARTS)
    assert not [row for row in rows if row["kind"] in ("failed", "absent")]
    kinds = {row["kind"] for row in rows}
    assert kinds >= {"decode_step", "kernels", "part_of_step", "checks", "timing", "lossless", "answers"}
    timed = {row["op"] for row in rows if row["kind"] == "timing"}
    assert timed == {"draft_attention", "predict_tokens", "drawn tokens", "draft_step", "step"}
    drawn = [row for row in rows if row.get("op") == "drawn tokens"]
    assert all(row["baseline"] == row["provider"].split(",")[0] and row["ratio"] > 0 for row in drawn)
    assert len(drawn) == 2 * len({row["baseline"] for row in drawn}) > 0
    assert {row["shape"]["P"] for row in rows if str(row.get("provider")).endswith((", pooled", ", pipelined"))} == {16}
    assert "compute-sanitizer: not run (this is a dry run)" in printed
    launched = [row for row in rows if row["kind"] == "decoder_step"]
    assert [(row["shape"]["B"], row["shape"]["K"]) for row in launched] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    for row in launched:
        assert 0 < row["kernels_of_parts"]["projection and predictions"] < row["kernels_of_parts"]["the backbone"]
        assert row["kernels_of_parts"]["the backbone"] < row["kernels"]


def test_gpu_decode_steps(dry_run):
    """Each case's steps were replays of one shape, and the targets stand beside the figures."""
    steps = {row["case"]: row for row in dry_run[0] if row["kind"] == "decode_step"}
    assert set(steps) == {case.name for case in (*gpu.decode.FIRST, gpu.decode.UNCOMPILED, *gpu.decode.THEN)}
    for row in steps.values():
        assert row["ms"] > 0 and row["device_ms"] > 0 and row["steady_steps"] > gpu.decode.MEASURED_AFTER
        assert row["tokens"] % (row["B"] * row["K"]) == 0 and row["graph_shape"] in row["graph_shapes"]
    assert steps["SDAR-8B B=1 prompt 4096 K=8"]["target_ms"] == 8.6
    assert steps["LLaDA-8B B=1 prompt 128 K=4"]["tokens"] == 4 * 32


def test_gpu_lossless_in_the_same_shapes(dry_run):
    same = [row for row in dry_run[0] if row["kind"] == "lossless" and "same shapes" in row["against"]]
    assert len(same) == 3
    for row in same:
        assert row["total"] > 0 and row["tokens_that_differ"] == row["steps_that_differ"] == 0
        assert row["forwards"] < row["forwards_static"]
    answers = [row for row in dry_run[0] if row["kind"] == "answers" and row["dtype"] == "float32"]
    assert answers and all(row["same_as_cpu"] for row in answers)


def test_a_replayed_step_changes_nothing():
    """What a decode commits does not depend on whether one of its steps was replayed for its time."""
    machine = this_machine(dry=True)
    published = models.SDAR_8B.tiny()
    lm = models.random_model(published, machine.device)
    [plain], [measured] = (
        stepper.decode([models.prompt(lm, 9, 0)], after)
        for stepper in [gpu.decode.new_stepper(machine, published, 1, 8, 20)]
        for after in (None, gpu.decode.Steps(stepper, machine))
    )
    assert measured.tokens == plain.tokens and measured.step_map == plain.step_map
    assert -1 not in measured.generated(measured.step_map)
    stepper = gpu.decode.new_stepper(machine, published, 1, 8, 20)
    pool = stepper.executor.state.pool.memory
    before = pool.clone()
    with stepper.state_kept():
        pool += 1
    assert torch.equal(pool, before)


def test_gpu_tiles_of_attention_on_request(tmp_path):
    """Every choice is timed or said to be left out, at once, and some are told to be the best."""
    assert list(gpu.ON_REQUEST) == list(GPU_ON_REQUEST)
    written = record.Record("gpu-tune_attention", "here", tmp_path, at_once=True)
    assert gpu.run(written, this_machine(dry=True), 4, ["tune_attention"])
    rows = record.read(written.lines)
    tried = [row for row in rows if row["kind"] == "tiles"]
    assert len(tried) == len(gpu.tune_attention.choices(this_machine(dry=True)))
    assert all(row["seconds"] > 0 for row in tried)
    forms = [row for row in rows if re.fullmatch(r"\d\.\d+  keys \d+, split \d+, span \d+", row.get("text", ""))]
    assert len(forms) == 2


def test_gpu_only_some_parts(tmp_path):
    """Each result is in its file when it is there: here there is no time for any case."""
    machine = this_machine(dry=True)
    written = record.Record("gpu-decode", "here", tmp_path, at_once=True)
    plan = Plan(written, machine, minutes=0)
    plan.case("late", 1, lambda: pytest.fail("it ran"))
    (absent,) = [row for row in record.read(written.lines) if row["kind"] == "absent"]
    assert absent["provider"] == "late" and "0 s are left" in absent["reason"]
    assert plan.held


def test_a_case_that_fails_is_told_and_the_next_goes_on(tmp_path):
    def fails() -> None:
        raise ValueError("no such thing")

    written = record.Record("gpu", "here", tmp_path, at_once=True)
    plan = Plan(written, this_machine(dry=True), minutes=1)
    plan.case("a", 1, fails)
    assert not plan.held
    plan.case("b", 1, lambda: written.note("b ran"))
    failed, ran = record.read(written.lines)[1:]
    assert failed["what"] == "a" and failed["traceback"].endswith("ValueError: no such thing")
    assert ran["text"] == "b ran"
    plan = Plan(written, this_machine(dry=True), minutes=1)
    plan.case("c", 1, lambda: False)
    assert not plan.held


def test_a_run_of_tests_ends_in_time(tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\n\n\ndef test_slow():\n    time.sleep(60)\n")
    written = record.Record("gpu", "here", tmp_path)
    assert checks.pytest(written, "slow", [], [str(slow)], "slow", limit=0.5) is False
    (row,) = written.of_kind("checks")
    assert row["returncode"] is None and row["last"].startswith("stopped after 0 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    assert main() == 2
    assert "torch sees no GPU; run this on a machine with one, or with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ops", "--dry-run"), "--dry-run goes with"),
        (("gpu", "--quick"), "--quick goes with"),
        (("gpu", "--only", "decode,nothing"), "'nothing' is no part; the parts are decode, contract"),
        (("ops", "--only", "decode"), "--only goes with gpu and step and decode"),
        (("step", "--only", "decode"), "'decode' is no part; the parts are ops, decoder"),
        (("gpu", "--minutes", "0"), "--minutes must be positive"),
        (("ops", "--threads", "0"), "--threads must be at least 1"),
        (("compare", "one.jsonl"), "compare takes two records, BEFORE AFTER"),
        (("ops", "one.jsonl"), "the other benchmarks take none"),
    ],
)
def test_options_that_do_not_fit(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err
