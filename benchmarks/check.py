"""`python -m benchmarks check`: measures the stated targets, and compares with the committed results of this machine.

Compared are ratios to the baseline of the same rounds, since seconds of different days have different neighbours. A ratio
below `TOLERATED` of the committed one is a regression. The committed results are those of git's HEAD, whatever lies in the
folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.record import ROOT, Record, Row, git, parse, shape_text

TOLERATED = 0.75
SOURCES = ("ops", "step", "check", "decode")
Key = tuple[Any, ...]


def run(record: Record, quick: bool) -> bool:
    """Returns whether every target held and nothing regressed. A smoke run judges nothing."""
    held = True
    found = list(targets.measured(record, quick))
    print()
    for target in found:
        record.put(
            "target",
            target.text() if not quick else target.text().replace("FAILED", "-     ").replace("held", "-   "),
            name=target.name,
            found=target.found,
            at=target.at,
            limit=target.limit,
            unit=target.unit,
            held=target.held,
            machine_dependent=target.machine_dependent,
        )
        held &= target.held
    print()
    held &= compare(record, committed(record))
    if quick:
        record.note("\na smoke run on tiny shapes: nothing above is judged")
        return True
    return held


def committed(record: Record) -> dict[Key, Row]:
    """The committed rows that have a ratio, by what they timed."""
    rows: dict[Key, Row] = {}
    for name in SOURCES:
        path = record.folder / f"{name}.jsonl"
        text = _committed_text(path)
        if isinstance(text, str):
            rows |= by_case(parse(text, f"{name}.jsonl of HEAD"))
        else:
            record.absent(f"comparison with {path.name}", f"HEAD has no results of this machine in {path.parent.name}")
    return rows


def _committed_text(path: Path) -> str | None:
    try:
        relative = path.resolve().relative_to(ROOT)
    except ValueError:
        return None  # results that are kept outside the checkout are not committed
    return git("show", f"HEAD:{relative.as_posix()}")


def by_case(rows: list[Row]) -> dict[Key, Row]:
    return {_key(row): row for row in rows if row["kind"] in ("timing", "decode") and row.get("ratio") is not None}


def _key(row: Row) -> Key:
    what = row["op"] if row["kind"] == "timing" else row["model"]
    return (
        row["kind"],
        what,
        tuple(sorted(row["shape"].items())),
        row.get("dtype", ""),
        row["provider"],
        row["baseline"],
    )


def compare(record: Record, before: dict[Key, Row]) -> bool:
    """Whether no ratio of the record fell below the tolerated part of what it was."""
    held = True
    for key, row in by_case(record.rows).items():
        if key not in before or row["provider"] in (row["baseline"], "compiled"):
            continue
        share = row["ratio"] / before[key]["ratio"]
        held &= share >= TOLERATED
        text = (
            f"{'held' if share >= TOLERATED else 'FAILED':<8}{key[1]} {shape_text(row['shape'])} {key[3]} {row['provider']}: "
            f"{row['ratio']:.2f} x {row['baseline']}, committed {before[key]['ratio']:.2f}"
        )
        name = f"{key[1]} {shape_text(row['shape'])} {key[3]} {row['provider']}: part of the committed ratio"
        values = {"found": share, "at": "least", "limit": TOLERATED, "unit": "", "held": share >= TOLERATED}
        record.put("regression", text, name=name, ratio=row["ratio"], committed=before[key]["ratio"], **values)
    return held
