"""What the doors to published `generate` functions share. Those say how many steps there are; our loop, how many tokens a
step commits. All have options that cannot be honoured.
"""

from __future__ import annotations

import ctypes

from freedave.integers import as_int


def tokens_a_step(caller: str, steps: int, gen_length: int, block_length: int, name: str = "steps") -> int:
    """How many tokens each step of a block commits, where `steps` are shared out among the blocks as published.

    `name` is what the published function calls them.

    There, a block's first steps commit one token more than its last ones where the division leaves a remainder. Ours commit
    as many each, and the last one what is left; what differs by that is refused.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    steps = as_int(caller, name, steps, minimum=1)
    gen_length = as_int(caller, "gen_length", gen_length, minimum=1)
    block_length = as_int(caller, "block_length", block_length, minimum=1)
    if gen_length % block_length:
        raise ValueError(f"{caller}: gen_length ({gen_length}) must be a multiple of block_length ({block_length})")
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"{caller}: {name} ({steps}) must be a multiple of the number of blocks ({blocks})")
    in_block = steps // blocks
    if not _alike(block_length, in_block):
        taken = next(more for more in range(in_block, block_length + 1) if _alike(block_length, more)) * blocks
        raise ValueError(
            f"{caller}: with {steps} {name}, the steps of a block of {block_length} commit different numbers of tokens, "
            f"which is not possible here: take {taken} {name}"
        )
    return -(-block_length // in_block)


def _alike(length: int, steps: int) -> bool:
    """Whether all `steps` of a block that commit anything commit as many tokens, but for the last one."""
    few, with_one_more = divmod(length, steps)
    return few == 0 or with_one_more in (0, steps - 1)


def refuse(caller: str, **options: tuple[object, object, str]) -> None:
    """Raises ValueError for an option whose value (first) is not the one that can be honoured (second)."""
    for name, (value, honoured, why) in options.items():
        if value != honoured:
            raise ValueError(f"{caller}: {name}={value!r} cannot be honoured: {why}; leave it at {honoured!r}")


def as_torch_compares(threshold: float | None) -> float | None:
    """The number that a host's confidences, a float32 tensor, are compared with: torch rounds a threshold to float32."""
    return None if threshold is None else ctypes.c_float(threshold).value
