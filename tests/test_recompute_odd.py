"""What is computed again in the backward pass, where functions or callers are not plain."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, value_and_jacobian
from batchjac.errors import UnsupportedError
from tests.common import close

pytestmark = pytest.mark.usefixtures("float64")

N = 200
SMALL = "300KiB"


def net(wide: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(wide, 16), nn.Tanh(), nn.Linear(16, 5))


def alike(f: Any, x: Any, goals: list[Tensor], budget: str = SMALL) -> None:
    """The same gradients as from a history that is held whole."""
    found = [
        torch.autograd.grad(
            jacobian(f, x, create_graph=True, max_memory=allowed).sin().sum(), goals
        )
        for allowed in (budget, None)
    ]
    close(*found)


def test_a_captured_tensor_that_is_told_to_record() -> None:
    model, x, w = net(), torch.randn(N, 6), torch.randn(6, 6, requires_grad=True)
    alike(lambda z: model((z @ w.requires_grad_()).sin()), x, [w])


def test_a_call_within_a_call() -> None:
    inner, x = net(), torch.randn(N, 6)

    def f(z: Tensor) -> Tensor:
        return jacobian(inner, z, create_graph=True, max_memory="150KiB").square().sum(2)

    goals = [p for name, p in inner.named_parameters() if name != "2.bias"]
    alike(f, x, goals, "3MiB")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients(mode: Callable[[], Any]) -> None:
    model, x = net(), torch.randn(N, 6)
    with mode():
        y, j = value_and_jacobian(model, x, create_graph=True, max_memory=SMALL)
    assert y.requires_grad
    assert j.requires_grad
    (j.sum() + y.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


class Double(torch.autograd.Function):
    """Leaves a note in a dict that it is given."""

    @staticmethod
    def forward(ctx: Any, notes: dict[str, Tensor], a: Tensor) -> Tensor:
        notes["n"] = a.sum(1, keepdim=True).detach()
        return a * 2

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        return None, g[0] * 2


def test_a_function_that_writes_into_a_dict() -> None:
    model, x = net(), torch.randn(N, 6)

    def f(z: Tensor) -> Tensor:
        notes: dict[str, Tensor] = {}
        return model(Double.apply(notes, z)) * notes["n"]  # type: ignore[no-untyped-call]

    alike(f, x, list(model.parameters())[:2])


def test_another_thread_goes_on() -> None:
    model, x, w = net(), torch.randn(N, 6, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    turn, done, stop = threading.Event(), threading.Event(), threading.Event()

    def train() -> None:
        while not stop.is_set():
            turn.wait()
            turn.clear()
            Double.apply({}, w).sum().backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                w.add_(0.01)
            done.set()

    def f(z: Tensor) -> Tensor:
        turn.set()
        done.wait()
        done.clear()
        return model(z)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        j = jacobian(f, x, create_graph=True, max_memory=SMALL)
        f(x)  # one more step of the other
        j.sum().backward()
    finally:
        stop.set()
        turn.set()
        thread.join()
    assert x.grad is not None


class Sparse(nn.Module):
    """Reads rows of a table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6, sparse=True)
        self.net = net()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.net(x * self.table(index))


def test_a_sparse_gradient() -> None:
    model, inputs = Sparse(), (torch.randn(N, 6), torch.randint(0, 10, (N,)))

    def gradient(allowed: str | None) -> Tensor:
        j, _ = jacobian(model, inputs, create_graph=True, max_memory=allowed)
        (found,) = torch.autograd.grad(j.sin().sum(), model.table.weight)
        return found.to_dense()

    close(gradient("500KiB"), gradient(None))


def test_a_batch_of_cotangents_is_refused() -> None:
    model, x = net(), torch.randn(N, 6, requires_grad=True)
    j = jacobian(model, x, create_graph=True, max_memory=SMALL)
    with pytest.raises(UnsupportedError, match="one cotangent at a time"):
        torch.autograd.grad(j, x, torch.ones(2, *j.shape), is_grads_batched=True)


def test_samples_with_nan_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = net(), torch.randn(N, 6)
    x[3] = torch.nan
    jacobian(model, x, create_graph=True, max_memory=SMALL).sum().backward()
    assert [r.getMessage() for r in caplog.records if "NaN" in r.getMessage()] == [
        f"inputs: 1 of {N} samples hold NaN, which passes through to their Jacobians"
    ]
