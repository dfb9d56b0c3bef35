"""The limit of every op: the bytes that it cannot avoid to move, and the time that takes at a bandwidth.

Inputs are read once and outputs written once; of the logits only the rows of masked positions. Tokens take 8 bytes,
confidences and ranks 4, masks 1. Nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from freedave_kernels.contract import STATE_FIELDS, TOKENS_PER_STATE, PoolLayout, RecordLayout

# Memory bandwidth in the makers' data sheets, bytes a second (SXM modules).
DATA_SHEET = {"H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12}


def predict_tokens(rows: int, masked: int, vocab: int, itemsize: int) -> int:
    return masked * vocab * itemsize + rows * (8 + 8 + 4)


def partial_predictions(rows: int, masked: int, vocab: int, itemsize: int) -> int:
    return masked * vocab * itemsize + rows * (8 + _states(vocab))


def merge_predictions(rows: int, vocab: int) -> int:
    return rows * (_states(vocab) + 8 + 8 + 4)


def logit_floor(rows: int, vocab: int, itemsize: int) -> int:
    return rows * (vocab * itemsize + 4)


def _states(vocab: int) -> int:
    return -(-vocab // TOKENS_PER_STATE) * STATE_FIELDS * 8


def rank_positions(batch: int, length: int) -> int:
    return batch * length * (4 + 1 + 4)


def select_transfer(batch: int, length: int) -> int:
    return batch * length * (4 + 1 + 1)


def build_drafts(batch: int, count: int, length: int) -> int:
    return batch * (length * (8 + 8 + 4) + count * length * 8 + 4)


def verify_drafts(batch: int, count: int, length: int) -> int:
    return batch * (2 * count * length * 8 + 8)


def draft_step(batch: int, count: int, length: int) -> int:
    read = count * length * (8 + 8 + 4) + 4
    written = RecordLayout.of(length, count).width * 8
    return batch * (read + written)


def pooled_step(batch: int, count: int, length: int, states: int) -> int:
    """What `draft_step` moves, and every state of a pool once, with what was predicted there."""
    return draft_step(batch, count, length) + batch * PoolLayout.of(states, length).width * 8


def draft_attention(
    batch: int, count: int, length: int, stored: int, heads: int, groups: int, size: int, itemsize: int
) -> int:
    """Queries and results; keys and values of windows; those of the stored positions once, for all drafts and heads."""
    tokens = batch * count * length
    features = 2 * (tokens * heads + tokens * groups + batch * stored * groups) * size
    return features * itemsize + batch * (2 * 2 * 4 + 8 + 4 + 4)


def keep(layers: int, batch: int, kept: int, groups: int, size: int, itemsize: int) -> int:
    """Keys and values of `kept` positions of each sequence, read and written."""
    return 2 * 2 * layers * batch * kept * groups * size * itemsize + batch * 4 * 8


@dataclass(frozen=True)
class Limit:
    """One line of the computed table: what must be moved for one call, and the least time on each GPU."""

    op: str
    shape: str
    dtype: str
    num_bytes: int

    def microseconds(self, gpu: str) -> float:
        return self.num_bytes / DATA_SHEET[gpu] * 1e6


def on_gpus() -> list[Limit]:
    """The computed table: a step's shapes at the data sheets' bandwidths."""
    limits = []
    for rows in (32, 256):
        for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
            num_bytes = predict_tokens(rows, rows, 151936, itemsize)
            limits.append(Limit("predict_tokens", f"{rows} masked rows, V=151936", dtype, num_bytes))
    limits.append(Limit("draft_step", "B=32, K=8, L=32", "", draft_step(32, 8, 32)))
    for batch, count, length, stored in ((1, 1, 4, 128), (1, 8, 20, 128), (1, 8, 20, 4096), (16, 8, 20, 4096)):
        num_bytes = draft_attention(batch, count, length, stored, heads=32, groups=8, size=128, itemsize=2)
        shape = f"B={batch}, K={count}, L={length}, 32/8 heads of 128, {stored} stored"
        limits.append(Limit("draft_attention", shape, "bfloat16", num_bytes))
    return limits
