"""The training steps as text: every way's time and memory, what was aimed at, and the section."""

from typing import Any

from benchmarks.table import Notes, failure, mebibytes, milliseconds, ratio, table

OURS, BOUNDED, JAX = "batchjac", "batchjac, max_memory", "JAX"
TIMES, SMALLER = 3.0, 4.0  # aimed at: the best PyTorch way's time, and the least memory, by ours
Cells = dict[str, Any]
SECTION = """\
## In training

One step: value and Jacobian of a block, a function of the Jacobian, a loss, and the gradients of
the loss by all parameters. Written by `python -m benchmarks.training`, which `make bench` runs
after the cases above, on {processor}, threads: {threads}.

- *inverse*: a block 64-128-64 with tanh, as in seed 5; the loss is the mean of |y|² + |J⁻¹|².
- *flow*: two residual blocks 32-64-32 with tanh; the loss is the mean of |y|²/2 − log|det J|.

batchjac is `linalg.inverse` and `linalg.slogdet` of the model with `create_graph=True`; and the
same with `max_memory` ({budgets}).
The others give a Jacobian to `torch.linalg`; JAX is `jit(value_and_grad)`. Every way's loss and
gradients are those of a row loop in float64, to 10⁻³ of the largest entry of each. All ways take
turns in one process; the peak is the rise of resident memory in a process that did nothing before
but eight samples. † one call of that process.
"""


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


def section(data: dict[str, Any]) -> str:
    """The part of the page."""
    steps = data["steps"]
    budgets = ", ".join(f"{s['budget'] >> 20} MiB for the {s['step'].split(',')[0]}" for s in steps)
    where = data["environment"]
    head = SECTION.format(
        threads=where["threads"], processor=where["processor"], budgets=budgets
    )  # fmt: skip
    return f"{head}\n{report(data)}"


def report(data: dict[str, Any]) -> str:
    """Both tables with what was aimed at below each."""
    notes, parts = Notes(), []
    for step in data["steps"]:
        parts += [step_table(step, data, notes), "\n".join(leads(step, data))]
    return "\n\n".join([*parts, *notes.lines()])
