"""Half precision: autocast and models that hold bfloat16.

Tolerances are two units of the half format's rounding (2**-8 for bfloat16, 2**-11 for float16)
per layer crossed: the sweep may multiply in another order than the row loop, not at another
precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .registry import LAWS, case

GROUP = "precision"
BFLOAT16 = 2.0**-8
# Differences of rounded values say nothing, and another batch size rounds another way.
ROUNDED = LAWS - {"out"}


def small(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3), *extra
    )


@case("float32", group=GROUP, dtype=torch.float32, tolerance=1e-5, without=ROUNDED)
def single_precision() -> Any:
    return small(nn.LogSoftmax(1)), torch.randn(4, 4)


@case("autocast_mlp", group=GROUP, dtype=torch.float32, tolerance=6 * BFLOAT16, without=ROUNDED)
def autocast_mlp() -> Any:
    net = small()

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x)
        return y.float()

    return f, torch.randn(4, 4)


@case("autocast_conv", group=GROUP, dtype=torch.float32, tolerance=6 * BFLOAT16, without=ROUNDED)
def autocast_conv() -> Any:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x).softmax(1)  # softmax goes back to float32 by autocast's own list

    return f, torch.randn(3, 1, 6, 6)


@case(
    "autocast_attention", group=GROUP, dtype=torch.float32, tolerance=8 * BFLOAT16, without=ROUNDED
)
def autocast_attention() -> Any:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x).mean(1).float()

    return f, torch.randn(3, 3, 4)


@case("autocast_by_the_caller", group=GROUP, dtype=torch.float32, tolerance=6 * BFLOAT16,
      without=ROUNDED, around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))  # fmt: skip
def autocast_by_the_caller() -> Any:
    net = small()
    return lambda x: net(x).float(), torch.randn(4, 4)


@case(
    "bfloat16_throughout",
    group=GROUP,
    dtype=torch.bfloat16,
    tolerance=6 * BFLOAT16,
    without=ROUNDED,
)
def bfloat16_throughout() -> Any:
    return small(), torch.randn(4, 4)


@case("float16_throughout", group=GROUP, dtype=torch.float16, tolerance=2.0**-8, without=ROUNDED)
def float16_throughout() -> Any:
    return small(), torch.randn(4, 4)


@case("float64_with_a_float32_core", group=GROUP, tolerance=1e-5, without=ROUNDED)
def float64_with_a_float32_core() -> Any:
    """Casts inside: the cotangent changes its dtype on the way, as many published models do."""
    first, core = nn.Linear(4, 6), nn.Linear(6, 3).float()
    return lambda x: core(first(x).float()).softmax(1).double(), torch.randn(4, 4)


@case(
    "float32_with_a_float64_core", group=GROUP, dtype=torch.float32, tolerance=1e-5, without=ROUNDED
)
def float32_with_a_float64_core() -> Any:
    first = nn.Linear(4, 3)
    return lambda x: first(x).double().exp().float() * first(x), torch.randn(4, 4)
