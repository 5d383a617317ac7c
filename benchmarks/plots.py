"""The plots of the performance page, from the JSON alone."""

import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.table import OURS, Data, best, finished, leads, names

matplotlib.use("Agg")
COLOURS = {
    "batchjac": "#c1272d", "row loop": "#4d4d4d", "vmap(jacrev)": "#1f6fb2",
    "vmap(jacfwd)": "#58a55c", "JAX": "#9467bd", "TensorFlow": "#e08214",
    "loop over samples": "#999999",
}  # fmt: skip
TITLES = {
    "batch": ("by batch", "samples (LeNet5, 1×32×32 to 10)"),
    "outputs": ("by outputs", "outputs (MLP, 256 inputs, 32 samples)"),
    "inputs": ("by inputs", "inputs (MLP, 64 outputs, 32 samples)"),
}


def plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def ratios(data: Data, path: Path) -> None:
    """A bar for each case and column, a tick where its target is."""
    rows = [lead for lead in leads(data) if lead.ours is not None][::-1]
    figure = Figure(figsize=(8, 0.5 + 0.42 * len(rows)))
    axes = figure.subplots()
    kinds = ((0.2, "#1f6fb2", "best PyTorch way"), (-0.2, "#e08214", "best of all"))
    for column, (shift, colour, label) in enumerate(kinds):
        for y, lead in enumerate(rows):
            value = lead.ratios[column]
            if value is None:
                continue
            axes.barh(y + shift, value, 0.36, color=colour, label=label if y == 0 else None)
            axes.text(value * 1.03, y + shift, f"{value:.1f}", va="center", fontsize=7)
            if lead.targets:
                aim = lead.targets[column]
                axes.plot([aim, aim], [y + shift - 0.18, y + shift + 0.18], color="black", lw=2)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [lead.case for lead in rows])
    axes.set_xlabel("times faster than; black ticks are targets")
    axes.legend(frameon=False, loc="lower right")
    plain(axes)
    save(figure, path)


def curves(data: Data, path: Path) -> None:
    """Time by batch, by outputs, by inputs; each way in its faster form."""
    figure = Figure(figsize=(12, 3.6))
    for axes, (curve, (title, label)) in zip(figure.subplots(1, 3), TITLES.items(), strict=True):
        points = sorted(finished(data, curve), key=lambda r: r["along"])
        for way in names(points):
            found = [(r["along"], best(r, [way])) for r in points if way in r["ways"]]
            line = [(x, math.nan if b is None else b.seconds * 1e3) for x, b in found]  # a gap
            style: dict[str, Any] = {"lw": 2.4, "zorder": 3} if way == OURS else {"lw": 1.4}
            if line:
                axes.plot(*zip(*line, strict=True), "o-", ms=4, color=COLOURS.get(way),
                          label=way, **style)  # fmt: skip
        axes.set(title=title, xlabel=label, ylabel="milliseconds", xscale="log", yscale="log")
        shown = [r["along"] for r in points]
        axes.set_xticks(shown, [f"{x:,}" for x in shown])
        axes.minorticks_off()
        if points and curve == "batch":
            axes.legend(frameon=False, fontsize=8)
        plain(axes)
    figure.tight_layout()
    save(figure, path)


def growth(data: Data, path: Path) -> None:
    """Seconds and peak memory of the job to a file, by samples."""
    figure = Figure(figsize=(9.5, 3.6))
    time, memory = figure.subplots(1, 2)
    points = [p for p in data["growth"]["points"] if "failed" not in p]
    for way in dict.fromkeys(p["way"] for p in points):
        own = [p for p in points if p["way"] == way]
        samples = [p["samples"] for p in own]
        time.plot(samples, [p["seconds"] for p in own], "o-", color=COLOURS[way], label=way)
        if all(p["peak"] is not None for p in own):
            peaks = [p["peak"] / (1 << 20) for p in own]
            memory.plot(samples, peaks, "o-", color=COLOURS[way], label=way)
    per = data["growth"]["loop over samples"].get("seconds_per_sample")
    sizes = sorted({p["samples"] for p in points})
    if per is not None:
        time.plot(sizes, [per * n for n in sizes], "--", color=COLOURS["loop over samples"],
                  label="loop over samples (extrapolated)")  # fmt: skip
    results = [4 * 3 * 224 * n / (1 << 20) for n in sizes]
    memory.plot(sizes, results, ":", color="black", label="the result, on disk")
    time.set(xlabel="samples", ylabel="seconds", xscale="log", yscale="log", title="time")
    memory.set(xlabel="samples", ylabel="MiB", xscale="log", title="peak memory beside the data")
    memory.set_ylim(bottom=0)
    for axes in (time, memory):
        axes.legend(frameon=False, fontsize=8)
        plain(axes)
    figure.tight_layout()
    save(figure, path)
