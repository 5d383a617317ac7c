"""Chunks that are computed again in the backward pass, beside one history held whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, value_and_jacobian
from batchjac.errors import BudgetError
from batchjac.problem import Problem, pose
from batchjac.recompute import recomputed
from tests.common import batch, close, mlp

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # compiling and forward mode load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def asked(f: Any, x: Any, **options: Any) -> Problem:
    usual = {
        "wrt": None, "of": None, "outputs": None, "mode": "auto", "coupling": "error",
        "create_graph": True, "batched": True,
    }  # fmt: skip
    return pose(f, x, **(usual | options))


def again(f: Any, x: Any, samples: int = 2, **options: Any) -> Tensor:
    """The Jacobian in chunks that are computed again."""
    (j,) = recomputed(
        asked(f, x, **options), lambda solution, _: [solution.jacobian], None, fixed=samples
    )
    return j


def gradients(j: Tensor, goals: Sequence[Tensor]) -> list[Tensor | None]:
    loss = j.square().sum() + j.flatten(1).prod(1).sum()
    return list(torch.autograd.grad(loss, goals, create_graph=True, allow_unused=True))


def same_gradients(ours: Tensor, theirs: Tensor, goals: Sequence[Tensor]) -> None:
    """Equal, first gradients and second."""
    close(ours.detach(), theirs.detach())
    first = [gradients(j, goals) for j in (ours, theirs)]
    close(*first)
    second = [
        torch.autograd.grad(
            sum(g.square().sum() for g in found if g is not None), goals, allow_unused=True,
            retain_graph=True,
        )
        for found in first
    ]  # fmt: skip
    close(*second)


class Product(torch.autograd.Function):
    """Reads a tensor past torch's own functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return cotangents[0] @ w.T, x.T @ cotangents[0]


def captured(kind: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A function and what it captured, among it a tensor that was computed before."""
    model, leaf = mlp(), torch.randn(3, 3, requires_grad=True)
    made = 2 * leaf
    functions = {
        "module": model,
        "closure": lambda x: model(x @ made) * leaf.sum(),
        "custom": lambda x: model(Product.apply(x, made).sin() + leaf[0]),
    }
    return functions[kind], [leaf, *model.parameters()]


@pytest.mark.parametrize("source", ["leaf", "result", "constant"])
@pytest.mark.parametrize("kind", ["module", "closure", "custom"])
def test_gradients_and_second_gradients(kind: str, source: str) -> None:
    f, goals = captured(kind)
    before = nn.Linear(2, 3)
    leaf = batch().requires_grad_()
    x = {"leaf": leaf, "result": before(batch(2)), "constant": batch()}[source]
    goals += [leaf, *before.parameters()]
    same_gradients(again(f, x), jacobian(f, x, create_graph=True), goals)


def test_a_budget_that_does_not_hold_the_history() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), torch.randn(64, 16)
    whole = value_and_jacobian(model, x, create_graph=True)
    chunked = value_and_jacobian(model, x, create_graph=True, max_memory="1MiB")
    assert chunked[1].grad_fn.name() == "_RecomputedBackward"
    assert chunked[0].grad_fn is chunked[1].grad_fn
    close(chunked, whole)
    goals = list(model.parameters())
    found = [
        torch.autograd.grad(j.square().sum() + y.pow(3).sum(), goals) for y, j in (chunked, whole)
    ]
    close(*found)
    with pytest.raises(BudgetError, match="of one sample"):
        jacobian(model, x, create_graph=True, max_memory="100KiB")
