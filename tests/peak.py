"""Peak memory of calls, each in a process of its own: ``python -m tests.peak conv 64 128``.

Each warms up on two samples, unless it is a cold one, and measures how far the memory of its
process rises above where it then stands.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchjac
from tests.resident import Watched, level, main, status
from tests.routes import one_row_at_a_time


class Encoder(nn.Module):
    def __init__(self, d: int, hidden: int, layers: int = 1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, 4, hidden, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Tokens(nn.Module):
    """From tokens to classes: integers of eight bytes become thousands of numbers each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.encoder = Encoder(64, 128, 2)
        self.head = nn.Linear(64, 5)

    def forward(self, i: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(self.embedding(i)).mean(1))
        return y


class NoRules(nn.Module):
    """Operations that few have a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 512)
        self.last = nn.Linear(512, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.special.erfcx(torch.special.i0e(self.first(x)).cumsum(1) * 0.01)
        y: Tensor = self.last(h)
        return y


class Part(nn.Linear):
    """Two of many outputs, as a view."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :2]


def mlp(*widths: int, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(1024, 10),
    ).eval()  # fmt: skip


def small_conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What is asked and of what; ``closure`` hides the module from the library."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    closure: bool = False
    mapped: tuple[int, ...] | None = None  # the result goes to a memory-mapped file
    cold: bool = False  # nothing ran before in this process
    singly: bool = False  # rows go one at a time through autograd's engine
    trained: bool = False  # a backward pass through the result belongs to the call

    def function(self) -> Callable[..., Any]:
        model = self.model()
        return (lambda x: model(x)) if self.closure else model


class Cells(nn.Module):
    """Many small nodes, of which some wait long for what meets them: a step reads an old state."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.cell, self.steps, self.width = nn.Linear(width, width), steps, width

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for k in range(self.steps):
            states.append(torch.tanh(self.cell(states[-1]) * states[k // 2].sigmoid()))
        return torch.stack(states, 1).sum(1)[:, :6]


class Hand(nn.Module):
    """A recurrence written by hand: the rows of each step of the input wait for all the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(1 + width, width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.cell.out_features)
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], 1)))
        y: Tensor = self.head(h)
        return y


def images(n: int, channels: int, width: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(n, channels, width, width)


CALLS = {
    "conv": Call(conv, images(32, 3, 64)),
    "conv behind a function": Call(conv, images(24, 3, 64), closure=True),
    "a recurrence by hand": Call(lambda: Hand(127), lambda: torch.randn(256, 256, 1)),
    "many outputs": Call(lambda: mlp(64, 512, 512, 200), lambda: torch.randn(200, 64)),
    "many outputs at the first call": Call(
        lambda: mlp(64, 512, 512, 200), lambda: torch.randn(200, 64), cold=True
    ),
    "decoder": Call(lambda: mlp(16, 256, 512, 1024), lambda: torch.randn(32, 16)),
    "transformer": Call(lambda: Encoder(32, 64), lambda: torch.randn(50, 12, 32)),
    "a deep forward": Call(
        lambda: nn.Sequential(Encoder(32, 128, 8), nn.Flatten(), nn.Linear(1024, 1)),
        lambda: torch.randn(150, 32, 32),
    ),
    "tokens": Call(Tokens, lambda: torch.randint(0, 100, (150, 32)), {"wrt": "embedding"}),
    "parameters": Call(small_conv, images(80, 1, 28), {"wrt": "parameters"}),
    "parameters and samples coupled": Call(
        lambda: mlp(32, 48, 4, norm=True), lambda: torch.randn(64, 32),
        {"wrt": "parameters", "coupling": "full"},
    ),
    "with a history": Call(
        lambda: mlp(64, 128, 128, 20), lambda: torch.randn(400, 64), {"create_graph": True}
    ),
    "trained": Call(
        lambda: nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)),
        lambda: torch.randn(1500, 64), trained=True,
    ),
    "conv, trained": Call(conv, images(300, 3, 16), trained=True),
    "transformer, trained": Call(
        lambda: Encoder(32, 64, 2), lambda: torch.randn(200, 12, 32), {"outputs": [0, 1]},
        trained=True,
    ),
    "a small part of a large value": Call(
        lambda: Part(16, 20_000), lambda: torch.randn(1500, 16)
    ),
    "one output of a large value": Call(
        lambda: nn.Linear(16, 20_000), lambda: torch.randn(1500, 16), {"outputs": [0]}
    ),
    "without rules": Call(NoRules, lambda: torch.randn(300, 256)),
    "forward": Call(
        lambda: mlp(16, 256, 512, 1024), lambda: torch.randn(150, 16), {"mode": "forward"}
    ),
    "mixed": Call(
        lambda: mlp(300, 256, 16, 256, 300), lambda: torch.randn(60, 300), {"mode": "mixed"}
    ),
    "mixed past wide cuts": Call(
        lambda: mlp(64, 512, 512, 64), lambda: torch.randn(800, 64), {"mode": "mixed"}
    ),
    "mixed towards wide": Call(
        lambda: mlp(2000, 64, 8, 256, 256), lambda: torch.randn(10, 2000), {"mode": "mixed"}
    ),
    "conv, one row at a time": Call(conv, images(32, 3, 64), singly=True),
    "transformer, one row at a time": Call(
        lambda: Encoder(32, 64), lambda: torch.randn(50, 12, 32), singly=True
    ),
    "tokens, one row at a time": Call(
        Tokens, lambda: torch.randint(0, 100, (150, 32)), {"wrt": "embedding"}, singly=True
    ),
    "many small nodes, one row at a time": Call(
        lambda: Cells(128, 100), lambda: torch.randn(2000, 128), singly=True
    ),
    "mapped": Call(lenet, images(2000, 1, 32), mapped=(2000, 10, 1, 32, 32)),
}  # fmt: skip


def measure(name: str, budget: int) -> dict[str, Any]:
    """Bytes above the level after a warm-up, if there is one, and bytes of the result."""
    torch.manual_seed(0)
    call = CALLS[name]
    if call.singly:
        one_row_at_a_time(pytest.MonkeyPatch())
    f, x = call.function(), call.inputs()
    if call.cold:
        before = level("RssAnon")
        with Watched() as watched:
            j = batchjac.jacobian(f, x, max_memory=budget, **call.options)
        return {"peak": watched.peak - before, "result": j.nbytes}
    batchjac.jacobian(f, x[:2], **call.options)
    if call.trained:
        train(f, x[:32], 24 << 20, call.options)
        before = level()
        result = train(f, x, budget, call.options)
        return {"peak": status("VmHWM") - before, "result": result}
    if call.mapped is not None:
        with tempfile.NamedTemporaryFile() as file:
            out = np.memmap(file.name, np.float32, "w+", shape=call.mapped)
            before = level("RssAnon")
            with Watched() as watched:
                batchjac.jacobian(f, x, max_memory=budget, out=out, **call.options)
            few = batchjac.jacobian(f, x[-3:], **call.options).numpy()
            np.testing.assert_allclose(out[-3:], few, rtol=1e-4, atol=1e-6)
            return {"peak": watched.peak - before, "result": out.nbytes}
    before = level()
    j = batchjac.jacobian(f, x, max_memory=budget, **call.options)
    parts = j.values() if isinstance(j, dict) else [j]
    return {"peak": status("VmHWM") - before, "result": sum(p.nbytes for p in parts)}


def train(f: Callable[..., Any], x: Tensor, budget: int, options: dict[str, Any]) -> int:
    """A step of the Jacobian and its gradient, which the caller makes; bytes of both."""
    j = batchjac.jacobian(f, x, max_memory=budget, create_graph=True, **options)
    j.backward(torch.ones_like(j))
    return 2 * j.nbytes


if __name__ == "__main__":
    main(measure)
