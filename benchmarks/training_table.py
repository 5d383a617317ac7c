"""The training steps as text: every way's time and memory, and our lead."""

from typing import Any

from benchmarks.table import Notes, failure, mebibytes, milliseconds, ratio, table

OURS, BOUNDED, JAX = "batchjac", "batchjac, max_memory", "JAX"
TIMES, SMALLER = 3.0, 4.0  # aimed at: the best PyTorch way's time, and the least memory, by ours
Cells = dict[str, Any]


def step_table(step: dict[str, Any], data: dict[str, Any], notes: Notes) -> str:
    """A row for each way; the larger batch is measured once."""
    small, large = str(data["timed"]), str(data["large"])

    def text(cells: Cells) -> list[str]:
        found = []
        for n in (small, large):
            cell = cells[n]
            if "failed" in cell:
                found += [failure(cell, notes)] * 2
                continue
            time = cells["median"] if n == small else cell["seconds"]
            found += [milliseconds(time), mebibytes(cell["peak"])]
        return found

    head = (step["step"], f"{small} samples, ms", "peak, MiB", f"{data['large']:,} samples, ms†",
            "peak, MiB")  # fmt: skip
    return table(head, [(way, *text(cells)) for way, cells in step["ways"].items()])


def leads(step: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """What was aimed at, and what came."""
    ways, large = step["ways"], str(data["large"])
    times = {w: c["median"] for w, c in ways.items() if "median" in c}
    peaks = {w: c[large]["peak"] for w, c in ways.items() if c[large].get("peak")}
    torch_ways = [w for w in times if w not in (OURS, BOUNDED, JAX)]
    found = []
    if OURS in times and torch_ways:
        best = min(torch_ways, key=lambda w: times[w])
        found.append(aim(f"as fast as the best PyTorch way ({best})", times[best] / times[OURS],
                         TIMES))  # fmt: skip
    if OURS in times and JAX in times:
        found.append(aim("as fast as JAX", times[JAX] / times[OURS], 1.0))
    others = [w for w in peaks if w not in (OURS, BOUNDED, JAX)]
    if BOUNDED in peaks and others:
        least = min(others, key=lambda w: peaks[w])
        found.append(aim(f"less memory with `max_memory` than the leanest PyTorch way ({least})",
                         peaks[least] / peaks[BOUNDED], SMALLER))  # fmt: skip
    return found


def aim(what: str, value: float, target: float) -> str:
    """One line: reached or missed."""
    said = "met" if value >= target else "**missed**"
    return f"- {ratio(value)} {what}; aimed at {target:g}×: {said}."


def report(data: dict[str, Any]) -> str:
    """Both tables with what was aimed at below each."""
    notes, parts = Notes(), []
    for step in data["steps"]:
        parts += [step_table(step, data, notes), "\n".join(leads(step, data))]
    return "\n\n".join([*parts, *notes.lines()])
