"""How well an importance of features agrees with where the information is known to lie."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Agreement:
    """Importance against truth, for one class."""

    share: float
    """Share of all importance that lies on true features."""
    chance: float
    """What `share` would be if all features were equally important."""
    precision: float
    """Share of true features among the k most important, k the number of true ones."""
    auc: float
    """Chance that a true feature ranks above another one: the area under the ROC curve."""


def agreement(importance: Array, true: Array) -> Agreement:
    """Compare ``importance [features]``, not negative, with the boolean mask ``true [features]``.

    >>> agreement(np.array([4.0, 1.0, 3.0, 0.0]), np.array([True, False, True, False]))
    Agreement(share=0.875, chance=0.5, precision=1.0, auc=1.0)
    """
    k = int(true.sum())
    best = np.argsort(-importance, kind="stable")[:k]
    return Agreement(
        share=float(importance[true].sum() / importance.sum()),
        chance=float(true.mean()),
        precision=float(true[best].mean()),
        auc=roc_auc(importance, true),
    )


def roc_auc(score: Array, true: Array) -> float:
    """Return P(score of a true feature > score of another) + P(equal) / 2.

    Source: Mann and Whitney, "On a test of whether one of two random variables is
    stochastically larger than the other", 1947; all pairs, since there are few.

    >>> roc_auc(np.array([2.0, 1.0, 1.0]), np.array([True, True, False]))
    0.75
    """
    above = score[true][:, None] - score[~true][None, :]
    return float(np.mean((above > 0) + 0.5 * (above == 0)))
