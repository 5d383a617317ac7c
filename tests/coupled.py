"""Functions whose samples depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[..., Any]


class BatchAttention(nn.Module):
    """Every sample looks at all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1)  # the batch in the place of time
        y: Tensor = self.head(self.attention(h, h, h, need_weights=False)[0].squeeze(1))
        return y


class Contrast(nn.Module):
    """Similarities to all samples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.encoder(x))
        return torch.log_softmax(z @ z.T / 0.5, 1)


def norm_1d(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, **options), nn.Tanh(), nn.Linear(6, 2))


def norm_2d(**options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3, **options),
        nn.GELU(), nn.Flatten(), nn.Linear(27, 2),
    )  # fmt: skip


def two_norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3),
                         nn.BatchNorm1d(3))  # fmt: skip


class Sequence(nn.Module):
    """Statistics over samples and time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.view(-1, 2, 2)).square()
        return y


NORMS: dict[str, Callable[[], nn.Module]] = {
    "1d": norm_1d,
    "1d without weights": lambda: norm_1d(affine=False),
    "1d without running statistics": lambda: norm_1d(track_running_stats=False).eval(),
    "1d with a cumulative average": lambda: norm_1d(momentum=None),
    "2d": norm_2d,
    "2d without weights": lambda: norm_2d(affine=False),
    "two": two_norms,
    "over time": Sequence,
}
OTHERS: dict[str, Callable[[], Function]] = {
    "mean subtraction": lambda: lambda x: x - x.mean(0),
    "functional": lambda: lambda x: F.batch_norm(x, None, None, training=True),
    "contrast": Contrast,
    "attention over the batch": BatchAttention,
    "softmax over the batch": lambda: lambda x: x.softmax(0),
    "running sum": lambda: lambda x: x.square().cumsum(0),
    "shifted": lambda: lambda x: x * x.roll(1, 0),
    "reversed": lambda: lambda x: x.flip(0).sin(),
    "sorted": lambda: lambda x: x.sort(0).values,
    "largest": lambda: lambda x: x - x.amax(0),
    "distances": lambda: lambda x: torch.cdist(x, x.detach() + x[:1]),
    "without rules": lambda: lambda x: torch.special.i0e(x - torch.special.i0e(x).median(0).values),
}
COUPLED: dict[str, Callable[[], Function]] = NORMS | OTHERS
