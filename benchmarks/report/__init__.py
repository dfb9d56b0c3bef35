"""`python -m benchmarks report`: what people read, made from the result files and nothing else.

The tables of `docs/benchmarks.md` between their markers, and plots into each machine's folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.measure import CannotMeasureError
from benchmarks.record import RESULTS, ROOT, Row, read

Results = dict[str, list[Row]]  # the rows of each benchmark, the environment first


def run(folder: Path = RESULTS, docs: Path | None = None) -> None:
    """The tables are rewritten where the results are the committed ones, or where a file is named."""
    try:
        from benchmarks.report import plots
    except ImportError as error:
        raise CannotMeasureError(f"plots need matplotlib ({error}); pip install -r requirements/decode.txt") from error
    from benchmarks.report import page

    machines = load(folder)
    written = [path for name, results in machines.items() for path in plots.draw(results, folder / name)]
    if docs is None and folder.resolve() == RESULTS:
        docs = ROOT / "docs/benchmarks.md"
    if docs is not None:
        docs.write_text(page.replaced(docs.read_text(encoding="utf-8"), machines), encoding="utf-8")
        written.append(docs)
    for path in written:
        print(os.path.relpath(path))


def load(folder: Path) -> dict[str, Results]:
    """Every machine's results, by folder name."""
    machines: dict[str, Results] = {}
    for path in sorted(folder.glob("*/*.jsonl")):
        try:
            rows = read(path)
        except (ValueError, json.JSONDecodeError) as error:
            raise CannotMeasureError(str(error)) from error
        machines.setdefault(path.parent.name, {})[path.stem] = rows
    if not machines:
        raise CannotMeasureError(f"no results in {folder}; measure first, for example with `python -m benchmarks ops`")
    return machines


def of_kind(results: Results, benchmark: str, kind: str) -> list[Row]:
    return [row for row in results.get(benchmark, []) if row["kind"] == kind]
