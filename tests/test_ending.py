"""How sequences end: one or several end-of-sequence tokens, stop sequences; and what a decode needs of memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import golden_lm, prompt

import freedave
from benchmarks.peak_memory import PeakMemory


def test_example():
    """The decode ends with the block by which its answer contains the stop sequence, the answer with that sequence."""
    lm = golden_lm()
    whole = freedave.generate(lm, prompt(8), max_new_tokens=32, draft_steps=1)
    answer = whole.sequences[0, 8:].tolist()
    stop = answer[10:13]  # begins in the third block, ends in the fourth
    first = next(i for i in range(30) if answer[i : i + 3] == stop)
    length = first + 3
    commits = []
    out = freedave.generate(
        lm, prompt(8), max_new_tokens=32, stop_sequences=[[62, 61], stop], check_lossless=True, on_step=commits.append
    )
    assert out.sequences[0, 8 : 8 + length].tolist() == answer[:length]
    assert (out.sequences[0, 8 + length :] == lm.mask_token_id).all() and (out.step_map[0, length:] == -1).all()
    assert out.stats.tokens == length == commits[-1].tokens and commits[-1].finished
    reported = {position for commit in commits for position in commit.positions}
    assert {position for position in reported if position < commits[-1].length} == set(range(length))


CACHES = [
    ("block_causal", "auto"),
    ("block_causal", "none"),
    ("full", "none"),
    ("full", "prefix"),
    ("full", "dual"),
    ("full_shifted", "dual"),
]


EXECUTORS = pytest.mark.parametrize("executor", ["planned", "graph"])


@EXECUTORS
@pytest.mark.parametrize("draft_steps", [1, 3, 8])
@pytest.mark.parametrize(("family", "cache"), CACHES)
def test_several_ends_of_sequence(family, cache, draft_steps, executor):
    """Any of them ends a sequence, wherever in its block it stands; the first one fills the rest."""
    options = {"max_new_tokens": 30, "block_length": 8, "cache": cache, "executor": executor}
    whole = freedave.generate(golden_lm(family), prompt(7), draft_steps=1, **options)
    answer = whole.sequences[0, 7:].tolist()
    absent = next(token for token in range(63) if token not in answer)
    for end in list(dict.fromkeys(answer))[::4]:
        length = answer.index(end) + 1
        out = freedave.generate(
            golden_lm(family, eos_token_id=[absent, end]),
            prompt(7),
            draft_steps=draft_steps,
            check_lossless=True,
            **options,
        )
        assert out.sequences[0, 7 : 7 + length].tolist() == answer[:length]
        assert (out.sequences[0, 7 + length :] == absent).all() and out.stats.tokens == length
        assert torch.equal(out.step_map[0, :length], whole.step_map[0, :length])
        assert (out.step_map[0, length:] == -1).all() and (out.forward_map[0, length:] == -1).all()
    unending = freedave.generate(
        golden_lm(family, eos_token_id=answer[3]), prompt(7), draft_steps=draft_steps, eos_token_id=[], **options
    )
    assert torch.equal(unending.sequences, whole.sequences)


@EXECUTORS
@pytest.mark.parametrize("family", ["block_causal", "full"])
def test_the_block_of_the_end_is_the_last_one(family, executor):
    """No forward is spent on what follows it."""
    lm, options = golden_lm(family), {"draft_steps": 1, "block_length": 8, "executor": executor}
    answer = freedave.generate(lm, prompt(8), 32, **options).sequences[0, 8:].tolist()
    middle = next(i for i in range(9, 15) if answer.index(answer[i]) == i)
    out = freedave.generate(lm, prompt(8), 32, eos_token_id=answer[middle], **options)
    assert out.num_forwards == 16 and out.stats.tokens == middle + 1


@EXECUTORS
def test_the_first_end_counts(executor):
    """Read from the left, whatever kind it is: an end token within a stop sequence, a stop sequence within another."""
    lm = golden_lm(block_length=16)
    answer = freedave.generate(lm, prompt(5), 32).sequences[0, 5:].tolist()
    new = [i for i in range(32) if answer.index(answer[i]) == i]
    token, i = next((answer[i], i) for i in new if i > 3)
    around = answer[i - 2 : i + 2]
    for options in (
        {"eos_token_id": token, "stop_sequences": [around]},
        {"stop_sequences": [around, [token]]},
        {"eos_token_id": [60, token], "stop_sequences": [answer[i + 1 : i + 3]]},
    ):
        out = freedave.generate(lm, prompt(5), 32, check_lossless=True, executor=executor, **options)
        assert out.stats.tokens == i + 1 and out.sequences[0, 5 : 6 + i].tolist() == answer[: i + 1]


@EXECUTORS
def test_the_cut_off_part_of_a_block_ends_nothing(executor):
    """The last block may reach beyond `max_new_tokens`; what ends there is not seen, and what it completes is."""
    lm = golden_lm(block_length=8)
    answer = freedave.generate(lm, prompt(8), 16).sequences[0, 8:].tolist()
    assert answer.index(answer[11]) == 11 and answer.index(answer[13]) == 13
    options = {"executor": executor, "check_lossless": True}
    cut = freedave.generate(lm, prompt(8), 13, eos_token_id=answer[13], stop_sequences=[answer[12:14]], **options)
    assert cut.sequences[0, 8:].tolist() == answer[:13]
    inside = freedave.generate(lm, prompt(8), 13, eos_token_id=answer[11], **options)
    assert inside.stats.tokens == 12 and inside.sequences[0, 8:].tolist() == [*answer[:12], answer[11]]


@EXECUTORS
@pytest.mark.parametrize("draft_steps", [1, 8])
def test_commits_report_nothing_behind_the_end(draft_steps, executor):
    """What was reported before the end token was known is taken back by `length`."""
    lm = golden_lm(block_length=16)
    answer = freedave.generate(lm, prompt(8), 32).sequences[0, 8:].tolist()
    taken_back = 0
    for end in dict.fromkeys(answer):
        commits, shown, known = [], {}, 32
        freedave.generate(lm, prompt(8), 32, draft_steps, eos_token_id=end, on_step=commits.append, executor=executor)
        for commit in commits:
            assert all(position < commit.length for position in commit.positions) and commit.length <= known
            known = commit.length
            shown |= dict(zip(commit.positions, commit.token_ids, strict=True))
            taken_back += sum(position >= known for position in shown)
            shown = {position: token for position, token in shown.items() if position < known}
            assert commit.tokens == len(shown)
            assert end not in [token for position, token in shown.items() if position < known - 1]
        assert [shown[i] for i in range(known)] == answer[: answer.index(end) + 1]
    assert taken_back


@EXECUTORS
def test_sequences_of_a_batch_end_on_their_own(executor):
    lm = golden_lm(block_length=8)
    input_ids = torch.cat([prompt(8, seed) for seed in range(4)])
    free = freedave.generate(lm, input_ids, 32).sequences[:, 8:].tolist()
    end = free[1][11]
    out = freedave.generate(lm, input_ids, 32, eos_token_id=end, check_lossless=True, executor=executor)
    lengths = [answer.index(end) + 1 if end in answer else 32 for answer in free]
    assert (out.step_map >= 0).sum(1).tolist() == lengths and len(set(lengths)) > 1
    for row, answer, length in zip(out.sequences[:, 8:].tolist(), free, lengths, strict=True):
        assert row == answer[:length] + [end] * (32 - length)


@EXECUTORS
def test_an_end_token_in_the_prompt_ends_nothing(executor):
    """Not even in the block that the prompt begins."""
    lm = golden_lm(block_length=8)
    start = prompt(5)
    answer = freedave.generate(lm, start, 19).sequences
    end = next(token for token in start[0].tolist() if token not in answer[0, 5:].tolist())
    assert torch.equal(freedave.generate(lm, start, 19, eos_token_id=end, executor=executor).sequences, answer)


@EXECUTORS
def test_a_prompt_does_not_stop_its_answer(executor):
    """Only what was generated can hold a stop sequence, even in the block that the prompt begins."""
    lm = golden_lm()
    start = prompt(7)
    plain = freedave.generate(lm, start, max_new_tokens=9)
    stop = start[0, 4:6].tolist()
    answer = plain.sequences[0, 7:].tolist()
    assert stop not in [answer[i : i + 2] for i in range(8)]
    out = freedave.generate(lm, start, 9, stop_sequences=[stop], executor=executor)
    assert torch.equal(out.sequences, plain.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": [3, 64]}, "eos_token_id 64 is outside the model's vocabulary of 64 tokens"),
        ({"stop_sequences": [[1, -2]]}, "stop_sequences: -2 is outside"),
        ({"stop_sequences": [[1], []]}, "a stop sequence is empty"),
    ],
)
def test_argument_errors(options, message):
    with pytest.raises(ValueError, match=message):
        freedave.generate(golden_lm(), prompt(4), 8, **options)


@pytest.mark.parametrize(
    ("family", "cache", "new", "options"),
    [
        ("block_causal", "auto", 32, {}),
        ("full", "none", 32, {}),
        ("full", "dual", 32, {}),
        ("full", "dual", 128, {"block_length": 32}),
        ("full", "prefix", 32, {}),
        ("full", "prefix", 128, {}),
        ("full", "prefix", 256, {"block_length": 32, "tokens_per_step": 2}),
    ],
)
def test_eight_drafts_need_little_more_memory_than_one(family, cache, new, options):
    """A prompt of 1,024 tokens: the keys and values stand once, and few more tokens are computed at a time."""
    lm = golden_lm(family)
    lm.max_positions = None  # rotary positions: the configuration's 512 is no limit of the arithmetic
    options = {"block_length": 8, "cache": cache} | options
    peaks = {}
    for draft_steps in (1, 8):
        with PeakMemory(lm.device) as memory:
            out = freedave.generate(lm, prompt(1024), new, draft_steps, **options)
        peaks[draft_steps] = memory.peak
    one_layer = 2 * (1024 + new) * 2 * 16 * 4
    assert out.stats.cache_bytes == (0 if cache == "none" else 2 * one_layer) < peaks[1]
    assert peaks[8] <= 1.3 * peaks[1]


@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "dual"), ("full", "prefix")])
def test_the_logits_of_eight_drafts_need_no_memory(family, cache):
    """A large vocabulary and little else: all at once, they would need more than all the rest."""
    config = transformers.Qwen3Config(
        vocab_size=32768,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    lm = freedave.DiffusionLM(model, 32767, attention=family, block_length=32)
    sequences, peaks = {}, {}
    for draft_steps in (1, 8):
        with PeakMemory(lm.device) as memory:
            out = freedave.generate(lm, prompt(1024), 64, draft_steps, block_length=32, cache=cache)
        sequences[draft_steps], peaks[draft_steps] = out.sequences, memory.peak
    assert torch.equal(sequences[1], sequences[8])
    assert peaks[8] <= 1.3 * peaks[1]
