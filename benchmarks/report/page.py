"""The generated sections of docs/benchmarks.md: each stands between two markers; all around it is written by hand."""

from __future__ import annotations

from benchmarks import roofline
from benchmarks.report import Results, gpus, processors

END = "<!-- to here -->"


def begin(section: str) -> str:
    """The marker before a section, one of `SECTIONS`."""
    return f"<!-- python -m benchmarks report writes {section} from here -->"


def replaced(text: str, machines: dict[str, Results]) -> str:
    """`text` with its sections rewritten."""
    for section, write in SECTIONS.items():
        head, marker, rest = text.partition(begin(section))
        _, end, tail = rest.partition(END)
        if not marker or not end or begin(section) in tail:
            raise ValueError(f"the page needs the line {begin(section)!r} once, and after it {END!r}")
        text = f"{head}{marker}\n\n{write(machines)}\n{end}{tail}"
    return text


def _of_gpus(machines: dict[str, Results]) -> str:
    return "\n".join(gpus.table(name, results) for name, results in machines.items() if gpus.on_a_gpu(results))


def _of_processors(machines: dict[str, Results]) -> str:
    return "\n".join(
        processors.table(name, results) for name, results in machines.items() if not gpus.on_a_gpu(results)
    )


def _limits(machines: dict[str, Results]) -> str:
    """Computed: no machine has a part in it."""
    headings = [f"{gpu}, {bandwidth / 1e12:g} TB/s" for gpu, bandwidth in roofline.DATA_SHEET.items()]
    lines = [f"| op | MB moved | {' | '.join(headings)} |", "|---" * (2 + len(headings)) + "|"]
    for limit in roofline.on_gpus():
        times = [f"{limit.microseconds(gpu):.2f} us" for gpu in roofline.DATA_SHEET]
        what = f"`{limit.op}`, {limit.shape}{', ' if limit.dtype else ''}{limit.dtype}"
        lines.append(f"| {what} | {limit.num_bytes / 1e6:.3f} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


SECTIONS = {"the tables of GPUs": _of_gpus, "the limits": _limits, "the tables of processors": _of_processors}
