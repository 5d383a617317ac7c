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
