"""A product by a kernel without a derivative of its own, with a history."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, kernels
from batchjac.engines import reference
from batchjac.product import recorded

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own


def multiply(g: Tensor, w: Tensor) -> Tensor:
    """A stand-in for a kernel that autograd knows nothing of."""
    return (g.detach() @ w.detach().t()).clone()


def test_first_and_second_derivatives() -> None:
    g, w = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    assert torch.autograd.gradcheck(lambda a, b: recorded(multiply, a, b), (g, w))
    assert torch.autograd.gradgradcheck(lambda a, b: recorded(multiply, a, b), (g, w))


def test_only_what_is_wanted_is_computed() -> None:
    calls: list[tuple[int, ...]] = []

    def counted(g: Tensor, w: Tensor) -> Tensor:
        calls.append((*g.shape, *w.shape))
        return multiply(g, w)

    g, w = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    recorded(counted, g, w).sum().backward()
    assert calls == [(4, 3, 5, 3), (5, 4, 3, 4)], "the product, and that toward w alone"
    calls.clear()
    with torch.no_grad():
        assert not recorded(counted, g, w).requires_grad
    assert calls == [(4, 3, 5, 3)]


def test_a_large_product_with_a_history_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []

    def kernel(g: Tensor, w: Tensor) -> Tensor:
        taken.append(g)
        return multiply(g, w)

    monkeypatch.setattr(kernels, "LARGE", 0)
    monkeypatch.setattr(kernels, "fastest", lambda: kernel)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    x = torch.randn(5, 3, requires_grad=True)

    def second(j: Tensor) -> list[Tensor]:
        goals = [x, *model.parameters()]
        first = torch.autograd.grad(j.pow(3).sum(), x, create_graph=True)[0]
        return list(torch.autograd.grad(first.square().sum(), goals, allow_unused=True))

    ours = second(jacobian(model, x, create_graph=True))
    assert taken
    theirs = second(reference.jacobian(model, x, create_graph=True))
    for found, expected in zip(ours, theirs, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_jacobian_of_a_jacobian_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE", 0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(5, 3)
    hessian = jacobian(lambda x: jacobian(model, x, create_graph=True), x)
    exact = torch.func.vmap(torch.func.hessian(model))(x)
    torch.testing.assert_close(hessian, exact, rtol=1e-4, atol=1e-5)
