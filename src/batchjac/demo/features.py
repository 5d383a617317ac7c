"""Planted signals: a 1-D CNN, and which features matter for each class, against the truth."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import batchjac
from batchjac.demo import plots
from batchjac.demo.extras import load
from batchjac.demo.importance import Agreement, Array, agreement
from batchjac.demo.loops import Comparison, compare, functional_per_sample
from batchjac.demo.models import SignalNet, WithBlank
from batchjac.demo.signals import (
    BLANK,
    CLASSES,
    LENGTH,
    PEAKS,
    WINDOWS,
    Signals,
    make_signals,
    packets,
    truth,
)
from batchjac.demo.training import accuracy, fit

BATCH = 1000


@dataclass(frozen=True)
class SignalsResult:
    """What the signals part of the demo found; `seconds` is the time of the Jacobians alone."""

    shape: tuple[int, ...]
    seconds: float
    comparison: Comparison
    accuracy: float
    train_samples: int
    test_samples: int
    by_class: dict[str, Agreement]
    by_variance: dict[str, Agreement]
    """The same for the variance of each feature over the signals, which needs no network."""
    files: tuple[str, ...]


def run_signals(out: Path, *, train: int, n: int, epochs: int, compared: int) -> SignalsResult:
    """Train on `train` signals, differentiate `n` others into a file, compare with the truth."""
    model = trained(train, epochs)
    signals = make_signals(n, seed=2)
    path = out / "signals_jacobian.npy"

    start = time.perf_counter()
    jacobian = jacobians_in_file(model, signals, path)
    seconds = time.perf_counter() - start

    mean, size = profiles(jacobian)
    true = truth()
    saved = {"signals_mean.npy": mean, "signals_mean_abs.npy": size, "signals_truth.npy": true}
    for name, array in saved.items():
        np.save(out / name, array, allow_pickle=False)
    plots.save(plots.signal_importance(panel(signals, mean, size)), out / "signals.png")
    variance = signals.x[:, 0].var(0).numpy()
    return SignalsResult(
        shape=jacobian.shape,
        seconds=seconds,
        comparison=compare(
            functional_per_sample,
            "functional.jacobian, one sample at a time",
            model,
            signals.x,
            torch.from_numpy(jacobian[:compared]),
            samples=compared,
        ),
        accuracy=accuracy(model, signals.x, signals.labels),
        train_samples=train,
        test_samples=n,
        by_class={c: agreement(size[o], true[o]) for o, c in enumerate(CLASSES)},
        by_variance={c: agreement(variance, true[o]) for o, c in enumerate(CLASSES)},
        files=("signals.png", path.name, *saved),
    )


def trained(n: int, epochs: int) -> nn.Module:
    """Return a `SignalNet` fitted to `n` signals, a quarter of them blank, with noise added."""
    signals = make_signals(n, seed=1, blanks=0.25)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SignalNet()
    fit(
        WithBlank(model),
        signals.x,
        signals.labels,
        epochs=epochs,
        seed=0,
        augment=lambda x, draw: x + 0.5 * torch.randn(x.shape, generator=draw),
    )
    return model.eval()


def jacobians_in_file(model: nn.Module, signals: Signals, path: Path) -> Array:
    """Write ``[N, 3, 1, 224]`` to the file `path`, `BATCH` samples at a time, and return it mapped.

    The result is never in memory as a whole: each part is written where it belongs.
    """
    shape = (len(signals.x), len(CLASSES), 1, LENGTH)
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with load("tqdm").tqdm(total=len(signals.x), desc="signals", unit=" samples") as bar:
        for start in range(0, len(signals.x), BATCH):
            part = slice(start, start + BATCH)
            batchjac.jacobian(model, signals.x[part], out=mapped[part])
            bar.update(len(signals.x[part]))
    mapped.flush()
    return mapped


def profiles(jacobian: Array) -> tuple[Array, Array]:
    """Return the means over samples of J and of |J|, each ``[3, 224]``, from ``[N, 3, 1, 224]``."""
    total, size = np.zeros((2, len(CLASSES), LENGTH))
    for start in range(0, len(jacobian), BATCH):
        part = jacobian[start : start + BATCH, :, 0]
        total += part.sum(axis=0, dtype=np.float64)
        size += np.abs(part).sum(axis=0, dtype=np.float64)
    return total / len(jacobian), size / len(jacobian)


def panel(signals: Signals, mean: Array, size: Array) -> plots.SignalPanel:
    """Put beside the importance what was planted: the first signal of each class and the means."""
    of_class = [signals.x[signals.labels == label, 0].numpy() for label in range(BLANK)]
    return plots.SignalPanel(
        examples=np.stack([rows[0] for rows in of_class]),
        class_means=np.stack([rows.mean(axis=0) for rows in of_class]),
        size=size,
        mean=mean,
        planted=packets().mean(axis=0)[:BLANK],
        windows=WINDOWS,
        peaks=PEAKS,
        names=CLASSES,
    )
