"""``batchjac.linalg``: what it is, its derivatives to second order, its axes and its chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import batchjac
from batchjac import linalg
from batchjac.linalg.triangular import pays
from tests.common import batch, close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # forward mode loads scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

LAMBDA = 0.3


def right(rows: int, columns: int = 2) -> Tensor:
    return torch.linspace(-1, 1, 3 * rows * columns).reshape(3, rows, columns).sin()


# what each function is, of square, wide, tall and rank-deficient matrices

SQUARE: dict[str, Callable[..., Any]] = {
    "inverse": linalg.inverse,
    "solve": lambda j: linalg.solve(j, right(j.shape[1])),
    "slogdet": lambda j: linalg.slogdet(j).logabsdet,
    "slogdet regularised": lambda j: linalg.slogdet(j, regularisation=LAMBDA).logabsdet,
}
ANY: dict[str, Callable[..., Any]] = {
    "inverse regularised": lambda j: linalg.inverse(j, regularisation=LAMBDA),
    "pinv": linalg.pinv,
    "pinv regularised": lambda j: linalg.pinv(j, regularisation=LAMBDA),
    "solve regularised": lambda j: linalg.solve(j, right(j.shape[1]), regularisation=LAMBDA),
    "lstsq": lambda j: linalg.lstsq(j, right(j.shape[1])),
    "lstsq regularised": lambda j: linalg.lstsq(j, right(j.shape[1]), regularisation=LAMBDA),
    "svdvals": linalg.svdvals,
    "condition": linalg.condition,
}
SHAPES = {"square": (3, 3), "wide": (2, 4), "tall": (4, 2), "one": (1, 1)}


def matrices(rows: int, columns: int) -> Tensor:
    return torch.randn(3, rows, columns) + torch.eye(rows, columns)


CASES = [(name, shape) for name in SQUARE for shape in ("square", "one")]
CASES += [(name, shape) for name in ANY for shape in SHAPES]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_derivatives_of_given_jacobians(name: str, shape: str) -> None:
    f = {**SQUARE, **ANY}[name]
    j = matrices(*SHAPES[shape]).requires_grad_()
    assert gradcheck(f, (j,))
    assert gradgradcheck(f, (j,))


@pytest.mark.parametrize("solve", [linalg.solve, linalg.lstsq])
def test_derivatives_by_the_right_side(solve: Callable[..., Tensor]) -> None:
    j, b = matrices(3, 3).requires_grad_(), right(3).requires_grad_()
    assert gradcheck(solve, (j, b))
    assert gradgradcheck(solve, (j, b))


@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
@pytest.mark.parametrize("name", ["pinv", "lstsq"])
def test_derivatives_at_constant_rank(name: str, shape: str) -> None:
    """Of products of two factors, whose rank stays one whatever the factors are."""
    rows, columns = SHAPES[shape]
    left, over = torch.randn(3, rows, 1), torch.randn(3, 1, columns)

    def f(a: Tensor, b: Tensor) -> Any:
        return ANY[name](a @ b)

    assert gradcheck(f, (left.requires_grad_(), over.requires_grad_()))
    assert gradgradcheck(f, (left, over))


def large(count: int = 40, rows: int = 64) -> Tensor:
    """So many that the inverse goes by blocks."""
    return torch.randn(count, rows, rows) + 20 * torch.eye(rows)


def test_derivatives_of_an_inverse_by_blocks() -> None:
    """Beside torch's own, of which every derivative is a sum of products with the inverse."""
    assert pays(large())
    j, weight = large().requires_grad_(), torch.randn(40, 64, 64)

    def twice(x: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad((x * weight).sum(), j, create_graph=True)
        (second,) = torch.autograd.grad((first * weight).sin().sum(), j)
        return x, first, second

    close(twice(linalg.inverse(j)), twice(torch.linalg.inv(j)))
    found = twice(linalg.slogdet(j).logabsdet[:, None, None])
    close(found, twice(torch.linalg.slogdet(j).logabsdet[:, None, None]))


@pytest.mark.parametrize("regularisation", [0.3, 1e-6])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_regularisation_is_what_it_says(shape: str, regularisation: float) -> None:
    j = matrices(*SHAPES[shape])
    one = torch.eye(j.shape[2])
    gram = j.mT @ j + regularisation * one
    expected = torch.linalg.solve(gram, j.mT)
    tight: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9}  # the product squares the condition
    for f in (linalg.inverse, linalg.pinv):
        torch.testing.assert_close(f(j, regularisation=regularisation), expected, **tight)
    b = right(j.shape[1])
    for g in (linalg.solve, linalg.lstsq):
        torch.testing.assert_close(g(j, b, regularisation=regularisation), expected @ b, **tight)
    if j.shape[1] == j.shape[2]:
        sign, log = linalg.slogdet(j, regularisation=regularisation)
        torch.testing.assert_close(log, torch.logdet(gram) / 2, **tight)
        assert torch.equal(sign, torch.linalg.slogdet(j).sign)


# from a model


class Square(nn.Module):
    """``[N, 2, 3]`` to ``[N, 3, 2]``, every output of every input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x.flatten(1)
        y = y + self.body(y)
        return y.unflatten(1, (3, 2))


MODEL: dict[str, Callable[..., Any]] = {
    "inverse": lambda f, x, **o: linalg.inverse(f, x, **o),
    "pinv": lambda f, x, **o: linalg.pinv(f, x, **o),
    "solve": lambda f, x, **o: linalg.solve(f, x, x.mT.sin(), **o),
    "slogdet": lambda f, x, **o: linalg.slogdet(f, x, **o).logabsdet,
    "svdvals": lambda f, x, **o: linalg.svdvals(f, x, **o),
    "condition": lambda f, x, **o: linalg.condition(f, x, **o),
    "lstsq": lambda f, x, **o: linalg.lstsq(f, x, x.mT.sin(), **o),
}
SHAPED = {
    "inverse": (5, 2, 3, 3, 2), "pinv": (5, 2, 3, 3, 2), "solve": (5, 2, 3), "slogdet": (5,),
    "svdvals": (5, 6), "condition": (5,), "lstsq": (5, 2, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODEL))
def test_from_a_model_as_from_its_jacobian(name: str) -> None:
    """The same answer, shaped back, and the same gradients, whole or in chunks computed again."""
    model, x = Square(), batch(2, 3).requires_grad_()
    j = batchjac.jacobian(model, x, create_graph=True)
    f = MODEL[name]

    def gradients(y: Tensor) -> Any:
        weight = torch.arange(1.0, y.numel() + 1).view(y.shape).sin()
        goals = [x, *model.parameters()]
        found = torch.autograd.grad(
            (y * weight).sum(), goals, create_graph=True, materialize_grads=True
        )
        total = sum((g.sin().sum() for g in found), torch.zeros(()))
        return found, torch.autograd.grad(total, goals, materialize_grads=True)

    given = {"inverse": linalg.inverse, "pinv": linalg.pinv, "svdvals": linalg.svdvals,
             "condition": linalg.condition}.get(name)  # fmt: skip
    if name in ("solve", "lstsq"):
        expected = getattr(linalg, name)(j, x.mT.sin(), output_axes=2)
    elif given is None:
        expected = linalg.slogdet(j, output_axes=2).logabsdet
    else:
        expected = given(j, output_axes=2)
    y = f(model, x, create_graph=True)
    assert y.shape == SHAPED[name] == expected.shape
    close(y, expected)
    truth = gradients(expected)
    close(gradients(y), truth)
    bounded = f(model, x, create_graph=True, max_memory="64KiB")
    close(bounded, expected)
    close(gradients(bounded), truth)
    assert not f(model, x.detach()).requires_grad
    close(f(model, x.detach(), max_memory="64KiB"), expected.detach())
