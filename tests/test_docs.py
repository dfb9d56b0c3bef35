"""What people read agrees with what is there: links, names, the README's recipe and the figures that can be computed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import freedave
import freedave_kernels as fk
from freedave.decode.decoder import Decoder
from freedave.decode.settings import resolve_settings
from freedave_kernels.contract import OPS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def indented(page: Path, beginning: str) -> str:
    """The indented block whose first line begins so, without its indentation."""
    lines = page.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"    {beginning}"))
    block: list[str] = []
    for line in lines[first:]:
        if line and not line.startswith("    "):
            break
        block.append(line[4:])
    return "\n".join(block).rstrip()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page():
    assert len(README.read_text().split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}, which has no such heading"


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", README.read_text())}
    generated = {ROOT / "docs/cuda-coverage.md"}  # a table that docs/cuda.md links to
    assert {page.resolve() for page in PAGES[1:]} - generated <= linked


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_targets_and_functions_that_pages_name_exist(page):
    text = page.read_text()
    folders = ("csrc", "freedave_kernels", "python", "tests", "benchmarks", "docs")
    files = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    files |= {path.name for path in ROOT.glob("*.*")}
    for name in re.findall(r"[\w-]+\.(?:py|cuh?|cpp|h)\b", text):
        assert name in files, f"{page.name} names {name}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in re.findall(r"(?:`|^    )make ([\w-]+)", text, flags=re.MULTILINE):
        assert name in targets, f"{page.name} says make {name}"
    for name in re.findall(r"\bfreedave\.(\w+)\(", text):
        assert hasattr(freedave, name), f"{page.name} calls freedave.{name}"
    for name in re.findall(r"\bfk\.(\w+)\(", text):
        assert hasattr(fk, name), f"{page.name} calls fk.{name}"
    for module, names in re.findall(r"^    from (freedave[\w.]*) import ([\w, ]+)$", text, flags=re.MULTILINE):
        for name in names.split(", "):
            found = hasattr(importlib.import_module(module), name)
            assert found or importlib.util.find_spec(f"{module}.{name}"), f"{page.name} imports {name} from {module}"


def test_the_readme_prints_what_it_says(monkeypatch, capsys):
    """The recipe as it stands, on the embedded model."""
    (recipe,) = fenced(README, "python")
    (printed,) = fenced(README, "text")
    (question,) = re.findall(r'"content": "([^"]*)"', recipe)
    lm = freedave.load_model("demo")
    lm.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    monkeypatch.setattr(freedave, "load_model", lambda *_, **__: lm)
    exec(recipe.replace(question, "48392+7715="), {})
    assert capsys.readouterr().out == printed


def test_both_tables_of_ops_name_every_op():
    for page in (README, ROOT / "docs/engines.md"):
        rows = "".join(re.findall(r"^\| `.*$", page.read_text(), flags=re.MULTILINE))
        assert not [op for op, rooms in OPS.items() if f"`{rooms.called_by or op}`" not in rows]


def test_the_ops_loop_is_that_of_the_docstring():
    loop = indented(ROOT / "docs/engines.md", "import freedave_kernels as fk")
    assert fk.__doc__ is not None
    assert [line.strip() for line in loop.splitlines()] == [
        line.strip() for line in fk.__doc__.split("::\n\n", 1)[1].split("\n\nThe same ops")[0].splitlines()
    ]


def test_the_decoder_loop_runs(capsys):
    """As it stands, with the embedded model's sizes."""
    code = indented(ROOT / "docs/engines.md", "from freedave.decode.decoder import Decoder")
    sizes = {"prompt_length=1024": "prompt_length=16", "max_new_tokens=256": "max_new_tokens=96", "=2048": "=160"}
    for stated, small in sizes.items():
        assert code.count(stated) == 1
        code = code.replace(stated, small)
    lm = freedave.load_model("demo")
    prompts = [lm.tokenizer(text)["input_ids"] for text in ("48392+7715=", "12+34=")]
    names: dict[str, Any] = {"lm": lm, "prompts": prompts}
    exec(code, names)
    expected = [freedave.generate(lm, torch.tensor([each]), max_new_tokens=96) for each in prompts]
    assert [list(answer) for answer in names["answers"]] == [
        out.sequences[0, len(prompt) :].tolist() for prompt, out in zip(prompts, expected, strict=True)
    ]
    assert "Commit(" in capsys.readouterr().out


def test_the_server_loop_runs():
    """As it stands: requests come and are cancelled while others are decoded, and each answer is as if it were alone."""
    names: dict[str, Any] = {}
    exec(indented(ROOT / "docs/engines.md", "import queue"), names)
    lm = freedave.load_model("demo")
    texts = {"first": "48392+7715=", "second": "12+34=", "third": "93+8=", "gone": "5+6=", "never": "7+8="}
    prompts = {name: lm.tokenizer(text)["input_ids"] for name, text in texts.items()}
    inbox: Any = names["queue"].Queue()
    for message in (("first", prompts["first"], 48), ("gone", prompts["gone"], 48), ("never", prompts["never"], 48)):
        inbox.put(message)
    inbox.put(("empty", [], 48))
    heard: list[tuple[str, str | None]] = []
    answers: dict[str, list[int]] = {name: [] for name in [*prompts, "empty"]}

    def hand_on(name: str, tokens: list[int], reason: str | None) -> None:
        if not heard:  # the first tokens of anyone: the others come and go while these two are decoded
            for message in (
                ("second", prompts["second"], 32),
                ("gone",),
                ("never",),
                ("third", prompts["third"], 16),
                None,
            ):
                inbox.put(message)
        answers[name] += tokens
        heard.append((name, reason))

    settings = resolve_settings(lm, 16, 48, draft_steps=8)
    decoder = Decoder(lm, settings, slots=2, capacity=96)
    names["serve"](decoder, inbox, hand_on)
    decoder.close()
    reasons = {name: reason for name, reason in heard if reason}
    assert reasons.pop("empty").startswith("the prompt is empty")
    assert reasons == {
        "gone": "cancelled",
        "never": "cancelled",
        **dict.fromkeys(("first", "second", "third"), "finished"),
    }
    assert len([name for name, _ in heard if name == "first"]) > 3 and answers["never"] == []
    for name, new in (("first", 48), ("second", 32), ("third", 16)):
        alone = freedave.generate(lm, torch.tensor([prompts[name]]), max_new_tokens=new).sequences[
            0, len(prompts[name]) :
        ]
        assert answers[name] == alone[: len(answers[name])].tolist()
        assert len(set(alone[len(answers[name]) :].tolist())) <= 1  # nothing but what fills an answer up
    metrics = decoder.metrics()
    assert (metrics.added, metrics.finished, metrics.dropped, metrics.failed) == (4, 3, 1, 0)


# By the row of the README's table; what decides the number of weights, from the published configurations.
CHECKPOINTS = {
    "SDAR-8B": (
        Qwen3ForCausalLM,
        Qwen3Config(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        ),
    ),
    "SDAR-30B-A3B": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
            head_dim=128, num_experts=128, moe_intermediate_size=768, tie_word_embeddings=False,
        ),
    ),
    "Stable-DiffCoder-8B": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=155136, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, tie_word_embeddings=False,
        ),
    ),
    "Fast_dLLM_v2_7B": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, tie_word_embeddings=False,
        ),
    ),
    "LLaDA-8B": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=126464, hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, head_dim=128, tie_word_embeddings=False,
        ),
    ),
    "Dream-7B": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, tie_word_embeddings=False,
        ),
    ),
    "LLaDA2.0-mini": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            vocab_size=157184, hidden_size=2048, intermediate_size=5120, num_hidden_layers=20, num_attention_heads=16,
            num_key_value_heads=4, head_dim=128, n_routed_experts=256, moe_intermediate_size=512, n_shared_experts=1,
            first_k_dense_replace=1, use_qk_norm=True, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_memory_in_the_readme(name):
    """bfloat16: two bytes a weight; a key and a value for each layer, key-value head and feature."""
    model_class, config = CHECKPOINTS[name]
    with torch.device("meta"):
        weights = 2 * sum(parameter.numel() for parameter in model_class(config).parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stored = 1000 * 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    (row,) = re.findall(rf"^\| {re.escape(name)}.*$", README.read_text(), flags=re.MULTILINE)
    assert row.split(" | ")[-2:] == [f"{weights / 1e9:.1f} GB", f"{stored / 1e9:.2f} GB |"]
