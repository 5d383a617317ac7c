"""A call that must fail, and functions and inputs that make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchjac import jacobian
from batchjac.errors import BatchjacError

N = 4


def linear() -> nn.Module:
    return nn.Linear(3, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def batch() -> Tensor:
    return torch.randn(N, 3)


class Reuses(nn.Module):
    """One layer runs twice, the other never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(3, 3)
        self.never = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twice(self.twice(x))
        return y


class Writes(nn.Module):
    """Scales its weight in every forward, seen by autograd or not."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.layer.weight.data if self.hidden else self.layer.weight
            weight.mul_(0.9)
        y: Tensor = self.layer(x)
        return y


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = mlp()
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y


class BatchLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.turn(x).T
        return y


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.T * 2


@dataclass(frozen=True)
class Bad:
    """A call that must fail: what is wrong, the error and what its message must say."""

    name: str
    f: Callable[[], Any]
    inputs: Callable[[], Any]
    error: type[BatchjacError]
    says: str
    options: dict[str, Any] = field(default_factory=dict)

    def call(self) -> Any:
        options = {k: v() if callable(v) else v for k, v in self.options.items()}
        return jacobian(self.f(), self.inputs(), **options)


def bad(
    name: str,
    error: type[BatchjacError],
    says: str,
    f: Any = linear,
    inputs: Callable[[], Any] = batch,
    **options: Any,
) -> Bad:
    made = f if f in (linear, mlp, Reuses, Heads, BatchLast) else lambda: f
    return Bad(name, made, inputs, error, says, options)


def read_only() -> np.ndarray:
    array = np.empty((N, 2, 3), np.float32)
    array.flags.writeable = False
    return array


def under_inference() -> Tensor:
    with torch.inference_mode():
        return torch.empty(N, 2, 3)


def masked(x: Tensor) -> Tensor:
    found: Tensor = torch.masked.masked_tensor(x, x > 0)
    return found


def own_list(x: Tensor) -> list[Any]:
    found: list[Any] = [x]
    found.append({"again": found})
    return found


def levels(x: Any) -> Any:
    for _ in range(5000):
        x = [x]
    return x


def two_sizes(x: Tensor) -> dict[str, Any]:
    return {"large": x, "small": [x, x[:, :2]]}


def longs(*values: int) -> Callable[[], Tensor]:
    return lambda: torch.tensor(values)
