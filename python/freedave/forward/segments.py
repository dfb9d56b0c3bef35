"""Which blocks of which drafts a cached forward computes: its batch rows are blocks, not whole drafts.

With block-causal attention a block sees only the blocks before it. So a draft's block need not be computed when nothing
there can be drafted from it yet, nor when an earlier draft of the chain has finished the same block: its keys and values
are the same. What remains are *segments*, one block of one draft each. The segments of K nested drafts are about half of
the K x window rectangle, and a segment's result does not depend on the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Segments:
    """The segments of one forward, in order of draft, then block.

    `draft[s]` and `block[s]` say which block of the window segment s computes; `chain[s]` lists the segments it attends to
    besides the prefix: those of the blocks before it, and itself. `of_draft[j][b]` is the segment that holds block b of
    draft j, for the blocks that draft j needs.
    """

    draft: list[int]
    block: list[int]
    chain: list[list[int]]
    of_draft: list[list[int]]


def plan_segments(drafts: list[list[int]], reach: list[int], block_length: int, mask_token_id: int) -> Segments:
    """The segments of nested `drafts [J][L]`, of which draft j needs the first `reach[j]` positions.

    Those are whole blocks, but for the last one of a sequence, which may be cut short.
    """
    draft: list[int] = []
    block: list[int] = []
    chain: list[list[int]] = []
    of_draft: list[list[int]] = []
    for j, state in enumerate(drafts):
        segments: list[int] = []
        for b in range(math.ceil(reach[j] / block_length)):
            span = slice(b * block_length, (b + 1) * block_length)
            before = of_draft[-1] if j else []
            same_context = b < len(before) and before[:b] == segments
            if same_context and mask_token_id not in state[span] and drafts[j - 1][span] == state[span]:
                segments.append(before[b])
            else:
                segments.append(len(draft))
                chain.append(segments.copy())
                draft.append(j)
                block.append(b)
        of_draft.append(segments)
    return Segments(draft, block, chain, of_draft)
