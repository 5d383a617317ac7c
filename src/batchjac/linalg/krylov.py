"""Iterations that need products alone, for all samples and columns at once.

Vectors are ``[N, n, k]``: k systems for each of N samples, every one with its own coefficients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchjac.linalg.products import Products

_RESTART = 20  # vectors kept by GMRES, beside the solution


@dataclass(frozen=True)
class Found:
    """A solution, and its residual ``|J x - b| / |b|`` for every system ``[N, k]``."""

    x: Tensor
    residual: Tensor


Solver = Callable[[Products, Tensor, float, int], Found]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    return found


def _over(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def _measured(a: Products, b: Tensor, x: Tensor) -> Found:
    return Found(x, _over(_norm(b - a.times(x)), _norm(b)).squeeze(1))


def gmres(a: Products, b: Tensor, tolerance: float, most: int) -> Found:
    """The x of least residual in a growing space, begun again after some vectors.

    ``most`` products, two of them for each restart at most.

    Source: Saad and Schultz, GMRES: a generalized minimal residual algorithm for solving
    nonsymmetric linear systems, 1986. Orthogonalised twice by classical Gram-Schmidt: Giraud,
    Langou, Rozložník and van den Eshof, 2005.
    """
    x, r, size = torch.zeros_like(b), b, _norm(b)
    while most > 0:
        step, used = _cycle(a, r, tolerance * size, min(_RESTART, most, b.shape[1]))
        x, before = x + step, _norm(r)
        r = b - a.times(x)
        most -= used + 1
        now = _norm(r)
        if bool(((now <= tolerance * size) | ~(now < before)).all()):
            break  # there, or as near as rounding lets it come
    return Found(x, _over(_norm(r), size).squeeze(1))


def _cycle(a: Products, r: Tensor, enough: Tensor, width: int) -> tuple[Tensor, int]:
    """One turn of GMRES from zero: the step, and the products it took.

    The residual after j vectors is ``|r| / |y|``, where y is the left null vector of the
    Hessenberg matrix with first entry 1, which grows by one entry for each vector.
    """
    n, _, k = r.shape
    size = _norm(r)
    basis = [_over(r, size)]
    h = r.new_zeros(n, k, width + 1, width)
    null = [torch.ones_like(size)]
    for j in range(width):
        stacked = torch.stack(basis)  # [j+1, N, n, k]
        w = a.times(basis[-1])
        for _ in range(2):
            along = (stacked * w).sum(2, keepdim=True)
            w = w - (stacked * along).sum(0)
            h[:, :, : j + 1, j] += along.squeeze(2).permute(1, 2, 0)
        left = _norm(w)
        h[:, :, j + 1, j] = left.squeeze(1)
        basis.append(_over(w, left))
        column = h[:, :, : j + 1, j].permute(2, 0, 1).unsqueeze(2)
        along = (torch.stack(null) * column).sum(0)
        # where nothing is left the space holds the solution
        null.append(torch.where(left == 0, float("inf"), -_over(along, left)))
        square = torch.stack(null).square().sum(0)
        if bool((size / square.sqrt() <= enough).all()):
            break
    used = len(basis) - 1
    y = _least(h[:, :, : used + 1, :used], size.squeeze(1))
    return torch.einsum("jNnk,Nkj->Nnk", torch.stack(basis[:used]), y), used


def _least(h: Tensor, size: Tensor) -> Tensor:
    """The y that brings ``H y`` nearest to ``size e_1``; zero for vectors that are none."""
    q, r = torch.linalg.qr(h)
    right = q[:, :, 0] * size.unsqueeze(2)
    diagonal = r.diagonal(dim1=2, dim2=3).abs()
    none = diagonal <= torch.finfo(h.dtype).eps * diagonal.amax(2, keepdim=True)
    one = torch.diag_embed(none.to(h.dtype))
    r = torch.where(none.unsqueeze(3), one, r)
    right = torch.where(none, 0, right)
    y: Tensor = torch.linalg.solve_triangular(r, right.unsqueeze(3), upper=True)
    return y.squeeze(3)


def cgls(a: Products, b: Tensor, tolerance: float, most: int) -> Found:
    """Conjugate gradients on ``J^T J x = J^T b``, without forming that product.

    It always comes nearer, at a rate that goes with the condition number, where GMRES, whose goes
    with the spread of the eigenvalues, may stand still. ``most`` products of both kinds.

    Source: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952,
    section 10; Björck, Numerical Methods for Least Squares Problems, 1996, section 7.4.
    """
    x, r, size = torch.zeros_like(b), b, _norm(b)
    s = a.times_transposed(r)
    p, gamma = s, _dot(s, s)
    for _ in range(0, most, 2):
        q = a.times(p)
        going = _norm(r) > tolerance * size
        if not bool(going.any()):
            break
        alpha = torch.where(going, _over(gamma, _dot(q, q)), 0)
        x, r = x + alpha * p, r - alpha * q
        s = a.times_transposed(r)
        before, gamma = gamma, _dot(s, s)
        p = s + _over(gamma, before) * p
    return _measured(a, b, x)


SOLVERS: dict[str, Solver] = {"gmres": gmres, "cgls": cgls}
