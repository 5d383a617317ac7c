"""What stays after a call: no graph, no tensor but the answer, no memory."""

from __future__ import annotations

import gc
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import jacobian, verify
from batchjac.errors import BudgetError
from tests.watch import QUESTIONS

N = 6


class Token:
    """Something that a recorded node holds."""


class Holds(torch.autograd.Function):
    """The identity; its node holds a token for as long as the graph lives."""

    alive: ClassVar[weakref.WeakSet[Token]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        Holds.alive.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Holds.apply(self.layer(Holds.apply(x)))
        return y


@pytest.fixture
def without_gc() -> Iterator[None]:
    """Whatever waits for the cycle collector holds memory that nobody asked for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


GRAPHS = {k: v for k, v in QUESTIONS.items() if k not in ("with a history", "several")} | {
    "a layer": {"wrt": "layer"}, "of a layer": {"of": "layer"}
}  # fmt: skip


@pytest.mark.parametrize("question", GRAPHS)
@pytest.mark.usefixtures("without_gc")
def test_no_graph_stays(question: str) -> None:
    model, x = Holding(), torch.randn(N, 3)
    kept = batchjac.value_and_jacobian(model, x, **GRAPHS[question])
    assert len(Holds.alive) == 0
    del kept


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.usefixtures("without_gc")
def test_nobody_else_holds_the_answer(question: str) -> None:
    options = QUESTIONS[question] if question != "several" else {}
    j = jacobian(nn.Sequential(OrderedDict(first=nn.Linear(3, 2))), torch.randn(N, 3), **options)
    held = [weakref.ref(part) for part in (j.values() if isinstance(j, dict) else [j])]
    del j
    assert [ref() for ref in held] == [None] * len(held)


@pytest.mark.usefixtures("without_gc")
def test_no_graph_stays_after_an_error() -> None:
    class Fails(Holding):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError(str(super().forward(x).shape))

    for model, options in (
        (Fails(), {}),
        (Holding(), {"max_memory": 1}),
        (Holding(), {"outputs": 9}),
    ):
        with pytest.raises((ArithmeticError, BudgetError, IndexError)) as caught:
            jacobian(model, torch.randn(N, 3), **options)
        caught.value.__traceback__ = None  # frames hold what they held
        caught.value.__context__ = caught.value.__cause__ = None
        del caught
        assert len(Holds.alive) == 0


@pytest.mark.usefixtures("without_gc")
def test_a_history_lives_as_long_as_the_jacobian() -> None:
    j = jacobian(Holding(), torch.randn(N, 3), create_graph=True)
    del j
    assert len(Holds.alive) == 0


def live_tensors() -> Counter[tuple[int, ...]]:
    gc.collect()
    return Counter(tuple(o.shape) for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_two_hundred_calls_take_no_more_memory_than_ten() -> None:
    model, x = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 16)), torch.randn(64, 64)

    def calls(count: int) -> None:
        for k in range(count):
            jacobian(model if k % 2 else lambda x: model(x), x)  # a new function every other time
            jacobian(model, x, wrt=["0.bias", "1"], outputs=[k % 16])

    calls(10)
    tensors, trusted, before = live_tensors(), len(verify._trusted), resident()
    calls(200)
    assert live_tensors() == tensors
    assert len(verify._trusted) == trusted
    # the answers of the calls alone take 100 MiB
    assert resident() - before < 16 << 20
