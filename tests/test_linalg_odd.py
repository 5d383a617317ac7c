"""``batchjac.linalg`` with maps, scales and mixtures of samples that are rare and must be right."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import linalg
from batchjac.errors import (
    BatchjacError,
    InputError,
    InputTypeError,
    LinAlgError,
    UnsupportedError,
)
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
    """Every column by its own size.

    To the default tolerance of an iteration in float32, 2e-5, times a small condition number.
    """
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


def twice(x: Tensor) -> Tensor:
    return 2 * x + 0.1 * x.roll(1, 1)


def wider(x: Tensor) -> Tensor:
    return twice(x).double()


X, B = torch.arange(12.0).view(N, 3), torch.ones(N, 3)
A = batchjac.operator(twice, X)
FULL = torch.eye(3).repeat(N, 1, 1)
MATRICES = r"needs the matrices themselves.*pass A\.matrix\(\), \[4, 3, 3\] here"
MIXED = r"by products needs inputs and outputs of one dtype, got torch\.float32 to torch\.float64"
SAID: list[tuple[str, Callable[[], Any], type[BatchjacError], str]] = [
    ("solve of a map", lambda: linalg.solve(A, b=B), InputTypeError,
     rf'linalg\.solve {MATRICES}, or method="gmres" or "cgls"'),
    ("b second", lambda: linalg.solve(A, B), InputTypeError, rf"linalg\.solve {MATRICES}"),
    ("slogdet of a map", lambda: linalg.slogdet(A), InputTypeError,
     rf"linalg\.slogdet {MATRICES}, or linalg\.logdet"),
    *[
        (f"{name} of a map", lambda f=f: f(A), InputTypeError, rf"linalg\.{name} {MATRICES}$")
        for name, f in [
            ("inverse", linalg.inverse), ("pinv", linalg.pinv), ("svdvals", linalg.svdvals),
            ("condition", linalg.condition), ("lstsq", lambda a: linalg.lstsq(a, B)),
        ]
    ],
    ("no b for a map", lambda: linalg.solve(A, method="gmres"), InputTypeError,
     r"linalg\.solve needs a tensor b: solve\(f, inputs, b\) or solve\(A, b\); got NoneType"),
    ("b of more samples", lambda: linalg.solve(FULL, B.repeat(2, 1)), InputError,
     r"linalg\.solve: b is of 8 samples, the Jacobians are of 4; pass one"),
    ("b of more samples by products", lambda: linalg.solve(A, B.repeat(2, 1), method="gmres"),
     InputError, r"linalg\.solve: b is of 8 samples, the Jacobians are of 4; pass one"),
    ("b of more samples of lstsq", lambda: linalg.lstsq(FULL, B.repeat(2, 1)), InputError,
     r"linalg\.lstsq: b is of 8 samples, the Jacobians are of 4; pass one"),
    ("two dtypes in trace", lambda: linalg.trace(wider, X), InputTypeError,
     rf"linalg\.trace {MIXED}"),
    ("two dtypes in solve", lambda: linalg.solve(wider, X, B, method="gmres"), InputTypeError,
     rf"linalg\.solve {MIXED}; convert one of them, as lambda x: f\(x\)\.to\(x\.dtype\)"),
    ("two dtypes of a map", lambda: linalg.logdet(batchjac.operator(wider, X)), InputTypeError,
     rf"linalg\.logdet {MIXED}"),
    ("NaN of NumPy", lambda: linalg.inverse(FULL, regularisation=np.float32("nan")), InputError,
     "regularisation must be zero or positive, and finite, got nan"),
]  # fmt: skip


@pytest.mark.parametrize("case", SAID, ids=lambda c: c[0])
def test_what_is_refused_is_named(
    case: tuple[str, Callable[[], Any], type[BatchjacError], str],
) -> None:
    _, call, error, says = case
    with pytest.raises(error, match=says) as caught:
        call()
    assert caught.type is error


@pytest.mark.parametrize("method", ["gmres", "cgls"])
def test_b_is_the_second_argument_beside_a_map(method: str) -> None:
    torch.testing.assert_close(linalg.solve(A, B, method=method), linalg.solve(A.matrix(), B),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("number", [np.float32(0.5), Fraction(1, 2)])
def test_numbers_of_other_kinds_are_numbers(number: Any) -> None:
    j = torch.diag_embed(torch.tensor([[1.0, 0.25]])).requires_grad_()
    expected = linalg.inverse(j, regularisation=0.5)
    torch.testing.assert_close(linalg.inverse(j, regularisation=number), expected)
    cut = linalg.pinv(j, rtol=number)
    assert isinstance(cut, Tensor)
    assert torch.equal(cut, linalg.pinv(j, rtol=0.5))
    assert cut.requires_grad
