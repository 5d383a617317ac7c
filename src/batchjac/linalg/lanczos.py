"""Quadrature of the log-determinant from a bidiagonal form that each random vector begins."""

from typing import Any

import torch
from torch import Tensor

from batchjac.errors import LinAlgError, UnsupportedError
from batchjac.linalg.products import Products, System


def bidiagonal(found: System, z: Tensor, steps: int) -> Tensor:
    """``n sum_j tau_j^2 log s_j`` for each column of z, ``[N, k]``; differentiable once.

    Golub and Kahan's ``J V = U B`` with first column ``z / |z|`` of V has singular values s_j of B
    as nodes, and tau_j, the first entries of its right singular vectors, as weights.

    The gradient of ``log |det J|`` is ``<J^-T, dJ>``, which random z with ``E z z^T = I`` turn into
    the mean of ``<J^-T z, dJ z>``; from the same form ``J^-T z`` is about ``|z| U B^-T e_1``.
    """
    with torch.no_grad():
        b, u, dead = _form(found.products, z, steps)
        _, s, vh = torch.linalg.svd(b)
        weights = vh[..., 0].square()
        n = z.shape[1]
        value: Tensor = n * (weights * s.log()).sum(2)
        _refuse_singular(value, s)
        if not found.history:
            return value
        first = torch.zeros_like(b[..., :1])
        first[..., 0, 0] = n**0.5
        y = torch.linalg.solve_triangular(b.mT, first, upper=False).squeeze(3)
        w = torch.einsum("jNnk,Nkj->Nnk", u, torch.where(dead, 0, y))
    product = (w * found.products.times(z)).sum(1)
    # torch leaves apply untyped
    once: Tensor = _Once.apply(product)  # type: ignore[no-untyped-call]
    return value + (once - once.detach())


def _form(a: Products, z: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """B ``[N, k, m, m]``, U ``[m, N, n, k]``, and which of its vectors are none, ``[N, k, m]``.

    Orthogonalised against all before, twice. Where a space is closed before ``m`` steps, the rest
    of B is ``|J v|`` of the first vector times an identity, apart from what came before: nothing
    weighs there, and it lies between the singular values, whose spread says if J is singular.
    """
    size = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    v = z / size
    left: list[Tensor] = []
    right: list[Tensor] = []
    alphas: list[Tensor] = []
    betas, dead = [], []
    for _ in range(steps):
        right.append(v)
        p = _outside(a.times(v), left)
        alpha = torch.linalg.vector_norm(p, dim=1, keepdim=True)
        none = torch.linalg.vector_norm(v, dim=1, keepdim=True) == 0
        left.append(torch.where(none, 0, p / torch.where(alpha == 0, 1, alpha)))
        alphas.append(torch.where(none, alphas[0] if alphas else 1, alpha))
        dead.append(none)
        r = _outside(a.times_transposed(left[-1]), right)
        beta = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        beta = torch.where(none, 0, beta)
        betas.append(beta)
        v = torch.where(beta == 0, 0, r / torch.where(beta == 0, 1, beta))
    b = torch.diag_embed(_last(alphas)) + torch.diag_embed(_last(betas)[..., :-1], offset=1)
    return b, torch.stack(left), _last(dead)


def _outside(w: Tensor, basis: list[Tensor]) -> Tensor:
    """What of w is orthogonal to these vectors."""
    if not basis:
        return w
    stacked = torch.stack(basis)
    for _ in range(2):
        w = w - (stacked * (stacked * w).sum(2, keepdim=True)).sum(0)
    return w


def _last(parts: list[Tensor]) -> Tensor:
    """``[N, 1, k]`` each, as ``[N, k, m]``."""
    return torch.cat(parts, 1).transpose(1, 2)


def _refuse_singular(value: Tensor, s: Tensor) -> None:
    least = torch.finfo(s.dtype).eps * s.amax((1, 2))  # 1/eps on, as Guard has it
    bad = ~value.isfinite().all(1) | (s.amin((1, 2)) <= least)
    if bad.any():
        at = bad.nonzero().flatten()
        smallest = s.amin((1, 2))[at]
        raise LinAlgError(
            f"linalg.logdet: the Jacobians of samples {', '.join(map(str, at[:5].tolist()))}"
            f"{' and others' if len(at) > 5 else ''} are singular, or hold NaN or inf; "
            "linalg.condition says how far they are from it",
            at, smallest,
        )  # fmt: skip


class _Once(torch.autograd.Function):
    """The same number, whose gradient is an estimate that has no derivative itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                'linalg.logdet with method="lanczos" has first derivatives; for second ones use '
                'method="power" or linalg.slogdet'
            )
        return gradients[0]
