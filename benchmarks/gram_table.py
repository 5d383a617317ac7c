"""Norms and Grams toward parameters as text: every way's time and memory, and the section."""

from typing import Any

from benchmarks.gram import LIMIT, SECONDS, TOLERANCE
from benchmarks.table import Notes, failure, mebibytes, milliseconds, ratio, table

OURS = "batchjac"
Row = dict[str, Any]
TITLES = {
    "kernel": "*kernel* `[N, O, N, O]`: inner products of all gradients",
    "norm": "*norm* `[N]`: the squared norm of each sample's gradients",
}
SECTION = """\
## Norms and Grams toward parameters

For every sample and output the gradient by all parameters is a row. batchjac is
`operator(model, x, wrt="parameters")` with `gram(across=True)` or `norm(squared=True)`, which form
no row that is not needed; beside it stand the libraries made for one of the two. Written by
`python -m benchmarks.gram` on {processor}, threads: {threads}, torch {torch}.

- Models in evaluation mode with 10 outputs: {shapes}.
- Every way's figures of the first two samples are those of dense rows in float64, to {off:g} of the
  largest entry. Ways take turns in one process, each in time of its own thread; the figure is the
  median, in brackets how many times batchjac's it is. The peak is the rise of resident memory in a
  first call, in a process that did nothing before but a forward of two samples. *too large*: more
  than {memory:g} GiB; *too slow*: more than {seconds:g} s.
"""


def figure_table(figure: str, rows: list[Row], notes: Notes) -> str:
    """A line for each way, two columns for each case."""
    head = [figure]
    for row in rows:
        head += [f"{row['case']}, ms", "peak, MiB"]
    ways = {way: None for row in rows for way in row["ways"]}
    return table(
        head, [[way, *(t for row in rows for t in texts(row, way, notes))] for way in ways]
    )


def texts(row: Row, way: str, notes: Notes) -> tuple[str, str]:
    """Time and memory of a way in a case, or why there is none."""
    cell, ours = row["ways"][way], row["ways"][OURS]
    if "failed" in cell:
        said = failure(cell, notes)
        return said, said
    if "median" not in cell:
        return "not timed", mebibytes(cell["peak"])
    time = milliseconds(cell["median"])
    if way != OURS and "median" in ours:
        time += f" ({ratio(cell['median'] / ours['median'])})"
    return time, mebibytes(cell["peak"])


def lead(row: Row) -> str:
    """The fastest other way's time and memory by ours, in a sentence; empty where there is none."""
    timed = {w: c for w, c in row["ways"].items() if "median" in c and "failed" not in c}
    ours = timed.pop(OURS, None)
    if ours is None or not timed:
        return ""
    way = min(timed, key=lambda w: timed[w]["median"])
    said = f"- {row['figure']}, {row['case']}: {ratio(timed[way]['median'] / ours['median'])} as "
    said += f"fast as the fastest other way ({way})"
    if ours["peak"] and timed[way]["peak"]:
        said += f", with {ratio(ours['peak'] / timed[way]['peak'])} its memory"
    return said + "."


def section(data: dict[str, Any]) -> str:
    """The part of the page."""
    where, notes, rows = data["environment"], Notes(), data["rows"]
    shapes = {row["case"]: "×".join(map(str, row["shape"])) for row in rows}
    head = SECTION.format(
        processor=where.get("processor") or where["machine"], threads=where["threads"],
        torch=where["torch"], memory=LIMIT / (1 << 30), seconds=SECONDS, off=TOLERANCE,
        shapes=", ".join(f"{name} {shape}" for name, shape in shapes.items()),
    )  # fmt: skip
    parts = [head.rstrip("\n")]
    for figure in dict.fromkeys(row["figure"] for row in rows):
        own = [row for row in rows if row["figure"] == figure]
        leads = "\n".join(filter(None, map(lead, own)))
        parts += [f"{TITLES[figure]}.", figure_table(figure, own, notes), leads]
    return "\n\n".join(part for part in (*parts, *notes.lines()) if part)
