"""Handwritten digits: a LeNet5, and what every pixel does to every score."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import batchjac
from batchjac.demo import plots
from batchjac.demo.extras import load
from batchjac.demo.loops import Comparison, compare, einsum_of_functional
from batchjac.demo.models import LeNet5
from batchjac.demo.training import accuracy, fit

SIZE = 32
SHOWN = (0, 3, 5, 8)


@dataclass(frozen=True)
class Digits:
    """All images ``x [N, 1, 32, 32]`` from 0 to 1, their ``labels [N]``, and which are for what."""

    x: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class DigitsResult:
    """What the digits part of the demo found; `seconds` is the time of the Jacobian alone."""

    shape: tuple[int, ...]
    seconds: float
    comparison: Comparison
    accuracy: float
    train_samples: int
    test_samples: int
    files: tuple[str, ...]


def load_digits(n: int | None = None) -> Digits:
    """Load the first `n` (default: all 1,797) of scikit-learn's digits, 8×8 resized to 32×32.

    A quarter of each digit, drawn with a fixed seed, is held out for testing.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998; scikit-learn ships its test part.
    """
    images, labels = load("sklearn.datasets").load_digits(return_X_y=True)
    small = torch.tensor(images[:n] / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    train, test = load("sklearn.model_selection").train_test_split(
        np.arange(len(small)), test_size=0.25, random_state=0, stratify=labels[:n]
    )
    return Digits(
        x=nn.functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear"),
        labels=torch.from_numpy(labels[:n].astype(np.int64)),
        train=torch.from_numpy(np.sort(train)),
        test=torch.from_numpy(np.sort(test)),
    )


def shaken(x: Tensor, draw: torch.Generator) -> Tensor:
    """Return ``x [n, 1, 32, 32]`` moved by up to two pixels and with a little noise."""
    moved = nn.functional.pad(x, (2, 2, 2, 2))
    row, column = torch.randint(0, 5, (2,), generator=draw).tolist()
    moved = moved[:, :, row : row + SIZE, column : column + SIZE]
    return moved + 0.1 * torch.randn(x.shape, generator=draw)


def run_digits(out: Path, *, n: int | None, epochs: int, compared: int) -> DigitsResult:
    """Train, differentiate all digits, compare `compared` of them with the loop, and draw."""
    digits = load_digits(n)
    model = trained(digits, epochs)

    start = time.perf_counter()
    jacobian = batchjac.jacobian(model, digits.x)
    seconds = time.perf_counter() - start

    np.save(out / "digits_jacobian.npy", jacobian.numpy(), allow_pickle=False)
    np.save(out / "digits_labels.npy", digits.labels.numpy(), allow_pickle=False)
    shown = examples(model, digits)
    with torch.no_grad():
        read = model(digits.x[shown]).argmax(1)
    plots.save(
        plots.digit_maps(digits.x[shown], jacobian[shown], digits.labels[shown], read),
        out / "digits.png",
    )
    return DigitsResult(
        shape=tuple(jacobian.shape),
        seconds=seconds,
        comparison=compare(
            einsum_of_functional,
            "functional.jacobian(vectorize=True) and einsum, 12 samples at a time",
            model,
            digits.x,
            jacobian,
            samples=compared,
        ),
        accuracy=accuracy(model, digits.x[digits.test], digits.labels[digits.test]),
        train_samples=len(digits.train),
        test_samples=len(digits.test),
        files=("digits.png", "digits_jacobian.npy", "digits_labels.npy"),
    )


def trained(digits: Digits, epochs: int) -> nn.Module:
    """Return a `LeNet5` fitted to the training part of `digits`, moved about a little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LeNet5(n_classes=10)
    x, labels = digits.x[digits.train], digits.labels[digits.train]
    return fit(model, x, labels, epochs=epochs, seed=0, augment=shaken)


def examples(model: nn.Module, digits: Digits) -> Tensor:
    """Return, for each digit of `SHOWN`, the index of its first held-out image read correctly.

    A digit that is never read correctly is shown by its first held-out image.
    """
    with torch.no_grad():
        right = model(digits.x[digits.test]).argmax(1) == digits.labels[digits.test]
    chosen = []
    for digit in SHOWN:
        of_digit = digits.labels[digits.test] == digit
        candidates = digits.test[of_digit & right]
        chosen.append(candidates[0] if len(candidates) else digits.test[of_digit][0])
    return torch.stack(chosen)
