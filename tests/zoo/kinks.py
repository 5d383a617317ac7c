"""Functions asked for their derivative where they have none: PyTorch's choice is the truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import LAWS, NOISY, NOT_ITS_SLOPE, case

GROUP = "kinks and ties"


def steps(n: int, *shape: int) -> Tensor:
    """Values out of {-1, 0, 1}, so that ties and zeros are everywhere."""
    return torch.randint(-1, 2, (n, *shape)).to(torch.get_default_dtype())


@case("rectifiers_at_zero", group=GROUP, without=NOT_ITS_SLOPE)
def rectifiers_at_zero() -> Any:
    def f(x: Tensor) -> Tensor:
        plain = [x.relu(), F.relu6(6 + 6 * x), F.leaky_relu(x), F.threshold(x, 0.0, 0.5)]
        return torch.stack([*plain, x.abs(), x.sgn() * x, F.elu(x), F.selu(x), F.celu(x)], 1)

    return f, steps(3, 4)


@case("hard_functions_at_their_ends", group=GROUP, without=NOT_ITS_SLOPE)
def hard_functions_at_their_ends() -> Any:
    def f(x: Tensor) -> Tensor:
        hard = [F.hardtanh(x), F.hardsigmoid(3 * x), F.hardswish(3 * x), F.hardshrink(x, 1.0)]
        return torch.stack([*hard, F.softshrink(x, 1.0), F.softplus(x, 20.0, 20.0)], 1)

    return f, steps(3, 4)


@case("clamp_at_its_ends", group=GROUP, without=NOT_ITS_SLOPE)
def clamp_at_its_ends() -> Any:
    def f(x: Tensor) -> Tensor:
        bound = x.detach().roll(1, dims=1)
        return torch.stack([x.clamp(-1, 1), x.clamp(min=0), x.clamp(max=0), x.clamp(bound)], 1)

    return f, steps(3, 4)


@case("max_pool_ties", group=GROUP, without=NOT_ITS_SLOPE)
def max_pool_ties() -> Any:
    model = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    return model, steps(3, 2, 4, 4)


@case("adaptive_max_pool_ties", group=GROUP, without=NOT_ITS_SLOPE)
def adaptive_max_pool_ties() -> Any:
    return nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten(2), nn.MaxPool1d(2)), steps(3, 2, 3, 5)


@case("extremes_with_ties", group=GROUP, without=NOT_ITS_SLOPE)
def extremes_with_ties() -> Any:
    """``max(dim)`` picks one winner, ``amax`` shares among all: both as PyTorch has them."""

    def f(x: Tensor) -> Tensor:
        one = [x.max(1).values, x.min(1).values, x.median(1).values, x.mode(1).values]
        shared = [x.amax(1), x.amin(1), x.aminmax(dim=1).max, x.nanmedian(1).values]
        return torch.stack([*one, *shared], dim=1)

    return f, steps(3, 5)


@case("sorting_with_ties", group=GROUP, without=NOT_ITS_SLOPE)
def sorting_with_ties() -> Any:
    def f(x: Tensor) -> Tensor:
        ordered = x.sort(dim=1, stable=True).values * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        running = x.cummax(1).values + 2 * x.cummin(1).values
        return torch.cat([ordered, x.topk(2, 1).values, x.kthvalue(3, 1, True).values, running], 1)

    return f, steps(3, 5)


@case("two_argument_ties", group=GROUP, without=NOT_ITS_SLOPE)
def two_argument_ties() -> Any:
    def f(x: Tensor) -> Tensor:
        a, b = x, x.flip(1)
        return torch.stack([torch.maximum(a, b), torch.minimum(a, 2 * b), torch.fmax(a, b * b)], 1)

    return f, steps(3, 4)


@case("prelu_and_rrelu", group=GROUP, without=NOT_ITS_SLOPE)
def prelu_and_rrelu() -> Any:
    model = nn.Sequential(nn.PReLU(3, 0.2), nn.RReLU(), nn.Conv1d(3, 2, 2), nn.PReLU())
    return model.eval(), steps(3, 3, 4)


# The slope of every negative value is drawn at every call.
@case("rrelu_train", group=GROUP, without=NOISY)
def rrelu_train() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.RReLU(0.1, 0.9), nn.Linear(6, 2)), torch.randn(4, 4)


@case("infinite_slope_masked", group=GROUP, without=NOT_ITS_SLOPE)
def infinite_slope_masked() -> Any:
    """sqrt has slope infinity at 0, which relu, clamp and where cut off: never 0 * inf = NaN."""

    def f(x: Tensor) -> Tensor:
        mask = x > 0
        masked = x.masked_fill(~mask, 0.0).sqrt()
        return torch.stack([x.relu().sqrt(), x.clamp(min=0.5, max=1.0).sqrt(), masked], 1)

    return f, torch.tensor([[-1.0, 0.0, 2.0], [0.0, 0.0, 1.0], [3.0, -2.0, 0.5]])


@case("max_pool_of_infinite_slope", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def max_pool_of_infinite_slope() -> Any:
    """The losers of a pool must get exactly 0, whatever the winner's cotangent is."""
    return lambda x: F.max_pool1d(x.unsqueeze(1), 2).sqrt(), torch.tensor([[-1.0, 0, 4, 2]] * 3)


@case("honest_infinities", group=GROUP, without=LAWS - {"out"})
def honest_infinities() -> Any:
    """Where the row loop says inf or NaN, so do we, in the same places."""
    return lambda x: torch.stack([x.sqrt(), x.log(), x.pow(1.5), 1 / x], 1), steps(3, 4)


@case("norms_at_zero", group=GROUP, without=NOT_ITS_SLOPE)
def norms_at_zero() -> Any:
    def f(x: Tensor) -> Tensor:
        x = x.view(len(x), 2, 2)
        orders = [x.norm(dim=2), x.norm(p=1, dim=2), x.norm(p=float("inf"), dim=2), x.norm(3, 2)]
        return torch.cat([*orders, F.cosine_similarity(x[:, :1], x[:, 1:], dim=2)], 1)

    return f, torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0], [1, -1, 2, 3]])


@case("rounding_has_no_slope", group=GROUP, without=NOT_ITS_SLOPE)
def rounding_has_no_slope() -> Any:
    def f(x: Tensor) -> Tensor:
        whole = [x.round(), x.floor(), x.ceil(), x.trunc(), x.sign(), x.sgn()]
        return torch.stack([*whole, x.frac(), x % 2, torch.fmod(x, 2), x.nan_to_num()], 1)

    return f, steps(3, 3) * 2.5


@case("bent_losses", group=GROUP, without=NOT_ITS_SLOPE)
def bent_losses() -> Any:
    def f(x: Tensor) -> Tensor:
        target = torch.zeros_like(x)
        losses = [F.smooth_l1_loss, F.huber_loss, F.l1_loss, F.mse_loss]
        return torch.stack([loss(x, target, reduction="none") for loss in losses], 1)

    return f, steps(3, 4)
