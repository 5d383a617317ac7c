"""What the demo found, in words and as data."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from batchjac.demo.digits import DigitsResult
from batchjac.demo.features import SignalsResult
from batchjac.demo.importance import Agreement
from batchjac.demo.loops import Comparison


def axes_in_words(shape: tuple[int, ...]) -> str:
    """Say what each axis of ``[N, o, *in]`` counts.

    >>> axes_in_words((1797, 10, 1, 32, 32))
    '1797 samples × 10 outputs × 1 × 32 × 32 inputs'
    """
    samples, outputs, *inputs = shape
    return f"{samples} samples × {outputs} outputs × {' × '.join(map(str, inputs))} inputs"


def environment() -> dict[str, Any]:
    """Return what the times depend on, without naming the machine."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def digits_text(result: DigitsResult) -> str:
    """Return the part of the summary on handwritten digits, as Markdown."""
    return "\n".join(
        [
            "## Handwritten digits, LeNet5",
            "",
            f"- Test accuracy: {result.accuracy:.1%} of {result.test_samples} images it has not "
            f"seen, after training on {result.train_samples}.",
            *_measured(result.shape, result.seconds, result.comparison),
            f"- Written: {', '.join(result.files)}.",
        ]
    )


def signals_text(result: SignalsResult) -> str:
    """Return the part of the summary on planted signals, as Markdown."""
    rows = [_row(f"class {name}", found) for name, found in result.by_class.items()]
    rows += [_row(f"class {name}, variance", found) for name, found in result.by_variance.items()]
    return "\n".join(
        [
            "## Planted signals, 1-D CNN",
            "",
            f"- Test accuracy: {result.accuracy:.1%} of {result.test_samples} signals it has not "
            f"seen, after training on {result.train_samples}.",
            *_measured(result.shape, result.seconds, result.comparison),
            f"- Written: {', '.join(result.files)}.",
            "",
            "Mean |J| of each feature against the window in which the class was planted:",
            "",
            "| importance | share inside the window (by chance) | precision@k | ROC AUC |",
            "|---|---|---|---|",
            *rows,
            "",
            "k is the number of features in the window. For comparison, `variance` ranks the "
            "features by their variance over the signals and asks no network.",
        ]
    )


def write(out: Path, digits: DigitsResult, signals: SignalsResult, seconds: float) -> None:
    """Write ``summary.md`` and ``summary.json`` into the folder `out`."""
    facts = environment()
    facts_text = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = "\n\n".join(
        [
            "# batchjac demo",
            f"Two networks, trained here, and all their Jacobians: {seconds:.0f} s in all "
            f"({facts_text}).",
            digits_text(digits),
            signals_text(signals),
        ]
    )
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    data = {
        "seconds": seconds,
        "environment": facts,
        "digits": {**asdict(digits), "axes": axes_in_words(digits.shape)},
        "signals": {**asdict(signals), "axes": axes_in_words(signals.shape)},
    }
    (out / "summary.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _measured(shape: tuple[int, ...], seconds: float, loop: Comparison) -> list[str]:
    return [
        f"- Jacobian: {axes_in_words(shape)}.",
        f"- Time: {seconds:.2f} s for all {shape[0]} samples, measured.",
        f"- The loop of the question ({loop.loop}): {loop.seconds:.2f} s for {loop.samples} "
        f"samples, measured; about {loop.seconds_all:.1f} s for all {shape[0]}, extrapolated.",
        f"- Largest difference from it on those {loop.samples} samples: "
        f"{loop.largest_difference:.1e}, where the largest entry is {loop.largest_entry:.1e}.",
    ]


def _row(name: str, found: Agreement) -> str:
    return (
        f"| {name} | {found.share:.0%} ({found.chance:.0%}) "
        f"| {found.precision:.0%} | {found.auc:.3f} |"
    )
