"""``linalg.trace`` and ``linalg.logdet``: means and variances against what they estimate.

Statements about means hold with z = 5 standard errors: a right estimator fails one of them with
probability 6e-7. Seeds are fixed; what is wrong by more than the errors printed here fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import batchjac
from batchjac import linalg
from batchjac.errors import LinAlgError, UnsupportedError
from batchjac.linalg import Estimate
from tests.common import batch, close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # forward mode loads scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

Z = 5.0
ROWS, MANY = 8, 4000


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def contraction(norm: float = 0.4) -> Tensor:
    """``I + G`` with ``|G| = norm``, three times."""
    g = torch.randn(3, ROWS, ROWS, generator=generator())
    g = norm * g / torch.linalg.matrix_norm(g, 2, keepdim=True)
    return torch.eye(ROWS) + g


def exact_trace(j: Tensor) -> Tensor:
    return j.diagonal(dim1=1, dim2=2).sum(1)


@dataclass(frozen=True)
class Case:
    """An estimator, its options, and what it estimates."""

    function: Callable[..., Estimate]
    exact: Callable[[Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *what: Any, **options: Any) -> Estimate:
        return self.function(*what, **self.options, **options)


ESTIMATES = {
    "hutchinson": Case(linalg.trace, exact_trace),
    "hutch++": Case(linalg.trace, exact_trace, {"method": "hutch++"}),
    "lanczos": Case(linalg.logdet, torch.logdet),
    "power": Case(linalg.logdet, torch.logdet, {"method": "power"}),
    "power 10": Case(linalg.logdet, torch.logdet, {"method": "power", "steps": 10}),
}


@pytest.mark.parametrize("name", list(ESTIMATES))
def test_the_mean_is_what_is_estimated(name: str) -> None:
    estimate = ESTIMATES[name]
    j = contraction()
    probes = 30 if name == "hutch++" else MANY  # more would span all of J
    times = MANY // probes
    source = generator()
    found = [estimate(j, probes=probes, generator=source) for _ in range(times)]
    value = torch.stack([f.value for f in found]).mean(0)
    error = torch.stack([f.error for f in found]).square().mean(0).sqrt() / times**0.5
    if name == "hutch++":  # all of J is spanned: nothing is left to estimate
        close(value, estimate.exact(j))
        return
    assert (error < 0.05).all()
    assert ((value - estimate.exact(j)).abs() < Z * error).all()


def test_hutch_plus_plus_where_something_is_left() -> None:
    """Fewer vectors than rows, many times over; and better than Hutchinson where J has rank two."""
    j, source = contraction(), generator()
    low = torch.randn(3, ROWS, 2, generator=source) @ torch.randn(3, 2, ROWS, generator=source)
    found = torch.stack(
        [linalg.trace(j, probes=9, method="hutch++", generator=source).value for _ in range(600)]
    )
    error = found.std(0) / 600**0.5
    assert (error > 0).all()
    assert ((found.mean(0) - exact_trace(j)).abs() < Z * error).all()
    close(linalg.trace(low, probes=9, method="hutch++", generator=source).value, exact_trace(low))
    assert (linalg.trace(low, probes=9, generator=source).error > 0.1).all()


def test_the_variance_of_hutchinson_is_as_stated() -> None:
    """The variance of the mean of 4 vectors, over 4000 means; and what each says of itself.

    The relative standard error of a variance from M values is ``sqrt((k - 1) / M)``, k their
    kurtosis, which is below 7 here: 5 % at most, so five of them are 25 %.
    """
    j = contraction(3.0)
    symmetric = (j + j.mT) / 2
    diagonal = symmetric.diagonal(dim1=1, dim2=2)
    stated = 2 * (symmetric.square().sum((1, 2)) - diagonal.square().sum(1)) / 4
    a = j.repeat(MANY, 1, 1)  # samples have their own vectors
    value, error = linalg.trace(a, probes=4, generator=generator())
    between = value.view(MANY, 3).var(0)
    assert ((between / stated - 1).abs() < 0.25).all()
    own = error.view(MANY, 3).square().mean(0)
    assert ((own / stated - 1).abs() < 0.25).all()
    kurtosis = ((value.view(MANY, 3) - value.view(MANY, 3).mean(0)) ** 4).mean(0) / between**2
    assert (kurtosis < 7).all()


@pytest.mark.parametrize("name", ["lanczos", "power", "power 10"])
def test_the_error_stated_is_the_spread_found(name: str) -> None:
    """As above; the random number of terms is shared by samples, so here calls are repeated."""
    estimate = ESTIMATES[name]
    j, source = contraction().repeat(20, 1, 1), generator()
    found = [estimate(j, probes=8, generator=source) for _ in range(100)]
    values = torch.stack([f.value for f in found]).view(100 * 20, 3)
    own = torch.stack([f.error for f in found]).square().view(100 * 20, 3).mean(0)
    assert ((own / values.var(0) - 1).abs() < 0.35).all()


def test_a_truncated_series_is_as_wrong_as_stated() -> None:
    """With all signs, the trace of every power is exact: only the bias is left."""
    norm, terms = 0.6, 4
    g = norm * torch.eye(ROWS).expand(2, -1, -1)
    value, error = linalg.logdet(torch.eye(ROWS) + g, method="power", steps=terms, probes=2)
    close(error, torch.zeros(2))
    bias = (value - torch.logdet(torch.eye(ROWS) + g)).abs()
    bound = ROWS * norm ** (terms + 1) / ((terms + 1) * (1 - norm))
    assert (bias < bound).all()
    assert (bias > bound / 10).all()


def test_a_random_number_of_terms_has_no_bias() -> None:
    """Here vectors agree, so that the number of terms alone makes the spread."""
    j = 1.6 * torch.eye(ROWS)[None]
    value, error = linalg.logdet(j, method="power", probes=MANY, generator=generator())
    assert 0 < float(error) < 0.1
    assert float((value - torch.logdet(j)).abs()) < Z * float(error)


def test_lanczos_with_few_steps_comes_nearer() -> None:
    """Its bias for one vector, beside n steps, falls as fast as stated."""
    j = contraction(0.5)
    k = float(linalg.condition(j).max())
    whole = linalg.logdet(j, steps=ROWS, generator=generator()).value
    rate = ((k - 1) / (k + 1)) ** 2
    for steps in (1, 2, 3, 4):
        off = (linalg.logdet(j, steps=steps, generator=generator()).value - whole).abs().max()
        assert float(off) < 4 * ROWS * rate**steps


@pytest.mark.parametrize("j", [3 * torch.eye(4), torch.diag(torch.tensor([2.0, 2, 5, 5]))])
def test_lanczos_where_the_space_closes_early(j: Tensor) -> None:
    j = j.double().expand(2, -1, -1)
    value, error = linalg.logdet(j, probes=3)
    close(value, torch.logdet(j))
    close(error, torch.zeros(2))


@pytest.mark.parametrize("name", ["hutchinson", "power", "power 10"])
def test_derivatives_of_estimates(name: str) -> None:
    estimate = ESTIMATES[name]
    j = contraction()[:1, :4, :4]

    def f(j: Tensor) -> Tensor:
        return estimate(j, generator=generator(), probes=3).value

    assert gradcheck(f, (j.requires_grad_(),))
    if name != "hutchinson":  # which is linear
        assert gradgradcheck(f, (j,))


@pytest.mark.parametrize("name", ["hutch++", "lanczos"])
def test_the_mean_of_gradients_is_the_gradient(name: str) -> None:
    """Which is the identity, and ``J^-T``."""
    estimate = ESTIMATES[name]
    times, source = 3000, generator()
    j = contraction()[:1].repeat(times, 1, 1).requires_grad_()
    probes = 6 if name == "hutch++" else 2
    found = torch.autograd.grad(estimate(j, probes=probes, generator=source).value.sum(), j)[0]
    one = j[:1].detach().requires_grad_()
    expected = torch.autograd.grad(estimate.exact(one).sum(), one)[0][0]
    error = found.std(0) / times**0.5
    assert (error < 0.05).all()
    assert ((found.mean(0) - expected).abs() < Z * error + 1e-12).all()


def test_lanczos_refuses_a_second_derivative() -> None:
    j = contraction().requires_grad_()
    total = linalg.logdet(j).value.sum()
    with pytest.raises(UnsupportedError, match="has first derivatives"):
        torch.autograd.grad(total, j, create_graph=True)


class Block(nn.Module):
    """A residual block that is a contraction beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + 0.3 * self.body(x)
        return y


@pytest.mark.parametrize("name", list(ESTIMATES))
def test_from_a_model_as_from_its_jacobian(name: str) -> None:
    estimate = ESTIMATES[name]
    model, x = Block(), batch(6).requires_grad_()
    goals = [x, *model.parameters()]

    def gradients(*what: Any, **options: Any) -> Any:
        found = estimate(*what, probes=6, generator=generator(), **options)
        return tuple(found), torch.autograd.grad(found.value.sum(), goals, materialize_grads=True)

    expected = gradients(batchjac.jacobian(model, x, create_graph=True))
    close(gradients(model, x, create_graph=True), expected)
    assert not estimate(model, x, probes=6).value.requires_grad


def test_a_branch_that_is_no_contraction_is_named() -> None:
    j = contraction(0.5)
    j[1] = 3 * torch.eye(ROWS)
    with pytest.raises(LinAlgError, match=r'"power" needs .*longer for samples 1 \(by') as caught:
        linalg.logdet(j, method="power", steps=5)
    assert caught.value.samples == [1]


def test_a_singular_jacobian_is_named() -> None:
    j = contraction()
    j[2] = 0
    with pytest.raises(LinAlgError, match="the Jacobians of samples 2 are singular"):
        linalg.logdet(j)
