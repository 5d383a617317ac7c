"""Factors of a batch of matrices, made once, and what is solved with them, differentiable.

Written with J for the matrix, G or g for the gradient that arrives, <A, B> for the sum of A * B.
Derivatives of every order use the same factors: the backward of each function is made of these
functions again.

Source: derivatives of the inverse and the determinant: Giles, Collected matrix derivative results
for forward and reverse mode algorithmic differentiation, 2008, sections 2.2.3 and 2.2.4; of the
pseudo-inverse at constant rank: Golub and Pereyra, The differentiation of pseudo-inverses and
nonlinear least squares problems whose variables separate, 1973, theorem 4.3.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac.linalg.triangular import inverse_from, pays


@dataclass(frozen=True)
class Factors:
    """``J^T = P L U`` of each square Jacobian.

    It is the transpose that is factorised: LAPACK wants columns together in memory, and those of
    the transpose are the rows of J, which are.
    """

    lu: Tensor
    pivots: Tensor
    zero: Tensor  # [n], whether a pivot is exactly zero

    def solve(self, b: Tensor, transposed: bool = False) -> Tensor:
        """``J^-1 b``, or ``J^-T b``, without a history."""
        x: Tensor = torch.linalg.lu_solve(self.lu, self.pivots, b, adjoint=not transposed)
        return x


def factorised(j: Tensor) -> Factors:
    """The factors of J, without a history."""
    lu, pivots, info = torch.linalg.lu_factor_ex(j.detach().mT)
    return Factors(lu, pivots, info > 0)


def _applied(function: type[torch.autograd.Function], *given: Any) -> Tensor:
    found: Tensor = function.apply(*given)
    return found


class _Solve(torch.autograd.Function):
    """``x = J^-1 b``; or ``J^-T b``.

    From ``dx = J^-1 (db - dJ x)``: with ``w = J^-T g``, the gradient by b is w and that by J is
    ``-w x^T``. Transposed: ``w = J^-1 g``, and ``-x w^T``.
    """

    @staticmethod
    def forward(ctx: Any, j: Tensor, b: Tensor, factors: Factors, transposed: bool) -> Tensor:
        x = factors.solve(b, transposed)
        ctx.save_for_backward(j, x)
        ctx.factors, ctx.transposed = factors, transposed
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        j, x = ctx.saved_tensors
        w = solved(j, gradients[0], ctx.factors, not ctx.transposed)
        by_j = None
        if ctx.needs_input_grad[0]:
            by_j = -(x @ w.mT) if ctx.transposed else -(w @ x.mT)
        return by_j, w, None, None


def solved(j: Tensor, b: Tensor, factors: Factors, transposed: bool = False) -> Tensor:
    """``J^-1 b`` for columns b ``[n, o, k]``, from factors of J; or ``J^-T b``."""
    return _applied(_Solve, j, b, factors, transposed)


class _Inverse(torch.autograd.Function):
    """``X = J^-1``, from ``dX = -X dJ X``: the gradient by J is ``-X^T G X^T``."""

    @staticmethod
    def forward(ctx: Any, j: Tensor, factors: Factors | None) -> Tensor:
        if factors is None:
            x: Tensor = torch.linalg.inv_ex(j)[0]
        elif pays(j):
            x = inverse_from(factors.lu.mT, factors.pivots)
        else:
            one = torch.eye(j.shape[1], dtype=j.dtype, device=j.device)
            x = factors.solve(one.expand_as(j))
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return -(x.mT @ (gradients[0] @ x.mT)), None


def inverted(j: Tensor, factors: Factors | None = None) -> Tensor:
    """``J^-1``; with the factors of J if they are there."""
    # solving with the transpose takes two thirds of what torch.linalg.inv does, 64 rows on a CPU
    if factors is None and j.device.type == "cpu":
        factors = factorised(j)
    return _applied(_Inverse, j, factors)


class _LogDet(torch.autograd.Function):
    """``log |det J|``, whose gradient by J is ``g J^-T``, from the same factors."""

    @staticmethod
    def forward(ctx: Any, j: Tensor, found: Tensor, factors: Factors) -> Tensor:
        ctx.save_for_backward(j)
        ctx.factors = factors
        return found.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (j,) = ctx.saved_tensors
        return gradients[0][:, None, None] * inverted(j, ctx.factors).mT, None, None


def logarithm(j: Tensor, found: Tensor, factors: Factors) -> Tensor:
    """The same ``log |det J|`` that was found from these factors, differentiable."""
    return _applied(_LogDet, j, found, factors)


def determinant(factors: Factors) -> tuple[Tensor, Tensor]:
    """The sign of det J, and the logarithm of its size, without a history."""
    diagonal = factors.lu.diagonal(dim1=1, dim2=2)
    at = torch.arange(1, diagonal.shape[1] + 1, device=diagonal.device)
    swaps = (factors.pivots != at).sum(1)
    sign = diagonal.sign().prod(1) * (1 - 2 * (swaps % 2))
    return sign, diagonal.abs().log().sum(1)


@dataclass(frozen=True)
class Singular:
    """``J = U S V^T``, and 1/S with 0 in place of what is cut off."""

    u: Tensor
    inverse: Tensor
    vh: Tensor

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """``J^+ b``, or ``J^+T b``, without a history."""
        if transposed:
            return self.u @ (self.inverse.unsqueeze(2) * (self.vh @ b))
        return self.vh.mT @ (self.inverse.unsqueeze(2) * (self.u.mT @ b))


def decomposed(j: Tensor, rtol: float) -> Singular:
    """The singular value decomposition of J, without a history, cut at ``rtol`` of the largest."""
    u, s, vh = torch.linalg.svd(j.detach(), full_matrices=False)
    kept = s > rtol * s[:, :1]
    return Singular(u, torch.where(kept, 1 / torch.where(kept, s, 1), 0), vh)


class _Least(torch.autograd.Function):
    """``x = J^+ b``; or ``J^+T b``, which is the same of the transpose.

    With P for J^+ and r = b - J x, at constant rank
    ``dx = P db - P dJ x + P P^T dJ^T r + (1 - P J) dJ^T P^T x``.
    So with ``w = P^T g`` the gradient by b is w and that by J is
    ``-w x^T + r (P w)^T + (P^T x)(g - P J g)^T``.
    """

    @staticmethod
    def forward(ctx: Any, j: Tensor, b: Tensor, factors: Singular, transposed: bool) -> Tensor:
        x = factors.solve(b, transposed)
        ctx.save_for_backward(j, b, x)
        ctx.factors, ctx.transposed = factors, transposed
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        j, b, x = ctx.saved_tensors
        g, there, back = gradients[0], ctx.transposed, not ctx.transposed
        w = least(j, g, ctx.factors, back)
        by_j = None
        if ctx.needs_input_grad[0]:
            a = j.mT if there else j
            by_a = (b - a @ x) @ least(j, w, ctx.factors, there).mT - w @ x.mT
            outside = g - least(j, a @ g, ctx.factors, there)
            by_a = by_a + least(j, x, ctx.factors, back) @ outside.mT
            by_j = by_a.mT if there else by_a
        return by_j, w, None, None


def least(j: Tensor, b: Tensor, factors: Singular, transposed: bool = False) -> Tensor:
    """``J^+ b`` for columns b ``[n, o, k]``: of all that come nearest, the x of least norm."""
    return _applied(_Least, j, b, factors, transposed)


@dataclass(frozen=True)
class Damped:
    """``[J; sqrt(lambda) I] = [Q1; Q2] R``, with history; of the transpose where J is wide.

    Then ``J^T J + lambda I = R^T R`` and ``(J^T J + lambda I)^-1 J^T = R^-1 Q1^T``, without the
    squared condition number that the product itself has.

    Source: Björck, Numerical Methods for Least Squares Problems, 1996, section 5.3.1.
    """

    q: Tensor
    r: Tensor
    wide: bool

    def solve(self, b: Tensor) -> Tensor:
        """``(J^T J + lambda I)^-1 J^T b``, which is ``J^T (J J^T + lambda I)^-1 b``."""
        if self.wide:
            x: Tensor = self.q @ torch.linalg.solve_triangular(self.r.mT, b, upper=False)
        else:
            x = torch.linalg.solve_triangular(self.r, self.q.mT @ b, upper=True)
        return x


def damped(j: Tensor, regularisation: float) -> Damped:
    """The factors of the regularised problem."""
    wide = j.shape[1] < j.shape[2]
    a = j.mT if wide else j
    root = regularisation**0.5 * torch.eye(a.shape[2], dtype=j.dtype, device=j.device)
    q, r = torch.linalg.qr(torch.cat([a, root.expand(len(a), -1, -1)], 1))
    return Damped(q[:, : a.shape[1]], r, wide)
