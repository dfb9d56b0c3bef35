"""Which lines of csrc/cuda the tests execute: reads gcov's counts and writes a table (`make coverage-cuda`).

    python tests/simt/kernel_coverage.py BUILD docs/cuda-coverage.md

BUILD is a build folder with FREEDAVE_COVERAGE=ON whose libraries have run. A line counts as executed when it ran in some
instance of its template. Lines that only nvcc sees (inline PTX) are not among them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADER = """# Lines of the CUDA kernels that tests execute

The op contract tests run `csrc/cuda` on the emulator of `tests/simt`; counted with gcov by `make coverage-cuda`. Lines of
inline PTX are compiled by nvcc only and are not in the table.

| file | lines | executed | never executed |
|---|---|---|---|
"""


def counts_by_line(build: Path) -> dict[Path, dict[int, int]]:
    lines: dict[Path, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    notes = sorted(path for path in build.rglob("*.gcda") if ".cu." in path.name)
    if not notes:
        raise SystemExit(f"{build} has no counts; build it with FREEDAVE_COVERAGE=ON and run the tests on it")
    for note in notes:
        command = ["gcov", "--json-format", "--stdout", note.name]
        result = subprocess.run(command, cwd=note.parent, capture_output=True, text=True, check=True)
        for source in json.loads(result.stdout)["files"]:
            path = (ROOT / source["file"]).resolve()
            if path.is_relative_to(ROOT / "csrc/cuda"):
                for line in source["lines"]:
                    lines[path.relative_to(ROOT)][line["line_number"]] += line["count"]
    return lines


def main(build: str, output: str) -> None:
    rows = []
    for path, counts in sorted(counts_by_line(Path(build).resolve()).items()):
        missed = sorted(number for number, count in counts.items() if count == 0)
        text = (ROOT / path).read_text().splitlines()
        for number in missed:
            print(f"{path}:{number}: never executed: {text[number - 1].strip()}")
        rows.append(
            f"| {path} | {len(counts)} | {len(counts) - len(missed)} | {', '.join(map(str, missed)) or 'none'} |\n"
        )
    Path(output).write_text(HEADER + "".join(rows))
    print("".join(rows), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
