"""Norms, Grams, traces and spectra of an operator, and its forms in other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac.errors import (
    InputError,
    UnsupportedError,
)
from tests.common import N, batch, close, mlp, wide

pytestmark = pytest.mark.usefixtures("float64")


def square() -> nn.Sequential:
    """As many outputs as inputs."""
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4))


@pytest.mark.parametrize(("i", "o"), [(3, 6), (6, 3)])
def test_norms_and_grams(i: int, o: int) -> None:
    f, x = wide(i, o), batch(i)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    close(a.norm(), j.flatten(1).norm(dim=1))
    close(a.norm(squared=True), j.square().sum((1, 2)))
    close(a.gram(), j @ j.mT)
    close(a.gram(of="inputs"), j.mT @ j)
    close(a.T.gram(), j.mT @ j)
    close(a.matrix(), j)


def test_diagonal_and_trace() -> None:
    f, x = square(), batch(4)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    close(a.diag(), j.diagonal(dim1=1, dim2=2))
    close(a.trace(), j.diagonal(dim1=1, dim2=2).sum(1))
    with pytest.raises(InputError, match="one block is 4 x 3"):
        batchjac.operator(mlp(), batch()).trace()


def test_leading_singular_values_of_a_small_block() -> None:
    f, x = square(), batch(4)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    found = a.svd(2)
    close(found.S, torch.linalg.svdvals(j)[:, :2])
    close(found.U @ found.S.diag_embed() @ found.Vh, a.svd(4).U[..., :2]
          @ a.svd(4).S[:, :2].diag_embed() @ a.svd(4).Vh[:, :2])  # fmt: skip


def test_leading_singular_values_of_a_large_block_by_products() -> None:
    """Halko, Martinsson and Tropp: with decay, the leading part to far below the gap."""
    q1, q2 = (torch.linalg.qr(torch.randn(60, 60))[0] for _ in range(2))
    s = 0.6 ** torch.arange(60)
    weight = q1 @ s.diag() @ q2

    def f(x: Tensor) -> Tensor:
        return x @ weight.T

    a = batchjac.operator(f, batch(60))
    generator = torch.Generator().manual_seed(0)
    found = a.svd(5, generator=generator)
    close(found.S, s[:5].expand(N, 5))
    close(found.U.mT @ found.U, torch.eye(5).expand(N, 5, 5))
    close(a @ found.Vh.mT, found.U * found.S[:, None])
    assert torch.equal(a.svd(5, generator=generator.manual_seed(0)).S, found.S)


def test_the_estimate_of_the_norm_has_its_mean_and_variance() -> None:
    """Hutchinson, 1990, proposition 1: variance ``2 sum_{o != p} (J Jᵀ)[o,p]²`` of one vector."""
    f, x = mlp(), batch()
    generator = torch.Generator().manual_seed(1)
    for wrt in (None, "parameters"):
        a = batchjac.operator(f, x, wrt=wrt)
        gram = a.gram()
        variance = 2 * (gram - gram.diagonal(dim1=1, dim2=2).diag_embed()).square().sum((1, 2))
        check_estimates(
            lambda a=a: a.norm(samples=1, squared=True, generator=generator),
            a.norm(squared=True), variance,
        )  # fmt: skip
        first = a.norm(samples=3, generator=generator.manual_seed(2))
        assert torch.equal(first, a.norm(samples=3, generator=generator.manual_seed(2)))


def test_the_estimate_of_the_trace_has_its_mean_and_variance() -> None:
    f, x = square(), batch(4)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    s = (j + j.mT) / 2
    off = s - s.diagonal(dim1=1, dim2=2).diag_embed()
    generator = torch.Generator().manual_seed(1)
    check_estimates(
        lambda: a.trace(samples=1, generator=generator), a.trace(), 2 * off.square().sum((1, 2))
    )


def check_estimates(draw: Any, exact: Tensor, variance: Tensor, count: int = 1000) -> None:
    """Mean and variance of many draws, each to five of its own standard errors."""
    drawn = torch.stack([draw() for _ in range(count)])
    mean, found = drawn.mean(0), drawn.var(0)
    fourth = (drawn - mean).pow(4).mean(0)
    assert ((mean - exact).abs() <= 5 * (variance / count).sqrt() + 1e-12).all()
    assert ((found - variance).abs() <= 5 * ((fourth - found**2) / count).sqrt() + 1e-9).all()
    assert (found > 0).all()


def test_as_a_scipy_operator() -> None:
    f, x = square(), batch(4)
    for wrt in (None, "parameters"):
        a = batchjac.operator(f, x, wrt=wrt)
        matrix = a.matrix()
        whole = torch.block_diag(*matrix) if wrt is None else matrix.flatten(0, 1)
        s, dense = a.to_scipy(), whole.numpy()
        assert s.shape == dense.shape
        assert s.dtype == np.float64
        v, u = np.random.randn(s.shape[1], 3), np.random.randn(s.shape[0], 2)
        np.testing.assert_allclose(s @ v, dense @ v, atol=1e-12)
        np.testing.assert_allclose(s.T @ u, dense.T @ u, atol=1e-12)
        np.testing.assert_allclose(s @ v[:, 0], dense @ v[:, 0], atol=1e-12)
        np.testing.assert_allclose(s.rmatvec(u[:, 0]), dense.T @ u[:, 0], atol=1e-12)


def test_scipy_solves_with_it() -> None:
    from scipy.sparse.linalg import lsmr

    f, x = nn.Sequential(nn.Linear(4, 4)), batch(4)
    a, u = batchjac.operator(f, x), batch(4)
    found = lsmr(a.to_scipy(), u.flatten().numpy(), atol=1e-13, btol=1e-13)[0]
    close(a @ torch.as_tensor(found).reshape(N, 4), u)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_bsr])
def test_as_a_sparse_matrix(layout: torch.layout) -> None:
    a = batchjac.operator(mlp(), batch())
    found = a.to_sparse(layout)
    assert found.layout == layout
    close(found.to_dense(), torch.block_diag(*a.matrix()))
    with pytest.raises(InputError, match="sparse_coo"):
        a.to_sparse(torch.sparse_csr)
    with pytest.raises(UnsupportedError, match="shared"):
        batchjac.operator(mlp(), batch(), wrt="parameters").to_sparse()
