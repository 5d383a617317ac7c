"""Synthetic signals of which it is known where the information lies.

A signal has 224 features. Three classes leave a mark: class ``c`` has a short wave packet in
its own window, and the class changes nothing anywhere else. A fourth kind, ``BLANK``, has no
packet at all. Everything else is shared by all and says nothing about the class: a slow drift,
noise, and two tall peaks of random height outside the windows, there to be mistaken for
importance by whoever looks at size or variance.

Why blanks: a softmax sees only differences of scores, so with three classes alone a score may
just as well fall with its rivals' packets as rise with its own, and there is no truth per
class. Trained with the score of a blank fixed at zero, ``score[c]`` estimates
``log p(c | x) / p(blank | x)``, which depends on the window of ``c`` and on no other.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LENGTH = 224
CLASSES = ("A", "B", "C")
BLANK = 3
"""The label of a signal that belongs to no class."""

WINDOWS = ((24, 52), (92, 116), (156, 188))
"""Half-open feature ranges, one per class, outside which the class changes nothing."""

PEAKS = ((64, 84), (196, 216))
"""Half-open feature ranges of the shared peaks, the same for every class."""

JITTER = 1
"""The packet moves by up to this many features either way, and stays inside its window."""

PERIOD = 10
"""Features from one crest of a packet to the next."""

NOISE = 0.7
"""Standard deviation of the noise, where a packet's crests are between 0.5 and 1.3 high."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Signals:
    """Signals ``x [N, 1, 224]`` and their classes ``labels [N]``."""

    x: Tensor
    labels: Tensor


def truth() -> Array:
    """Return the boolean mask ``[3, 224]``: true where the class itself shows in a feature.

    >>> truth().sum(axis=1)
    array([28, 24, 32])
    """
    mask = np.zeros((len(WINDOWS), LENGTH), dtype=bool)
    for row, (start, stop) in zip(mask, WINDOWS, strict=True):
        row[start:stop] = True
    return mask


def make_signals(n: int, *, seed: int, blanks: float = 0.0) -> Signals:
    """Draw `n` signals, a share `blanks` of them blank and the three classes equally likely.

    The same arguments give the same signals.

    >>> make_signals(4, seed=0).x.shape
    torch.Size([4, 1, 224])
    """
    rng = np.random.default_rng(seed)
    labels = rng.choice(BLANK + 1, size=n, p=[(1 - blanks) / BLANK] * BLANK + [blanks])
    x = _drift(rng, n) + rng.normal(0.0, NOISE, size=(n, LENGTH))
    for start, stop in PEAKS:
        x[:, start:stop] += rng.uniform(0.0, 4.0, size=(n, 1)) * np.hanning(stop - start)
    height = rng.uniform(0.5, 1.3, size=(n, 1))
    x += height * packets()[rng.integers(0, 2 * JITTER + 1, size=n), labels]
    return Signals(torch.from_numpy(x[:, None].astype(np.float32)), torch.from_numpy(labels))


def packets() -> Array:
    """Return the packets of height one, ``[2 * JITTER + 1 places, 4 classes, 224]``; blank is 0.

    >>> packets().shape
    (3, 4, 224)
    """
    shapes = np.zeros((2 * JITTER + 1, BLANK + 1, LENGTH))
    for label, (start, stop) in enumerate(WINDOWS):
        wave = _packet(stop - start - 2 * JITTER)
        for place, row in enumerate(shapes[:, label]):
            row[start + place : start + place + len(wave)] = wave
    return shapes


def _drift(rng: np.random.Generator, n: int) -> Array:
    """One slow sine per signal ``[n, 224]``: at most two and a half periods, any phase."""
    periods, phase = rng.uniform(0.5, 2.5, (n, 1)), rng.uniform(0.0, 2 * np.pi, (n, 1))
    angle = 2 * np.pi * periods * np.arange(LENGTH) / LENGTH + phase
    return np.asarray(rng.uniform(0.2, 1.0, (n, 1)) * np.sin(angle))


def _packet(length: int) -> Array:
    """A cosine whose first and last four features rise and fall smoothly: ``[length]``."""
    place = np.arange(length) + 0.5
    edge = np.minimum(np.minimum(place, length - place) / 4, 1.0)
    wave = np.cos(2 * np.pi * (place - length / 2) / PERIOD)
    return np.asarray(np.sin(np.pi / 2 * edge) ** 2 * wave)
