"""load_tokenizer: transformers' own classes and the tokenizer's files; code in the checkpoint never runs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tokenizers
from published_configs import EOS, MASK
from published_layouts import write_code_tokenizer, write_published

import freedave
from freedave.models.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def write_tokenizer(folder: Path, **settings: object) -> None:
    """tokenizer.json with ten words, and the settings that LLaDA publishes."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "chat_template": TEMPLATE} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_example(tmp_path):
    folder = write_published(tmp_path, "llada")[0]
    write_tokenizer(folder)
    tokenizer = freedave.load_model(folder).tokenizer
    assert tokenizer("w3 w1")["input_ids"] == [3, 1]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "<user>w3"


def test_a_chat_template_of_its_own(tmp_path):
    write_tokenizer(tmp_path, chat_template=None)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(tmp_path)[0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "<user>w3"


def test_only_tokenizer_json(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path)[0]("w3 w1")["input_ids"] == [3, 1]


def test_none(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert freedave.load_model(write_published(tmp_path, "llada")[0]).tokenizer is None
    assert load_tokenizer(tmp_path) == (None, "no tokenizer files")


CODE = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["evil.MyTokenizer", "evil.MyTokenizer"]}}


def test_code_with_tokenizer_json(tmp_path):
    write_tokenizer(tmp_path, **CODE)
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    assert load_tokenizer(tmp_path)[0]("w3 w1")["input_ids"] == [3, 1]


def test_code_alone(tmp_path):
    folder = write_published(tmp_path, "sdar")[0]
    write_tokenizer(folder, **CODE)
    (folder / "tokenizer.json").unlink()
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    with pytest.warns(
        UserWarning, match="without a tokenizer: .* MyTokenizer, is code in the checkpoint, .* never run"
    ):
        assert freedave.load_model(folder).tokenizer is None


def test_code_whose_twin_transformers_has(tmp_path):
    """Dream's tokenizer is Qwen2's under another name, without tokenizer.json."""
    folder = write_published(tmp_path, "dream")[0]
    write_code_tokenizer(folder)
    tokenizer = freedave.load_model(folder).tokenizer
    assert tokenizer("abba c<|mask|>")["input_ids"] == [4, 1, 0, 5, MASK]
    assert tokenizer.mask_token_id == MASK and tokenizer.eos_token_id == EOS
    assert tokenizer.decode([4, 5]) == "ab c"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "user: ab"


def test_an_incomplete_vocabulary(tmp_path):
    """The special tokens would move, and prompts with them."""
    write_code_tokenizer(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for piece, i in vocabulary.items() if i < 50}))
    with pytest.raises(freedave.CheckpointError, match="the id 50, and tokenizer_config.json says 89"):
        load_tokenizer(tmp_path, "Qwen2Tokenizer")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "{", '{"version": 3}'])
def test_broken_files(tmp_path, file, content):
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    if (file, content) == ("tokenizer_config.json", '{"version": 3}'):  # says nothing, which is allowed
        assert load_tokenizer(tmp_path)[0]("w3")["input_ids"] == [3]
        return
    with pytest.raises(freedave.CheckpointError, match=r"tokenizer"):
        load_tokenizer(tmp_path)
