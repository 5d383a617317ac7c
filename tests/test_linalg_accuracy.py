"""``batchjac.linalg`` beside SciPy in float64 on 10,000 square matrices of condition 1 to 1e12.

And on 2,000 that are wide or tall, where that is meant.

With n the longer side, k the condition number in the 2-norm and norms of Frobenius, errors are at
most ``C n eps k`` of the answer's size (of 1, for a logarithm), and ``C n eps`` of the largest
singular value for singular values. The constants in the literature are small multiples of n, or of
powers of n that are not seen in practice; here C is 8. The errors found are 0.3 to 5 of these.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002: theorems 9.4 and 7.2
(solutions), section 14.1 (inverses), section 14.6 (determinants), section 20.1 and Wedin's theorem
20.1 (least squares and pseudo-inverses); Golub and Van Loan, Matrix Computations, 4th ed., 2013,
section 8.6.1 (singular values).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from batchjac import linalg
from batchjac.linalg.condition import estimated, glance
from batchjac.linalg.factor import factorised

WORST, C = 1e12, 8.0
# matrices of each size: o x i; those of 32 and 64 rows are inverted by blocks
SIZES = {
    (2, 2): 4000,
    (5, 5): 3200,
    (8, 8): 2500,
    (32, 32): 200,
    (64, 64): 100,
    (3, 6): 1000,
    (7, 4): 1000,
}


def turned(count: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns."""
    normal = torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)
    found: Tensor = torch.linalg.qr(normal)[0]
    return found


@dataclass(frozen=True)
class Batch:
    """Matrices of one size, their condition numbers and a right side."""

    j: Tensor
    condition: Tensor
    b: Tensor

    @property
    def bound(self) -> Tensor:
        """n eps k."""
        return max(self.j.shape[1:]) * torch.finfo(self.j.dtype).eps * self.condition


def batches(worst: float, dtype: torch.dtype, wide: bool) -> list[Batch]:
    """Matrices of all sizes, whose condition numbers are spread evenly over the powers of ten."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for (rows, columns), count in SIZES.items():
        if not wide and rows != columns:
            continue
        least = min(rows, columns)
        condition = worst ** torch.rand(count, generator=generator, dtype=torch.float64)
        spread = torch.rand(count, least, generator=generator, dtype=torch.float64)
        spread[:, 0], spread[:, -1] = 0, 1
        s = condition.unsqueeze(1) ** -spread
        scale = 10 ** (4 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64) - 2)
        u, v = turned(count, rows, least, generator), turned(count, columns, least, generator)
        j = (scale * (u * s.unsqueeze(1)) @ v.mT).to(dtype)
        b = torch.randn(count, rows, generator=generator, dtype=torch.float64).to(dtype)
        found.append(Batch(j, condition, b))
    return found


def by_scipy(f: Callable[..., np.ndarray], *given: Tensor) -> Tensor:
    """One matrix at a time, in float64."""
    arrays = [t.double().numpy() for t in given]
    return torch.from_numpy(np.stack([f(*sample) for sample in zip(*arrays, strict=True)]))


def size(a: Tensor) -> Tensor:
    return a.flatten(1).norm(dim=1)


def relative(found: Tensor, expected: Tensor) -> Tensor:
    return size(found.double() - expected) / size(expected)


def logarithm(a: np.ndarray) -> np.ndarray:
    """From the factors of SciPy: it has no slogdet."""
    lu, pivots = scipy.linalg.lu_factor(a)
    diagonal = np.diag(lu)
    sign = np.prod(np.sign(diagonal)) * (-1) ** np.sum(pivots != np.arange(len(pivots)))
    return np.array([sign, np.log(np.abs(diagonal)).sum()])


def of_inverse(m: Batch) -> Tensor:
    return relative(linalg.inverse(m.j), by_scipy(scipy.linalg.inv, m.j)) / m.bound


def of_solve(m: Batch) -> Tensor:
    return relative(linalg.solve(m.j, m.b), by_scipy(scipy.linalg.solve, m.j, m.b)) / m.bound


def of_slogdet(m: Batch) -> Tensor:
    sign, log = linalg.slogdet(m.j)
    expected = by_scipy(logarithm, m.j)
    sure = m.bound < 0.1  # else the sign is not known
    assert torch.equal(sign[sure].double(), expected[sure, 0])
    return (log.double() - expected[:, 1]).abs() / m.bound


def of_slogdet_with_gradient(m: Batch) -> Tensor:
    j = m.j.clone().requires_grad_()
    gradient = torch.autograd.grad(linalg.slogdet(j).logabsdet.sum(), j)[0]
    return relative(gradient.mT, by_scipy(scipy.linalg.inv, m.j)) / m.bound


def of_pinv(m: Batch) -> Tensor:
    return relative(linalg.pinv(m.j), by_scipy(scipy.linalg.pinv, m.j)) / m.bound


def of_lstsq(m: Batch) -> Tensor:
    """The residual of tall ones counts with the square of the condition number."""
    x = by_scipy(lambda a, b: scipy.linalg.lstsq(a, b)[0], m.j, m.b)
    j, b = m.j.double(), m.b.double()
    left = size(b - (j @ x.unsqueeze(2)).squeeze(2))
    largest = torch.linalg.matrix_norm(j, 2)
    more = 1 + m.condition * left / (largest * size(x))
    return relative(linalg.lstsq(m.j, m.b), x) / (m.bound * more)


def of_svdvals(m: Batch) -> Tensor:
    expected = by_scipy(scipy.linalg.svdvals, m.j)
    off = (linalg.svdvals(m.j).double() - expected).abs().amax(1) / expected[:, 0]
    return off / (m.bound / m.condition)


def of_condition(m: Batch) -> Tensor:
    expected = by_scipy(lambda a: np.divide(*scipy.linalg.svdvals(a)[[0, -1]]), m.j)
    return (linalg.condition(m.j).double() / expected - 1).abs() / m.bound


SQUARE = [of_inverse, of_solve, of_slogdet, of_slogdet_with_gradient]
ANY = [of_pinv, of_lstsq, of_svdvals, of_condition]


def worst_of(ratio: Callable[[Batch], Tensor], worst: float, dtype: torch.dtype) -> float:
    """The largest error in terms of the bound; matrices whose bound says nothing left out."""
    found = [ratio(m)[m.bound < 0.5] for m in batches(worst, dtype, ratio in ANY)]
    assert all(len(r) > 0 for r in found)
    return max(float(r.max()) for r in found)


@pytest.mark.parametrize("ratio", [*SQUARE, *ANY])
def test_in_float64(ratio: Callable[[Batch], Tensor]) -> None:
    found = worst_of(ratio, WORST, torch.float64)
    assert found < C
    assert found > 1e-3, "two results cannot agree so well: one was compared with itself"


@pytest.mark.parametrize("ratio", [*SQUARE, *ANY])
def test_in_float32(ratio: Callable[[Batch], Tensor]) -> None:
    """Against the truth; conditions up to 1e5, beyond which no digit is left."""
    found = worst_of(ratio, 1e5, torch.float32)
    assert found < C
    assert found > 1e-3


def test_there_are_as_many_as_said() -> None:
    assert sum(len(m.j) for m in batches(WORST, torch.float64, False)) == 10_000
    assert sum(len(m.j) for m in batches(WORST, torch.float64, True)) == 12_000


def test_conditions_are_estimated_within_a_factor_of_ten() -> None:
    """What ``solve`` refuses by: a lower bound, in the 1-norm, of what NumPy finds."""
    for m in batches(WORST, torch.float64, False):
        exact = by_scipy(lambda a: np.array(np.linalg.cond(a, 1)), m.j)
        factors = factorised(m.j)
        for found, part in ((estimated(m.j, factors), 0.1), (glance(m.j, factors), 0.01)):
            assert float((found / exact).max()) < 1 + 1e-3
            assert float((found / exact).min()) > part
