"""Gradients that autograd lays out sparsely: the answer is dense, and equals the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian
from batchjac.engines import reference

F64 = torch.float64
WORDS = torch.tensor([[1, 2], [3, 3], [6, 2], [0, 1]])


class Sparse(torch.autograd.Function):
    """Doubles, with a sparse gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return 2 * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (2 * grads[0]).to_sparse()


class OfTheirOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = Sparse.apply(self.weight)
        return x @ weight


def behind(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh())


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Tensor]] = {
    "embedding": (lambda: nn.Embedding(7, 3, sparse=True), "weight", WORDS),
    "padding": (lambda: behind(nn.Embedding(7, 3, 2, sparse=True)), "0.weight", WORDS),
    "bag": (lambda: nn.EmbeddingBag(7, 3, sparse=True, mode="sum"), "weight", WORDS),
    "bag behind": (
        lambda: behind(nn.EmbeddingBag(7, 3, sparse=True, padding_idx=2)), "0.weight", WORDS,
    ),
    "a dense bag": (lambda: behind(nn.EmbeddingBag(7, 3)), "0.weight", WORDS),
    "a Function": (OfTheirOwn, "weight", torch.randn(4, 3, dtype=F64)),
}  # fmt: skip
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"coupling": "full"}, {"create_graph": True})


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "full", "history"])
@pytest.mark.parametrize("name", MODELS)
def test_sparse_gradients_are_made_dense(
    name: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    make, weight, x = MODELS[name]
    model = make().to(F64)
    with caplog.at_level(logging.WARNING, "batchjac"):
        found = jacobian(model, x, wrt=weight, **options)
        named = jacobian(model, x, wrt="parameters", **options)
    assert found.layout == torch.strided
    torch.testing.assert_close(found, reference.jacobian(model, x, wrt=weight, **options))
    torch.testing.assert_close(named, {weight: found})
    assert not caplog.messages  # no walk failed on the way


def test_a_hook_sees_what_autograd_sends() -> None:
    """A hooked function goes through autograd's own engine, whose gradients are sparse too."""
    model, kinds = nn.Embedding(7, 3, sparse=True).to(F64), []
    expected = jacobian(model, WORDS, wrt="weight")
    model.weight.register_hook(lambda g: kinds.append(g.layout))
    torch.testing.assert_close(jacobian(model, WORDS, wrt="weight"), expected)
    assert set(kinds) == {torch.sparse_coo}


@pytest.mark.parametrize("hooked", [False, True])
def test_gather(hooked: bool) -> None:
    index = torch.tensor([[1, 0], [2, 2], [0, 1], [1, 1]])

    def f(x: Tensor) -> Tensor:
        y = x.gather(1, index[: len(x)], sparse_grad=True)
        if hooked:
            y.register_hook(lambda g: 2 * g)
        return y

    x = torch.randn(4, 3, dtype=F64)
    torch.testing.assert_close(jacobian(f, x), reference.jacobian(f, x))


def test_a_parameter_with_one_entry_for_each_sample(caplog: pytest.LogCaptureFixture) -> None:
    """What has the length of the batch is shared all the same."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 3, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).sin()

    model, x = Scaled(), torch.randn(4, 3, dtype=F64)
    found = jacobian(model, x, wrt="scale")
    torch.testing.assert_close(found, reference.jacobian(model, x, wrt="scale"))
    assert not caplog.messages
