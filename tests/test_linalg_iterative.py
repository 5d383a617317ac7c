"""``batchjac.linalg.solve`` with products alone: equal to the direct answer, or an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import batchjac
from batchjac import linalg
from batchjac.errors import LinAlgError
from batchjac.linalg.krylov import SOLVERS
from tests.common import batch

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # forward mode loads scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

METHODS = ("gmres", "cgls")


class Residual(nn.Module):
    """``[N, 2, 3]`` to ``[N, 3, 2]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x.flatten(1)
        return (y + 0.5 * self.body(y)).unflatten(1, (3, 2))


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("columns", [(), (3,)])
def test_from_a_model_as_directly(method: str, columns: tuple[int, ...]) -> None:
    """The solution, its gradients by parameters, inputs and right side, and theirs."""
    model, x = Residual(), batch(2, 3).requires_grad_()
    b = batch(3, 2, *columns).requires_grad_()
    goals = [x, b, *model.parameters()]

    def twice(**how: Any) -> list[Any]:
        y = linalg.solve(model, x, b, create_graph=True, **how)
        first = torch.autograd.grad(y.sin().sum(), goals, create_graph=True, materialize_grads=True)
        total = sum((g.sin().sum() for g in first), torch.zeros(()))
        return [y, first, torch.autograd.grad(total, goals, materialize_grads=True)]

    near(twice(method=method, tolerance=1e-12, max_products=200), twice())
    assert not linalg.solve(model, x, b, method=method).requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_given_jacobians(method: str) -> None:
    j = (torch.randn(3, 4, 4) + 4 * torch.eye(4)).requires_grad_()
    b = torch.randn(3, 4, 2).requires_grad_()

    def f(j: Tensor, b: Tensor) -> Tensor:
        return linalg.solve(j, b, method=method, tolerance=1e-14)

    assert gradcheck(f, (j, b))
    assert gradgradcheck(f, (j, b))


@pytest.mark.parametrize("method", METHODS)
def test_a_history_goes_on_before_the_input(method: str) -> None:
    first, model, z, b = nn.Linear(2, 6), Residual(), batch(2), batch(3, 2)

    def gradient(**how: Any) -> tuple[Tensor, ...]:
        x = first(z).unflatten(1, (2, 3))
        y = linalg.solve(model, x, b, create_graph=True, **how)
        return torch.autograd.grad(y.square().sum(), [*first.parameters(), *model.parameters()],
                                   materialize_grads=True)  # fmt: skip

    near(gradient(method=method, tolerance=1e-12, max_products=200), gradient())


@pytest.mark.parametrize("method", METHODS)
def test_what_a_function_captured_has_its_gradient(method: str) -> None:
    weight, b = (torch.randn(3, 3) + 4 * torch.eye(3)).requires_grad_(), batch()

    def gradient(**how: Any) -> tuple[Tensor, ...]:
        y = linalg.solve(lambda x: x @ weight, batch() * 0, b, create_graph=True, **how)
        return torch.autograd.grad(y.square().sum(), weight)

    near(gradient(method=method, tolerance=1e-12, max_products=200), gradient())


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_map_is_taken(method: str) -> None:
    model, x, b = Residual(), batch(2, 3), batch(3, 2)
    a = batchjac.operator(model, x)
    near(linalg.solve(a, b=b, method=method), linalg.solve(model, x, b))


def rotation(degrees: float) -> Tensor:
    """Its eigenvalues lie around zero, where GMRES stands still until the last vector."""
    c, s = torch.tensor(degrees).deg2rad().cos(), torch.tensor(degrees).deg2rad().sin()
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2, 30, 50])
def test_every_size(method: str, rows: int) -> None:
    """Also more rows than vectors are kept; right sides of zero; a column that ends at once."""
    j = torch.randn(4, rows, rows) / rows**0.5 + 3 * torch.eye(rows)
    b = torch.randn(4, rows, 3)
    b[1] = 0
    b[2, :, 0] = 0
    j[3] = 2 * torch.eye(rows)
    near(linalg.solve(j, b, method=method), torch.linalg.solve(j, b))


def test_eigenvalues_around_zero() -> None:
    j = rotation(90.0).expand(2, -1, -1).clone()
    b = torch.randn(2, 2)
    for method in METHODS:
        near(linalg.solve(j, b, method=method), (j.mT @ b.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_that_does_not_arrive_names_its_samples(method: str) -> None:
    j = torch.eye(3).repeat(4, 1, 1)
    j[1, 0, 0] = 0  # and b has a part there
    j[3] = float("nan")
    b = torch.ones(4, 3)
    with pytest.raises(LinAlgError, match=rf"{method} did not reach .*samples 1 \(residual 5\.8e-01"
                       r"\), 3 \(residual inf\).*raise max_products") as caught:  # fmt: skip
        linalg.solve(j, b, method=method)
    assert caught.value.samples == [1, 3]
    found = linalg.solve(j, b, method=method, on_singular="nan")
    assert found.isnan().all(1).tolist() == [False, True, False, True]
    near(found[::2], b[::2])


@dataclass
class Counted:
    """Products with a matrix, counted."""

    j: Tensor
    products: int = 0

    def times(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.j @ v

    def times_transposed(self, u: Tensor) -> Tensor:
        self.products += 1
        return self.j.mT @ u


@pytest.mark.parametrize(("method", "expected"), [("gmres", 4), ("cgls", 9)])
def test_it_stops_when_it_is_there(method: str, expected: int) -> None:
    """Three eigenvalues: three vectors, one product for the residual; two for each of CGLS."""
    a = Counted(torch.diag(torch.tensor([1.0, 2, 4]).repeat(10)).repeat(2, 1, 1))
    found = SOLVERS[method](a, torch.randn(2, 30, 1), 1e-10, 500)
    assert (found.residual < 1e-10).all()
    assert a.products <= expected


def test_too_few_products() -> None:
    j = torch.randn(2, 30, 30) + 10 * torch.eye(30)
    b = torch.randn(2, 30)
    with pytest.raises(LinAlgError, match="within max_products=3 for samples 0"):
        linalg.solve(j, b, method="gmres", max_products=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_without_a_solution_gives_no_gradient(method: str) -> None:
    """And harms no other."""
    j = torch.eye(3).repeat(4, 1, 1)
    j[1, 0, 0] = 0
    j[3] = float("nan")
    b = torch.ones(4, 3)

    def gradient(j: Tensor) -> Tensor:
        j = j.clone().requires_grad_()
        found = linalg.solve(j, b[: len(j)], method=method, on_singular="nan")
        return torch.autograd.grad(found.nansum(1).sum(), j)[0]

    found = gradient(j)
    near(found[::2], gradient(j[::2]))
    assert torch.equal(found[1::2], torch.zeros(2, 3, 3))
