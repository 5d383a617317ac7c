"""Condition numbers in the 1-norm: exact where there is an inverse, else estimated from below."""

from collections.abc import Callable

import torch
from torch import Tensor

from batchjac.linalg.checks import limit
from batchjac.linalg.factor import Damped, Factors, damped

# A glance may fall short of a condition number by this factor.
# Source: tests/test_linalg_accuracy.py, where it is never short by 100 on 10,000 matrices.
_MISSED = 1e3

Solve = Callable[[Tensor], Tensor]  # columns [n, i, k] to [n, i, k]


def norm(a: Tensor) -> Tensor:
    """The 1-norm of each matrix, ``[n]``: the largest sum of a column, without a history."""
    return a.detach().abs().sum(1).amax(1)


def of_factors(j: Tensor, factors: Factors) -> Tensor:
    """The condition number of J: a glance with one solution, an estimate where that is large."""
    seen = glance(j, factors)
    at = (~(seen * _MISSED < limit(j.dtype))).nonzero().flatten()  # a NaN is no small number
    if len(at) == 0:
        return seen
    if len(at) == len(j):
        return estimated(j, factors)
    some = Factors(factors.lu[at], factors.pivots[at], factors.zero[at])
    return seen.index_copy(0, at, estimated(j.detach()[at], some))


def glance(j: Tensor, factors: Factors) -> Tensor:
    """A lower bound on the condition number of J, from one solution with three vectors.

    It misses a large one only where all three are nearly orthogonal to the same singular vector.
    """
    rows = j.shape[2]
    at = torch.arange(rows, dtype=j.dtype, device=j.device)
    start = torch.stack([torch.ones_like(at), _alternating(at), (1 + at * at).sin()], 1)
    found = factors.solve(start.expand(len(j), -1, -1)).abs().sum(1) / start.abs().sum(0)
    bound = norm(j) * found.amax(1)
    return torch.where(factors.zero, float("inf"), bound)


def estimated(j: Tensor, factors: Factors) -> Tensor:
    """The condition number of J, with three solutions."""
    found = norm(j) * inverse_norm(
        factors.solve, lambda b: factors.solve(b, transposed=True), j.detach()
    )
    return torch.where(factors.zero, float("inf"), found)


def of_damped(factors: Damped) -> Tensor:
    """The condition number of R, estimated as above."""
    r = factors.r.detach()
    return norm(r) * inverse_norm(
        lambda b: torch.linalg.solve_triangular(r, b, upper=True),
        lambda b: torch.linalg.solve_triangular(r.mT, b, upper=False),
        r,
    )


def inverse_norm(solve: Solve, transposed: Solve, like: Tensor) -> Tensor:
    """A lower bound on the 1-norm of the inverse, seldom less than a third of it.

    The norm is convex, so its largest value over columns of norm one is at a unit vector. From the
    mean of them one step along the gradient leads to a better one. A vector of alternating signs
    guards against cancellation.

    Source: Hager, Condition estimates, 1984; Higham, FORTRAN codes for estimating the one-norm of
    a real or complex matrix, 1988, algorithm 4.1, of which this takes the first step.
    """
    rows = like.shape[2]
    at = torch.arange(rows, dtype=like.dtype, device=like.device)
    start = torch.stack([torch.full_like(at, 1 / rows), _alternating(at)], 1)
    first = solve(start.expand(len(like), -1, -1))
    sums = first.abs().sum(1)
    best = torch.maximum(sums[:, 0], 2 / (3 * rows) * sums[:, 1])
    signs = torch.where(first[:, :, :1] < 0, -1.0, 1.0).to(like.dtype)
    steepest = transposed(signs).abs().argmax(1, keepdim=True)
    unit = torch.zeros_like(like[:, :, :1]).scatter_(1, steepest, 1)
    return torch.maximum(best, solve(unit).abs().sum((1, 2)))


def _alternating(at: Tensor) -> Tensor:
    return (1 - 2 * (at % 2)) * (1 + at / max(1, len(at) - 1))


def damped_solution(j: Tensor, b: Tensor, regularisation: float) -> tuple[list[Tensor], Tensor]:
    """``(J^T J + lambda I)^-1 J^T b``, and the condition number of what it was solved with."""
    factors = damped(j, regularisation)
    return [factors.solve(b)], of_damped(factors)


def damped_inverse(j: Tensor, regularisation: float) -> tuple[list[Tensor], Tensor]:
    """The same for all columns of the identity."""
    one = torch.eye(j.shape[1], dtype=j.dtype, device=j.device).expand(len(j), -1, -1)
    return damped_solution(j, one, regularisation)
