"""`python -m benchmarks compare BEFORE AFTER`: two records of one machine, say of `ops`, before and after a change.

Compared are ratios to the baseline of the same rounds, since seconds of different runs have different neighbours. Single
cases jump with these as well, so what is judged is the mean of an op's cases; those that lost most are listed for people.
Both runs need cores of their own: beside other work short calls are over before they are interrupted, and long ones are not.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.check import Key, by_case
from benchmarks.measure import CannotMeasureError
from benchmarks.record import Row, read, shape_text

HELD = 0.9  # of what the ratio was, on geometric average over an op's cases
LISTED = 5


def run(before: Path, after: Path) -> bool:
    """Prints a line for each op of each provider; returns whether none became slower."""
    rows = [_read(path) for path in (before, after)]
    for name in ("machine", "threads"):
        first, second = (environment[name] for environment, *_ in rows)
        if first != second:
            raise CannotMeasureError(
                f"{before} has {name} {first}, {after} has {second}: their ratios say nothing together"
            )
    shares = shared(*rows)
    if not shares:
        raise CannotMeasureError(f"{before} and {after} have no timed case in common")
    held = True
    for op, provider in dict.fromkeys((key[1], key[4]) for key in shares):
        mine = {key: share for key, share in shares.items() if (key[1], key[4]) == (op, provider)}
        mean = statistics.geometric_mean(mine.values())
        held &= mean >= HELD
        verdict = "held" if mean >= HELD else "SLOWER"
        print(f"{verdict:<8}{op:<22}{provider:<14}{mean:.2f} of the ratio before, over {len(mine)} cases")
    print(f"\nthe cases that lost most, of {len(shares)}:")
    for key in sorted(shares, key=shares.__getitem__)[:LISTED]:
        print(f"    {shares[key]:.2f}  {key[1]} {shape_text(dict(key[2]))} {key[3]} {key[4]}")
    return held


def shared(before: list[Row], after: list[Row]) -> dict[Key, float]:
    """The ratio after as a part of the ratio before, of every case that both have; baselines are not compared."""
    old, new = by_case(before), by_case(after)
    return {
        key: row["ratio"] / old[key]["ratio"]
        for key, row in new.items()
        if key in old and row["provider"] not in (row["baseline"], "compiled")
    }


def _read(path: Path) -> list[Row]:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise CannotMeasureError(str(error)) from error
