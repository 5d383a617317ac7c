"""Pooling of every kind, where no two values tie; ties live in ``kinks``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import NOISY, case

GROUP = "pooling"


@case("max_pool_overlapping_dilated", group=GROUP)
def max_pool_overlapping_dilated() -> Any:
    model = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.MaxPool1d(2, 2, dilation=2, ceil_mode=True))
    return nn.Sequential(nn.Conv1d(1, 2, 3), model), torch.randn(3, 1, 11)


@case("max_pool_2d_3d", group=GROUP)
def max_pool_2d_3d() -> Any:
    flat, solid = nn.MaxPool2d((2, 3), (1, 2), (1, 1)), nn.MaxPool3d((1, 2, 2), ceil_mode=True)
    return lambda x: solid(flat(x).tanh().unsqueeze(1)).flatten(1), torch.randn(3, 2, 4, 5)


@case("average_pool_padding", group=GROUP)
def average_pool_padding() -> Any:
    model = nn.Sequential(
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Tanh(),
        nn.AvgPool2d(2, 1, divisor_override=3), nn.Flatten(2), nn.AvgPool1d(2, 1, 1),
    )  # fmt: skip
    return model, torch.randn(2, 2, 5, 6)


@case("adaptive_average_pool", group=GROUP)
def adaptive_average_pool() -> Any:
    model = nn.Sequential(
        nn.AdaptiveAvgPool3d((2, 3, 2)), nn.Tanh(), nn.Flatten(2, 3), nn.AdaptiveAvgPool2d((4, 1)),
        nn.Flatten(2), nn.Tanh(), nn.AdaptiveAvgPool1d(3),
    )  # fmt: skip
    return model, torch.randn(2, 2, 3, 4, 5)


@case("adaptive_max_pool", group=GROUP)
def adaptive_max_pool() -> Any:
    model = nn.Sequential(
        nn.AdaptiveMaxPool3d((2, 3, 2)), nn.Flatten(2, 3), nn.AdaptiveMaxPool2d((4, 2)),
        nn.Flatten(2), nn.AdaptiveMaxPool1d(3),
    )  # fmt: skip
    return model, torch.randn(2, 2, 3, 4, 5)


@case("lp_pool", group=GROUP)
def lp_pool() -> Any:
    model = nn.Sequential(nn.Sigmoid(), nn.LPPool2d(2, 2), nn.Flatten(2), nn.LPPool1d(3, 2, 1))
    return model, torch.randn(2, 2, 4, 4)


# The regions are drawn at every call.
@case("fractional_max_pool", group=GROUP, without=NOISY)
def fractional_max_pool() -> Any:
    return nn.FractionalMaxPool2d(2, output_ratio=0.6), torch.randn(3, 2, 6, 6)


@case("max_unpool", group=GROUP)
def max_unpool() -> Any:
    """SegNet: the places of the maxima come back as integers and steer the way up."""

    def f(x: Tensor) -> Tensor:
        small, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(small.tanh(), places, 2)

    return f, torch.randn(2, 2, 4, 4)


class SpatialPyramid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.adaptive_max_pool2d(x, k).flatten(1) for k in (1, 2)], dim=1)


@case("spatial_pyramid", group=GROUP)
def spatial_pyramid() -> Any:
    return nn.Sequential(nn.Conv2d(1, 2, 2), SpatialPyramid()), torch.randn(3, 1, 6, 6)


@case("generalised_mean_pool", group=GROUP)
def generalised_mean_pool() -> Any:
    power = nn.Parameter(torch.tensor(2.5))

    def f(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.clamp(min=1e-6).pow(power), 2).pow(1 / power).flatten(1)

    return f, torch.rand(3, 2, 4, 4) + 0.1


@case("soft_arg_max", group=GROUP)
def soft_arg_max() -> Any:
    def f(x: Tensor) -> Tensor:
        line = torch.arange(4, dtype=x.dtype)
        heat = torch.softmax(x.flatten(2), dim=2).view_as(x)
        return torch.cat([(heat.sum(2) * line).sum(2), (heat.sum(3) * line).sum(2)], dim=1)

    return f, torch.randn(3, 2, 4, 4)


@case("top_k_features", group=GROUP)
def top_k_features() -> Any:
    def f(x: Tensor) -> Tensor:
        best = x.topk(3, dim=1)
        spread = x.quantile(torch.tensor([0.2, 0.5], dtype=x.dtype), dim=1).mT
        return torch.cat([best.values * best.indices, x.kthvalue(2, 1, True).values, spread], 1)

    return f, torch.randn(4, 6)
