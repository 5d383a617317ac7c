"""``create_graph=True``: gradients of a loss of the Jacobian, beside nested autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian
from batchjac.engines import reference
from tests.common import N, batch, close, mlp

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # compiling and forward mode load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


# create_graph=


def test_a_loss_of_the_jacobian_trains() -> None:
    model, x = mlp(), batch().requires_grad_()
    goals = [x, *model.parameters()]

    def loss(j: Tensor) -> Tensor:
        return (j.square() * torch.arange(12.0).view(4, 3)).sum() + j.prod(2).sum()

    ours = torch.autograd.grad(
        loss(jacobian(model, x, create_graph=True)), goals, allow_unused=True
    )
    y = model(x)
    rows = [torch.autograd.grad(y[:, o].sum(), x, create_graph=True)[0] for o in range(y.shape[1])]
    theirs = torch.autograd.grad(loss(torch.stack(rows, 1)), goals, allow_unused=True)
    for found, expected in zip(ours, theirs, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            close(found, expected)


@pytest.mark.parametrize("wrt", ["2", "0.weight", ["inputs", "2.bias", "1"], "parameters"])
@pytest.mark.parametrize("outputs", [None, [2, 0], "argmax"])
def test_a_history_for_layers_and_parameters(wrt: Any, outputs: Any) -> None:
    model, x = mlp(), batch().requires_grad_()
    options = {"wrt": wrt, "outputs": outputs, "create_graph": True}

    def gradients(j: Any) -> Any:
        parts = j.values() if isinstance(j, dict) else [j]
        total = sum(part.square().sum() for part in parts)
        return torch.autograd.grad(
            total, [x, *model.parameters()], allow_unused=True, materialize_grads=True
        )

    close(
        gradients(jacobian(model, x, **options)), gradients(reference.jacobian(model, x, **options))
    )


def test_a_history_goes_on_before_the_input() -> None:
    """The input may itself be a result: gradients flow through it to what made it."""
    first, model, z = nn.Linear(2, 3), mlp(), batch(2)
    j = jacobian(model, first(z), create_graph=True)
    found = torch.autograd.grad(j.square().sum(), first.weight)
    j = reference.jacobian(model, first(z), create_graph=True)
    close(found, torch.autograd.grad(j.square().sum(), first.weight))


def test_a_jacobian_of_a_jacobian() -> None:
    """The Hessian of each output, and a training loop on it."""
    f, x = mlp(), batch()
    hessian = jacobian(lambda x: jacobian(f, x, create_graph=True), x)
    one = torch.func.hessian(lambda s: f(s.unsqueeze(0)).squeeze(0))
    close(hessian, torch.func.vmap(one)(x))


def test_without_a_history_there_is_none() -> None:
    model, x = mlp(), batch().requires_grad_()
    assert not jacobian(model, x).requires_grad
    assert not any(j.requires_grad for j in jacobian(model, x, wrt="parameters").values())


def test_a_linear_model_has_a_history_by_its_weights_only() -> None:
    model, x = nn.Linear(3, 2), batch().requires_grad_()
    j = jacobian(model, x, create_graph=True)
    by_x, by_weight = torch.autograd.grad(
        j.square().sum(), [x, model.weight], allow_unused=True, materialize_grads=True
    )
    close(by_x, torch.zeros(N, 3))
    close(by_weight, 2 * N * model.weight.detach())


class Penalised(torch.autograd.Function):
    """The identity; its backward scales by a Jacobian."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return cotangents[0] * jacobian(ctx.model, x).sum(1), None


def test_in_the_middle_of_a_backward_pass(caplog: pytest.LogCaptureFixture) -> None:
    """A node that is called there knows of the pass, which wants no gradient of it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2))
    x = batch().requires_grad_()
    expected = jacobian(model, x).sum(1)  # and the graph is known from here on
    (found,) = torch.autograd.grad(Penalised.apply(x, model).sum(), x)
    close(found, expected)
    assert not caplog.records
