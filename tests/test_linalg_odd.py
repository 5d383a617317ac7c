"""``batchjac.linalg`` with maps, scales and mixtures of samples that are rare and must be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import linalg
from batchjac.errors import LinAlgError, UnsupportedError
from batchjac.linalg.condition import estimated, glance, of_factors
from batchjac.linalg.factor import factorised

N = 4

BY_PRODUCTS: dict[str, Callable[[Any], Any]] = {
    "trace": linalg.trace,
    "logdet": linalg.logdet,
    "solve": lambda a: linalg.solve(a, b=torch.ones(N, 3), method="cgls", on_singular="nan"),
}


@pytest.mark.parametrize("name", list(BY_PRODUCTS))
@pytest.mark.parametrize(
    "made", [lambda a: a, lambda a: a.T, lambda a: a @ a.T, lambda a: (a @ a).T]
)
def test_a_map_that_couples_samples_has_no_matrix_for_each(
    name: str, made: Callable[[Any], Any]
) -> None:
    a = batchjac.operator(nn.BatchNorm1d(3), torch.randn(N, 3), coupling="full")
    with pytest.raises(UnsupportedError, match="samples have no blocks of their own"):
        BY_PRODUCTS[name](made(a))


@pytest.mark.parametrize("method", ["gmres", "cgls"])
@pytest.mark.parametrize("scale", [1e-36, 1e-24, 1e-21, 1.0, 1e24])
def test_an_iteration_is_the_same_for_right_sides_of_every_size(method: str, scale: float) -> None:
    """And so are its gradients, which come from a right side of that size."""
    j = (torch.randn(N, 5, 5) + 5 * torch.eye(5)).requires_grad_()
    b = torch.randn(N, 5, 2)
    b[1], b[2, :, 0], b[3, :, 1] = 0, 0, 1e-30 * b[3, :, 1]
    x = linalg.solve(j, scale * b, method=method)
    expected = linalg.solve(j.double(), (scale * b).double())
    near(x.double() / scale, expected / scale)
    weight = scale * torch.randn(N, 5, 2)  # whose product with x is scale squared
    own = linalg.solve(j, b, method=method)
    found = torch.autograd.grad(own, j, weight)[0]
    truth = torch.autograd.grad(linalg.solve(j.double(), b.double()), j, weight.double())[0]
    near(found.double() / scale, truth.double() / scale)


def near(found: Tensor, expected: Tensor) -> None:
    """To the default tolerance of an iteration in float32, 2e-5, times a small condition number;
    every column by its own size."""
    size = expected.abs().amax(1, keepdim=True)
    assert ((found - expected).abs() <= 5e-4 * size).all()


def rotated(diagonal: Tensor) -> Tensor:
    """``Q diag Q^T``, in which rounding leaves no zero."""
    q = torch.linalg.qr(torch.randn(N, len(diagonal), len(diagonal), dtype=diagonal.dtype))[0]
    return (q * diagonal) @ q.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logdet_of_a_numerically_singular_jacobian_is_refused(dtype: torch.dtype) -> None:
    j = rotated(torch.tensor([1, 2, 3, 4, 5, 6], dtype=dtype))
    j[2] = rotated(torch.tensor([1, 2, 3, 4, 5, 0], dtype=dtype))[0]
    with pytest.raises(LinAlgError, match="the Jacobians of samples 2 are singular") as caught:
        linalg.logdet(j)
    assert caught.value.samples == [2]
    with pytest.raises(LinAlgError) as exact:
        linalg.slogdet(j)
    assert exact.value.samples == [2]


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_logdet_of_a_small_or_large_jacobian_is_not(scale: float) -> None:
    """Also where the space closes early, and what fills it up is of another size than J."""
    j = scale * torch.diag_embed(torch.tensor([[2.0, 2, 2, 2], [2, 2, 5, 5], [1, 2, 3, 4]]))
    value, _ = linalg.logdet(j)
    torch.testing.assert_close(value, j.diagonal(dim1=1, dim2=2).log().sum(1))


def test_only_samples_that_need_an_estimate_have_one() -> None:
    """The others keep the glance; those that have one have that of themselves alone."""
    j = torch.randn(6, 3, 3) + 5 * torch.eye(3)
    j[1], j[4] = torch.diag(torch.tensor([3e-5, 1, 2])), torch.diag(torch.tensor([1, 0, 1.0]))
    factors = factorised(j)
    found, seen = of_factors(j, factors), glance(j, factors)
    estimate = estimated(j, factors)
    need, others = [1, 4], [0, 2, 3, 5]
    torch.testing.assert_close(found[need], estimate[need])
    assert found[4] == float("inf")
    assert torch.equal(found[others], seen[others])
    assert not torch.equal(seen[others], estimate[others])
    few = of_factors(j[others], factorised(j[others]))
    torch.testing.assert_close(few, seen[others])
    every = of_factors(j[need], factorised(j[need]))
    torch.testing.assert_close(every, estimate[need])
