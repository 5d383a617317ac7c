"""Results as text: every way's times and memory, our lead, and the attainable limit."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "batchjac"
FOREIGN = ("JAX", "TensorFlow")  # not PyTorch: they need the model written again
FORMS = ("documented", "tuned")
Result = dict[str, Any]
Data = dict[str, Any]


def number(value: float) -> str:
    """Three digits that matter; never NaN."""
    if not math.isfinite(value):
        return "no figure"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value < 1 else 1}f}" if value >= 0.1 else f"{value:.3f}"


def milliseconds(seconds: float) -> str:
    return number(seconds * 1e3)


def mebibytes(count: int | None) -> str:
    return "not measured" if count is None else number(count / (1 << 20))


def ratio(value: float) -> str:
    return "no figure" if not math.isfinite(value) else f"{value:.{1 if value >= 10 else 2}f}×"


class Notes:
    """Errors by number, their text below the table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"error [{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{k}] `{text}`" for k, text in enumerate(self.texts, 1)]


SAYS_ITSELF = ("too large", "not installed", "not written", "crash")


def failure(cell: dict[str, Any], notes: Notes) -> str:
    """Why there is no figure, in a few words."""
    reason: str = cell["failed"]
    if reason == "too slow":
        estimate = cell.get("estimate")
        return "too slow" if estimate is None else f"too slow (≈ {number(estimate)} s)"
    return reason if reason.startswith(SAYS_ITSELF) else notes.mark(reason)


def cell_text(cells: dict[str, Any], notes: Notes) -> str:
    """``documented / tuned (chunk)`` in milliseconds."""
    texts = []
    for form in FORMS:
        cell = cells[form]
        if "failed" in cell:
            texts.append(failure(cell, notes))
            continue
        once = "†" if cell.get("once") else ""
        chunk = f" ({cell['chunk']})" if form == "tuned" else ""
        texts.append(milliseconds(cell["median"]) + once + chunk)
    return texts[0] if texts[0] == texts[1] else " / ".join(texts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column left, the rest right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


@dataclass(frozen=True)
class Best:
    """The faster form of the fastest of some ways."""

    way: str
    form: str
    cell: dict[str, Any]

    @property
    def seconds(self) -> float:
        return float(self.cell["median"])

    @property
    def text(self) -> str:
        return f"{self.way}, {self.form}: {milliseconds(self.seconds)}"


def best(result: Result, ways: Iterable[str]) -> Best | None:
    """The fastest of these ways in this case, in whichever form."""
    found = [
        Best(way, form, result["ways"][way][form])
        for way in ways
        for form in FORMS
        if math.isfinite(result["ways"][way][form].get("median", math.inf))
    ]
    return min(found, key=lambda b: b.seconds, default=None)


def ahead(other: Best | None, ours: Best | None) -> float | None:
    """How many times longer the other takes: median over the turns, where both took turns."""
    if other is None or ours is None:
        return None
    a, b = other.cell.get("times"), ours.cell.get("times")
    if a and b:
        return statistics.median(x / y for x, y in zip(a, b, strict=False))
    return other.seconds / ours.seconds


@dataclass(frozen=True)
class Lead:
    """Our best form beside the best of PyTorch and of all, and the limit."""

    case: str
    ours: Best | None
    torch: Best | None
    all: Best | None
    targets: tuple[float, float] | None
    limit: float

    @property
    def ratios(self) -> tuple[float | None, float | None]:
        return ahead(self.torch, self.ours), ahead(self.all, self.ours)

    @property
    def share(self) -> float | None:
        """What share of the attainable limit is reached."""
        return None if self.ours is None else self.limit / self.ours.seconds

    @property
    def missed(self) -> list[str]:
        """Each thing aimed at that was not reached."""
        aims = self.targets or (1.0, None)
        names = ("the best PyTorch way", "the best of all")
        found = [
            f"{ratio(value)} of {name}, aimed at {aim:g}×"
            for value, aim, name in zip(self.ratios, aims, names, strict=True)
            if value is not None and aim is not None and value < aim
        ]
        if self.targets and self.share is not None and self.share < 0.5:
            found.append(f"{self.share:.0%} of the limit, aimed at 50 %")
        return found


def finished(data: Data, curve: str = "") -> list[Result]:
    """The cases (or the points of a curve) that gave figures."""
    return [r for r in data["results"] if "ways" in r and r["curve"] == curve]


def leads(data: Data) -> list[Lead]:
    """One for each case, at the best rates of the whole run."""
    results = finished(data)
    rates = [r["rates"] for r in data["results"] if "rates" in r]
    product = max((v for rate in rates for k, v in rate.items() if k != "write"), default=1.0)
    write = max((rate["write"] for rate in rates), default=1.0)
    found = []
    for r in results:
        others = [way for way in r["ways"] if way != OURS]
        own = [way for way in others if way not in FOREIGN]
        limit = r["need"]["multiply_adds"] / product + r["need"]["result_bytes"] / write
        targets = (r["targets"][0], r["targets"][1]) if r["targets"] else None
        ours = best(r, [OURS] if OURS in r["ways"] else [])
        found.append(Lead(r["case"], ours, best(r, own), best(r, others), targets, limit))
    return found


def lead_table(data: Data) -> str:
    """Ratios beside their targets."""
    head = (
        "case", "batchjac, ms", "best PyTorch way, ms", "ahead", "target",
        "best of all, ms", "ahead", "target", "limit, ms", "of the limit", "",
    )  # fmt: skip
    rows = []
    for lead in leads(data):
        by_torch, by_all = ("–" if r is None else ratio(r) for r in lead.ratios)
        aims = [f"{t:g}×" for t in lead.targets] if lead.targets else ["1×", "–"]
        rows.append((
            lead.case, "–" if lead.ours is None else milliseconds(lead.ours.seconds),
            lead.torch.text if lead.torch else "–", by_torch, aims[0],
            lead.all.text if lead.all else "–", by_all, aims[1],
            milliseconds(lead.limit), "–" if lead.share is None else f"{lead.share:.0%}",
            "**missed**" if lead.missed else "met",
        ))  # fmt: skip
    return table(head, rows)


def names(results: Sequence[Result]) -> list[str]:
    """All ways, in the order of the first case that has each."""
    return list(dict.fromkeys(way for r in results for way in r["ways"]))


def shape_text(result: Result) -> str:
    return "×".join(map(str, result["jacobian"]))


def time_table(data: Data) -> str:
    """Every way in both forms."""
    results, notes = finished(data), Notes()
    ways = names(results)
    rows = [
        (r["case"], shape_text(r),
         *(cell_text(r["ways"][w], notes) if w in r["ways"] else "–" for w in ways))
        for r in results
    ]  # fmt: skip
    rows += [
        (r["case"], "", notes.mark(r["failed"]), *[""] * (len(ways) - 1))
        for r in data["results"]
        if "failed" in r
    ]
    return "\n\n".join([table(("case", "Jacobian", *ways), rows), *notes.lines()])


def memory_table(data: Data) -> str:
    """Peaks of a fresh process, both forms, in MiB."""
    results = finished(data)
    ways = names(results)

    def text(cells: dict[str, Any]) -> str:
        texts = []
        for form in FORMS:
            cell = cells[form]
            failed = "failed" in cell
            texts.append("–" if failed or "peak" not in cell else mebibytes(cell["peak"]))
        return texts[0] if texts[0] == texts[1] else " / ".join(texts)

    rows = [
        (r["case"], mebibytes(r["need"]["result_bytes"]),
         *(text(r["ways"][w]) if w in r["ways"] else "–" for w in ways))
        for r in results
    ]  # fmt: skip
    return table(("case", "the result", *ways), rows)


def growth_table(data: Data) -> str:
    """Samples, seconds and peaks of the job to a file."""
    rows = []
    for point in data["growth"]["points"]:
        if "failed" in point:
            rows.append((point["way"], f"{point['samples']:,}", point["failed"], "–", "–"))
            continue
        rows.append((
            point["way"], f"{point['samples']:,}", number(point["seconds"]),
            number(point["seconds"] / point["samples"] * 1e6), mebibytes(point["peak"]),
        ))  # fmt: skip
    return table(("way", "samples", "seconds", "µs a sample", "peak, MiB"), rows)


def report(data: Data) -> str:
    """What a run prints."""
    parts = [lead_table(data), "milliseconds: documented / tuned (chunk); † one call", ""]
    parts.append(time_table(data))
    if data.get("growth", {}).get("points"):
        parts += ["", growth_table(data)]
    return "\n".join(parts)
