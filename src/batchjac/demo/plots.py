"""The pictures of the demo: signed, raw, on one scale; zero is white and positive is red."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchjac.demo.extras import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]
CLASS_COLOURS = ("#c44e00", "#1b7f5c", "#5b4bb5")
GREY = "#8a8a8a"
DOTS = 100
"""Dots per inch of every picture."""
TILE = 96
"""Width of a map in dots: three for each of its 32 pixels."""
COOL = ("#053061", "#2166ac", "#67a9cf", "#d1e5f0")
WARM = ("#fddbc7", "#ef8a62", "#b2182b", "#67001f")
BLUE_TO_RED = (*COOL, "#ffffff", *WARM)
"""The colours of ColorBrewer's RdBu, turned round, with pure white in the middle."""


@dataclass(frozen=True)
class SignalPanel:
    """What `signal_importance` draws; every array is ``[3, 224]``, one row for each class."""

    examples: Array
    class_means: Array
    size: Array
    mean: Array
    planted: Array
    windows: Sequence[tuple[int, int]]
    peaks: Sequence[tuple[int, int]]
    names: Sequence[str]


def save(figure: "Figure", path: Path) -> None:
    """Write `figure` as a PNG. A `Figure` made without pyplot is drawn by Agg, in no window."""
    figure.savefig(path, dpi=DOTS, facecolor="white", pil_kwargs={"optimize": True})


def digit_maps(x: Tensor, jacobian: Tensor, labels: Tensor, read: Tensor) -> "Figure":
    """Draw each image of ``x [n, 1, 32, 32]`` beside the map of each class, ``[n, 10, 1, 32, 32]``.

    All maps share one scale, symmetric about zero, that ends at the 99.5th percentile of their
    sizes, so that a few extreme pixels do not bleach the rest; the bar says so by its arrows.
    """
    rows, classes = jacobian.shape[:2]
    limit = float(np.quantile(jacobian.abs().numpy(), 0.995))
    scale = load("matplotlib.colors").Normalize(-limit, limit)
    colours = load("matplotlib.colors").LinearSegmentedColormap.from_list("", BLUE_TO_RED)
    figure, axes, beside = _tiles(rows, classes + 1)
    for n, row in enumerate(axes):
        row[0].imshow(x[n, 0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        row[0].set_ylabel(f"a {int(labels[n])},\nread as {int(read[n])}", fontsize=11)
        for o, axis in enumerate(row[1:]):
            drawn = axis.imshow(
                jacobian[n, o, 0].numpy(), norm=scale, cmap=colours, interpolation="nearest"
            )
            chosen = o == int(read[n])
            axis.spines[:].set(color="black" if chosen else GREY, linewidth=2.5 if chosen else 0.8)
    axes[0][0].set_title("image", fontsize=11)
    for o in range(classes):
        axes[0][o + 1].set_title(f"score of {o}", fontsize=11)
    bar = figure.colorbar(drawn, cax=beside, extend="both")
    bar.set_label("∂ score / ∂ pixel", fontsize=12)
    figure.suptitle(
        "How each pixel moves each class score:  red raises it, blue lowers it  "
        "(framed: the class the network chose)",
        fontsize=13,
        y=0.985,
    )
    return figure


def _tiles(rows: int, columns: int) -> tuple["Figure", list[list["Axes"]], "Axes"]:
    """Lay out square axes and one for a colour bar: ``(figure, axes[row][column], bar)``.

    A square is exactly `TILE` dots wide, three for each pixel of an image of 32: no pixel is
    drawn wider than its neighbour, and the file is half the size.
    """
    left, right, top, gap = 48, 92, 52, 10
    width = left + columns * (TILE + gap) + right
    height = top + rows * (TILE + gap) + 4
    figure: Figure = load("matplotlib.figure").Figure(figsize=(width / DOTS, height / DOTS))

    def place(x: int, y: int, wide: int, high: int) -> "Axes":
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    axes = [
        [place(left + c * (TILE + gap), top + r * (TILE + gap), TILE, TILE) for c in range(columns)]
        for r in range(rows)
    ]
    for axis in (axis for row in axes for axis in row):
        axis.set(xticks=[], yticks=[])
    bar = place(width - right + 6, top, 14, rows * (TILE + gap) - gap)
    return figure, axes, bar


def signal_importance(panel: SignalPanel) -> "Figure":
    """Draw per class an example, the mean ``|J|`` and the mean ``J`` with what was planted.

    The true window of a class is shaded in its colour, the shared peaks in grey.
    """
    figure: Figure = load("matplotlib.figure").Figure(figsize=(14.5, 8.2), layout="constrained")
    axes = figure.subplots(len(panel.names), 3, sharex=True, sharey="col")
    titles = ("the signals", "mean |∂ score / ∂ feature|", "mean ∂ score / ∂ feature, signed")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=13)
    for o, (name, colour) in enumerate(zip(panel.names, CLASS_COLOURS, strict=True)):
        for axis in axes[o]:
            _shade(axis, panel, o)
            axis.tick_params(labelsize=11)
        axes[o, 0].plot(panel.examples[o], color=colour, linewidth=0.8, alpha=0.6)
        axes[o, 0].plot(panel.class_means[o], color="black", linewidth=1.6)
        axes[o, 0].set_ylabel(f"class {name}", fontsize=14, color=colour, fontweight="bold")
        axes[o, 1].plot(panel.size[o], color=colour, linewidth=1.6)
        scale = np.abs(panel.mean[o]).max() / np.abs(panel.planted[o]).max()
        axes[o, 2].plot(panel.mean[o], color=colour, linewidth=1.6)
        axes[o, 2].plot(scale * panel.planted[o], color="black", linewidth=1.1, linestyle=":")
    axes[0, 0].set_xlim(0, panel.mean.shape[1] - 1)
    axes[0, 1].set_ylim(0, 1.08 * panel.size.max())
    for axis in axes[-1]:
        axis.set_xlabel("feature", fontsize=12)
    _explain(figure)
    return figure


def _shade(axis: "Axes", panel: SignalPanel, own: int) -> None:
    """Shade the window of class `own` in its colour and the shared peaks in grey."""
    start, stop = panel.windows[own]
    axis.axvspan(start - 0.5, stop - 0.5, color=CLASS_COLOURS[own], alpha=0.2, linewidth=0)
    for start, stop in panel.peaks:
        axis.axvspan(start - 0.5, stop - 0.5, color=GREY, alpha=0.16, linewidth=0)


def _explain(figure: "Figure") -> None:
    """Put below the axes what shades and lines mean."""
    patch, line = load("matplotlib.patches").Patch, load("matplotlib.lines").Line2D
    figure.legend(
        handles=[
            patch(color=CLASS_COLOURS[0], alpha=0.3, label="the only window this class changes"),
            patch(color=GREY, alpha=0.25, label="tall peaks, the same in every class"),
            line([], [], color=CLASS_COLOURS[0], linewidth=0.8, label="one signal"),
            line([], [], color="black", linewidth=1.6, label="mean signal of the class"),
            line([], [], color="black", linewidth=1.1, linestyle=":", label="planted, scaled"),
        ],
        loc="outside lower center",
        ncols=5,
        fontsize=12,
        frameon=False,
    )
