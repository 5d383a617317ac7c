"""Small relatives of the nine benchmark models, in float64, and what tests of modes ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Residual, mlp

F64 = torch.float64
MODES = ("forward", "mixed")


def close(found: Any, right: Any) -> None:
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def small(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    return mlp(*widths, activation=activation)


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip


def cnn1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 3, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, 1, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(),
        Residual(3, 3, 1), Residual(3, 4, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean(1))
        return y


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet5": (lenet, (3, 1, 10, 10)),
    "1-D CNN": (cnn1d, (3, 1, 12)),
    "MLP 784-512-512-10": (small(9, 7, 7, 4), (5, 9)),
    "autoencoder": (small(9, 6, 2, 6, 9), (4, 9)),
    "field network": (small(2, 8, 8, 8, 3, activation=nn.Tanh), (6, 2)),
    "decoder": (small(3, 6, 8, 12), (4, 3)),
    "square block": (small(6, 9, 6, activation=nn.Tanh), (4, 6)),
    "small ResNet": (resnet, (2, 2, 6, 6)),
    "transformer encoder": (Encoder, (3, 5, 8)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = SMALL[name]
    torch.manual_seed(0)
    return build().eval().to(F64), torch.randn(shape, dtype=F64)
