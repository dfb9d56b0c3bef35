"""The command line, as people and programs use it."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import freedave
from freedave.cli import arguments as cli_arguments
from freedave.cli import demo as demo_command
from freedave.cli import main
from freedave.cli.command_line import build_parser
from freedave.decode.options import OPTION_NAMES
from freedave.demo import comparison
from freedave.demo.comparison import MAX_NEW_TOKENS
from freedave.demo.tasks import TASKS
from freedave.integrations import loading

VOCABULARY, MASK = 40, 39
POSITIONS = 64


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a random model, and no tokenizer."""
    folder = tmp_path_factory.mktemp("random_model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        tie_word_embeddings=True,
        mask_token_id=MASK,
        attention="block_causal",
        block_length=4,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def changed_config(random_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """The random model with another config.json."""

    def change(**values: object) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir()
        config = json.loads((random_model / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").symlink_to(random_model / "model.safetensors")
        return folder

    return change


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """A command's JSON; it must be all there is on standard output."""
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    result: dict[str, Any] = json.loads(captured.out)
    return result


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that a failing command leaves on standard error; standard output must be empty."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("freedave: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.strip()


# ----------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("executor", ["auto", "graph"])
def test_generate_prints_the_text(capsys: pytest.CaptureFixture[str], executor: str) -> None:
    options = ["--draft-steps", "8", "--check-lossless", "--executor", executor]
    assert main(["generate", "demo", "--prompt", "48392+7715=", *options]) == 0
    captured = capsys.readouterr()
    lm = freedave.load_model("demo")
    input_ids = lm.tokenizer("48392+7715=", return_tensors="pt").input_ids
    output = freedave.generate(lm, input_ids, draft_steps=8, executor=executor, check_lossless=True)
    assert captured.out == comparison.response_text(lm, output) + "\n"
    assert f"{output.stats.tokens} tokens in {output.num_forwards} forwards" in captured.err
    assert output.static is not None
    assert (
        f"identical to static decoding: yes (static {output.static.num_forwards} forwards, "
        f"FreeDave {output.num_forwards})"
    ) in captured.err


def test_generate_says_what_was_chosen_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", "demo", "--prompt", "48392+7715=", "--executor", "planned", "--check-lossless", "-v"]
    assert main([*options, "--draft-steps", "auto"]) == 0
    said = capsys.readouterr().err
    assert "identical to static decoding: yes" in said
    assert re.search(
        r"^drafts: mostly \d+ drafts?, lookahead \d+ \(\d+ of \d+ forwards\): draft 2 is right \d+%", said, re.M
    )
    assert main([*options, "--draft-steps", "8"]) == 0
    assert "drafts: " not in capsys.readouterr().err


def test_generate_json_is_what_generate_returns(random_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt-ids", "1,2,3,4,5", "--max-new-tokens", "24", "--draft-steps", "4", "--block-length", "8"]
    options += ["--tokens-per-step", "2", "--order", "left_to_right", "--drafting", "nested", "--cache", "none"]
    result = run_json(capsys, "generate", str(random_model), *options, "--check-lossless")
    output = freedave.generate(
        freedave.load_model(random_model),
        torch.tensor([[1, 2, 3, 4, 5]]),
        max_new_tokens=24,
        draft_steps=4,
        block_length=8,
        tokens_per_step=2,
        order="left_to_right",
        drafting="nested",
        cache="none",
        check_lossless=True,
    )
    assert result["token_ids"] == output.sequences[0, 5:].tolist()
    assert result["text"].split() == [str(token_id) for token_id in result["token_ids"]]
    assert result["step_map"] == output.step_map[0].tolist()
    assert result["forward_map"] == output.forward_map[0].tolist()
    assert result["num_forwards"] == output.num_forwards == len(result["accepted_lengths"])
    assert result["tokens_per_forward"] == 24 / output.num_forwards
    assert result["static"]["identical"] is True
    assert result["static"]["num_forwards"] == output.static.num_forwards  # type: ignore[union-attr]
    assert result["settings"]["order"] == "left_to_right"


def test_threshold_reaches_the_decoder(random_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", str(random_model), "--prompt-ids", "1,2", "--max-new-tokens", "14", "--static"]
    assert max(run_json(capsys, *options, "--threshold", "0")["step_map"]) == 3  # a step a block
    assert max(run_json(capsys, *options, "--threshold", "1.5")["step_map"]) == 13


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "bfloat16"),
        (["--dtype", "auto"], "bfloat16"),
        (["--dtype", "float32"], "float32"),
        (["--dtype", "float16"], "float16"),
    ],
)
def test_dtype_and_device(
    options: list[str], expected: str, changed_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(changed_config(dtype="bfloat16"))
    options = ["--prompt-ids", "1,2", "--max-new-tokens", "6", "--device", "cpu", *options]
    result = run_json(capsys, "generate", folder, *options)
    assert (result["dtype"], result["device"]) == (expected, "cpu")


def test_static_is_one_draft(random_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(
        capsys, "generate", str(random_model), "--prompt-ids", "1,2", "--max-new-tokens", "10", "--static"
    )
    assert result["settings"]["draft_steps"] == 1
    assert result["num_forwards"] == 10
    assert result["static"] is None


def test_generate_draws_pictures(random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, html = str(tmp_path / "a.png"), str(tmp_path / "a.html")
    options = ["--prompt-ids", "1,2,3", "--max-new-tokens", "20", "--picture", png, "--picture", html]
    result = run_json(capsys, "generate", str(random_model), *options)
    assert result["pictures"] == [png, html]
    assert Path(png).read_bytes().startswith(b"\x89PNG")
    expected = f"{result['num_forwards']} forwards instead of {result['static']['num_forwards']}"
    assert expected in Path(html).read_text(encoding="utf-8")


def test_a_picture_of_static_decoding_alone(random_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    arguments = ["--prompt-ids", "1,2", "--max-new-tokens", "10", "--static", "--picture", str(file)]
    assert main(["generate", str(random_model), *arguments]) == 0
    assert file.read_text(encoding="utf-8").count("<figure") == 1


def test_a_decode_that_differs_is_reported_with_exit_code_1(
    random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = freedave.generate

    def differs(*arguments: Any, **settings: Any) -> freedave.DecodeOutput:
        output = generate(*arguments, **settings)
        if not settings.get("check_lossless"):
            return output
        assert output.static is not None
        output.step_map = output.step_map.flip(1)
        raise freedave.LosslessnessError("the first difference is at position 0", output, output.static)

    monkeypatch.setattr("freedave.cli.generate.generate", differs)
    options = ["--prompt-ids", "1,2", "--max-new-tokens", "10", "--picture", str(tmp_path / "a.html")]
    assert main(["generate", str(random_model), *options, "--check-lossless"]) == 1
    captured = capsys.readouterr()
    assert "identical to static decoding: NO" in captured.err
    assert captured.err.endswith("freedave: error: the first difference is at position 0\n")
    assert "NOT the same" in (tmp_path / "a.html").read_text(encoding="utf-8")
    options += ["--dtype", "bfloat16"]
    assert main(["generate", str(random_model), *options, "--check-lossless"]) == 1
    assert (
        "(in bfloat16 a near tie can round to either side; --dtype float32 rules that out)" in capsys.readouterr().err
    )


def test_streaming_on_a_terminal_leaves_the_text_once(random_model: Path) -> None:
    pty = pytest.importorskip("pty")
    command = [sys.executable, "-m", "freedave.cli", "generate", str(random_model), "--prompt-ids", "1,2"]
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "20"}
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "30"],
        stdout=terminal,
        stderr=terminal,
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            chunk = os.read(controller, 65536)
        except OSError:  # the other end was closed
            break
        if not chunk:
            break
        written += chunk
    os.close(controller)
    assert process.wait() == 0
    frames, _, after = written.decode().rpartition("\x1b[?25h")
    assert "\x1b[2m·" in frames
    assert "forward 1: 1 of 30 tokens, 1.0 per forward" in frames
    text, statistics = after.replace("\r", "").strip().split("\n")
    assert len(text.split()) == 30
    assert statistics.startswith("30 tokens in ")


def test_no_stream_prints_the_text_only(random_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(random_model), "--prompt-ids", "1,2", "--max-new-tokens", "10", "--no-stream"]
    assert main(arguments) == 0
    assert "\x1b" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-ids", f"1,{MASK},2"], "mask token"),
        (["--prompt-ids", "1", "--block-length", "0"], "argument --block-length: must be at least 1, got 0"),
        (["--prompt-ids", "1", "--draft-steps", "0"], "argument --draft-steps: must be at least 1, got 0"),
        (["--prompt-ids", "1", "--max-new-tokens", "0"], "argument --max-new-tokens: must be at least 1, got 0"),
        (["--prompt-ids", "1", "--tokens-per-step", "0"], "argument --tokens-per-step: must be at least 1, got 0"),
        (["--prompt-ids", "1", "--order", "random"], "argument --order: invalid choice: 'random' (choose from"),
        (["--prompt-ids", "1", "--drafting", "none"], "argument --drafting: invalid choice: 'none'"),
        (["--prompt-ids", "1", "--cache", "exactly"], "argument --cache: invalid choice: 'exactly'"),
        (["--prompt-ids", "1", "--max-new-tokens", str(POSITIONS)], f"the model has {POSITIONS}"),
        (["--prompt-ids", ",".join(["1"] * POSITIONS), "--max-new-tokens", "4"], f"the model has {POSITIONS}"),
        (["--prompt-ids", f"1,{VOCABULARY}"], f"vocabulary has {VOCABULARY} tokens"),
        (["--prompt-ids", "1;2"], "argument --prompt-ids: must be numbers like 1,2,3, got '1;2'"),
        (["--prompt-ids", ""], "argument --prompt-ids: must be numbers"),
        (
            ["--prompt-ids", "1,99999999999999999999999"],
            "argument --prompt-ids: 99999999999999999999999 is no token id",
        ),
        (["--prompt-ids", "-1"], "argument --prompt-ids: -1 is no token id"),
        (["--prompt-ids", "9223372036854775807"], f"vocabulary has {VOCABULARY} tokens"),
        (["--prompt-ids", "1", "--max-new-tokens", "9" * 30], "argument --max-new-tokens: must be at most 2147483647"),
        (["--prompt-ids", "1", "--lookahead-steps", "0"], "argument --lookahead-steps: must be at least 1, got 0"),
        (["--prompt-ids", "1", "--threshold", "nan"], "argument --threshold: must be a number, got 'nan'"),
        (["--prompt", "hello"], "has no tokenizer: give the prompt as --prompt-ids"),
        ([], "one of the arguments --prompt --prompt-ids is required"),
        (["--prompt-ids", "1", "--draft-steps", "many"], "--draft-steps: must be auto or a whole number, got 'many'"),
        (["--prompt-ids", "1", "--draft-steps", "4", "--static"], "not allowed with argument"),
        (["--prompt-ids", "1", "--picture", "a.jpg"], "must be a .png or .html file"),
        (["--prompt-ids", "1", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--prompt-ids", "1", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--prompt-ids", "1", "--revision", "main"], "only models of the hub have revisions"),
    ],
)
def test_bad_options_of_generate(
    options: list[str], message: str, random_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, "generate", str(random_model), *options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("1 apple & 2 more", "the tokenizer of demo does not know 'a', 'p', 'l', '&', 'm'"),
        ("1+<mask>=", "does not know '<'"),
    ],
)
def test_bad_prompts(prompt: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, "generate", "demo", "--prompt", prompt)


def test_unknown_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "nowhere"
    assert f"no checkpoint folder at {folder}" in error_of(capsys, "generate", str(folder), "--prompt-ids", "1")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "unknown model family 'bert'"),
        ({"mask_token_id": VOCABULARY}, f"outside the model's vocabulary of {VOCABULARY} tokens"),
        ({"vocab_size": VOCABULARY + 5}, "weights"),
        ({"block_length": 0}, "block_length must be at least 1, got 0"),
    ],
)
def test_bad_checkpoints(
    config: dict[str, Any], message: str, changed_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, "generate", str(changed_config(**config)), "--prompt-ids", "1")


def test_the_picture_is_checked_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "nowhere" / "a.png")
    for command in (["generate", "no-such-model", "--prompt-ids", "1"], ["demo", "--problems", "1000000"]):
        assert f"cannot write the picture '{picture}'" in error_of(capsys, *command, "--picture", picture)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: {demo,generate,evaluate,convert,inspect,info}"),
        (["serve"], "invalid choice: 'serve'"),
        (
            ["generate", "demo", "--prompt", "1", "--bogus", "x"],
            "unrecognized arguments: --bogus x (see freedave generate --help)",
        ),
        (["demo", "--problems", "0"], "argument --problems: must be at least 1, got 0"),
        (["demo", "--draft-steps", "8", "1"], "argument --draft-steps: must be at least 2, got 1"),
        (["demo", "--problems", "1", "--block-length", "0"], "argument --block-length: must be at least 1, got 0"),
        (["demo", "--threads", "0"], "argument --threads: must be at least 1, got 0"),
        (["demo", "--picture", "a.gif"], "must be a .png or .html file"),
    ],
)
def test_bad_command_lines(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_run_here(
    random_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise freedave_kernels.BackendUnavailableError("backend 'cuda' is not available: no device")

    import freedave_kernels

    monkeypatch.setattr("freedave.cli.generate.generate", unavailable)
    assert "no device" in error_of(capsys, "generate", str(random_model), "--prompt-ids", "1")


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Ctrl-C as at a terminal: jobs that `nohup` or `&` started ignore it, and so would we and our children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c(random_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freedave.cli.generate.generate", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert main(["generate", str(random_model), "--prompt-ids", "1"]) == 130
    assert capsys.readouterr().err == "freedave: interrupted\n"


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_while_libraries_load() -> None:
    """A library that is interrupted during its import may report anything; the user still sees one line."""
    script = """
import signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "transformers":
            signal.raise_signal(signal.SIGINT)
            raise ImportError("requirements of transformers")
sys.meta_path.insert(0, Interrupt())
from freedave.cli import main
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "freedave: interrupted\n")


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_is_as_before_once_they_are_there() -> None:
    assert main(["info", "--json"]) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_broken_weights_are_exit_code_1(
    random_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = freedave.load_model(random_model)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.fill_(float("nan"))  # type: ignore[operator,union-attr]
    monkeypatch.setattr("freedave.integrations.loading.load_model", lambda *_, **__: lm)
    error = error_of(
        capsys, "generate", str(random_model), "--prompt-ids", "1", "--max-new-tokens", "4", "--no-stream", code=1
    )
    assert "not finite" in error


# --------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture
def one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of additions alone."""
    for module in (comparison, demo_command):
        monkeypatch.setattr(module, "TASKS", {"addition": TASKS["addition"]})


def test_demo_compares_static_nested_and_recycled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--problems", "1", "--draft-steps", "8"]) == 0
    printed = capsys.readouterr().out
    for title in (*TASKS, "all tasks"):
        table = printed[printed.index(f"{title} ") :].splitlines()[:5]
        assert [" ".join(line.split()[:2]) for line in table[2:]] == ["pooled auto", "nested K=8", "recycled K=8"]
        assert [line.split()[3] for line in table[2:]] == ["yes", "yes", "yes"]
    assert "in the model's forward" in printed
    assert "committed the tokens of static decoding, at the same steps" in printed
    assert "drawn with temperature 2.0 and seed 3" in printed and "identical, tokens and steps: yes" in printed
    assert "small model" in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["demo.html", "demo.png"]


@pytest.mark.usefixtures("one_task")
def test_demo_json_with_full_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.html"
    options = ["--problems", "1", "--draft-steps", "8", "--attention", "full", "--threads", "1"]
    options += ["--picture", str(picture)]
    result = run_json(capsys, "demo", *options)
    assert result["lossless"] is True
    assert result["attention"] == "full"
    assert ", 1 thread, torch " in result["machine"]
    assert result["settings"]["max_new_tokens"] == MAX_NEW_TOKENS
    static, auto, nested, recycled, *_ = result["total"]
    drafted = ["nested K=8", "recycled K=8", "pooled K=8", "pooled K=8, ahead 1", "pipelined K=8"]
    assert [row["mode"] for row in result["total"]] == ["static", "pooled auto", *drafted]
    assert static["tokens"] == auto["tokens"] == nested["tokens"] == recycled["tokens"]
    assert recycled["fewer_forwards"] == static["forwards"] / recycled["forwards"] > 2
    assert result["tasks"] == {"addition": result["total"]}
    assert result["drawn"]["identical"] is True
    assert result["drawn"]["decodes"][1]["num_forwards"] < result["drawn"]["decodes"][0]["num_forwards"] / 2
    drawn = [
        f"{fast['num_forwards']} forwards instead of {result['example']['decodes'][0]['num_forwards']}"
        for fast in result["example"]["decodes"][1:]
    ]
    assert any(expected in picture.read_text(encoding="utf-8") for expected in drawn)


@pytest.mark.usefixtures("one_task")
def test_demo_fails_when_a_decode_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*arguments: Any, **settings: Any) -> freedave.DecodeOutput:
        output = freedave.generate(*arguments, **settings)
        if settings["draft_steps"] != 1:
            output.step_map = output.step_map.flip(1)
        return output

    monkeypatch.setattr(comparison, "generate", differs)
    options = ["demo", "--problems", "1", "--draft-steps", "16", "--picture", str(tmp_path / "a.html")]
    assert main(options) == 1
    printed = capsys.readouterr().out
    assert "NOT LOSSLESS: 6 of 6 FreeDave decodes differ" in printed
    assert re.search(r"recycled K=16 +\d/1 +NO \(1\)", printed)


# --------------------------------------------------------------------------------------------------------------- info


def test_info_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    information = run_json(capsys, "info")
    assert information["versions"]["torch"] == torch.__version__
    assert information["backends"]["reference"] is None
    assert information["devices"]["cpu"]["torch_threads"] == torch.get_num_threads()
    assert information["embedded_model"]["parameters"] > 1e5
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^  reference +usable$", printed, re.MULTILINE)
    for name, reason in information["backends"].items():
        if reason is not None:
            assert re.search(rf"^  {name} +not usable$", printed, re.MULTILINE)
            assert f"backend {name}: {reason}" in printed


def test_info_works_without_the_native_library(tmp_path: Path) -> None:
    environment = os.environ | {"FREEDAVE_LIBRARY": str(tmp_path / "missing.so")}
    command = [sys.executable, "-m", "freedave.cli", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  cpu +not usable$", done.stdout, re.MULTILINE)
    assert re.search(r"backend cpu: .*missing\.so did not load .*pip install", done.stdout)


def test_info_without_bindings_and_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "freedave_kernels._C", None)
    monkeypatch.setattr("freedave.models.location.DEMO_CHECKPOINT", tmp_path / "nowhere")
    information = run_json(capsys, "info")
    assert "make setup" in information["build"]["error"]
    assert any(line.startswith("embedded model: no checkpoint folder at ") for line in information["missing"])


def test_output_into_a_closed_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info"]) == 0
        monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["demo"], ["generate"], ["evaluate"], ["convert"], ["inspect"], ["info"]):
        with pytest.raises(SystemExit) as done:
            main([*command, "--help"])
        assert done.value.code == 0
        assert capsys.readouterr().out.startswith("usage: freedave")


def test_choices_are_those_of_the_modules_that_take_them() -> None:
    assert set(cli_arguments.DTYPES) == set(loading.DTYPES)
    assert tuple(demo_command.CACHES) == cli_arguments.ATTENTIONS


def test_defaults_of_the_demo() -> None:
    arguments, defaults = build_parser().parse_args(["demo"]), comparison.DemoSettings()
    assert arguments.problems == defaults.problems_per_task
    assert tuple(arguments.draft_steps) == defaults.draft_steps
    assert arguments.block_length == defaults.block_length


def test_defaults_are_those_of_generate() -> None:
    arguments = build_parser().parse_args(["generate", "demo", "--prompt", "1"])
    parameters = inspect.signature(freedave.generate).parameters
    for name in ("max_new_tokens", *OPTION_NAMES):
        assert getattr(arguments, name) == parameters[name].default
