"""Outputs that look at other samples: refused by default, and the three other answers by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchjac.errors import CouplingError

from . import rowloop
from .registry import case

GROUP = "coupled samples"


def full(f: Any, x: Tensor) -> Tensor:
    """d y[n] / d x[m] for every pair: ``[N, *out, N, *in]``."""
    start = x.detach().clone().requires_grad_()
    y = f(start.clone())
    rows = [torch.autograd.grad(value, start, retain_graph=True)[0] for value in y.flatten()]
    return torch.stack(rows).view(*y.shape, *x.shape)


def summed(f: Any, x: Tensor) -> Tensor:
    """d (sum over n of y[n]) / d x[m], the samples m in front: ``[N, *out, *in]``."""
    total = full(f, x).sum(0)
    return total.movedim(total.dim() - x.dim(), 0)


def batch_norm(norm: nn.Module, *extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), norm, nn.ReLU(), nn.Linear(4, 2), *extra
    ).train()


def with_batch_norm() -> Any:
    return batch_norm(nn.BatchNorm1d(4)), torch.randn(5, 3)


def frozen_batch_norm(f: Any, x: Tensor) -> Tensor:
    """The statistics of this very batch, put in by hand as constants."""
    hidden = f[:2](x).detach()
    mean, variance = hidden.mean(0), hidden.var(0, correction=0)

    def held(x: Tensor) -> Tensor:
        hidden = (f[:2](x) - mean) / (variance + f[2].eps).sqrt()
        return f[3:](hidden * f[2].weight + f[2].bias)

    return rowloop.jacobian(held, x)


case("batch_norm_train", group=GROUP, expects=CouplingError)(with_batch_norm)
case("batch_norm_train_frozen", group=GROUP, options={"coupling": "frozen"},
     expected=frozen_batch_norm)(with_batch_norm)  # fmt: skip
case("batch_norm_train_sum", group=GROUP, options={"coupling": "sum"}, expected=summed)(
    with_batch_norm
)
case("batch_norm_train_full", group=GROUP, options={"coupling": "full"}, expected=full)(
    with_batch_norm
)


def with_batch_norm_2d() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2, affine=False), nn.AvgPool2d(2))
    return model.train(), torch.randn(3, 1, 3, 3)


def frozen_batch_norm_2d(f: Any, x: Tensor) -> Tensor:
    hidden = f[0](x).detach()
    mean, variance = hidden.mean((0, 2, 3), True), hidden.var((0, 2, 3), correction=0, keepdim=True)
    return rowloop.jacobian(lambda x: f[2]((f[0](x) - mean) / (variance + 1e-5).sqrt()), x)


case("batch_norm_2d_train", group=GROUP, expects=CouplingError)(with_batch_norm_2d)
case("batch_norm_2d_train_frozen", group=GROUP, options={"coupling": "frozen"},
     expected=frozen_batch_norm_2d)(with_batch_norm_2d)  # fmt: skip
case("batch_norm_2d_train_full", group=GROUP, options={"coupling": "full"}, expected=full)(
    with_batch_norm_2d
)


def without_running_statistics() -> Any:
    """Uses the batch even in eval mode, a common surprise."""
    model = batch_norm(nn.BatchNorm1d(4, track_running_stats=False))
    return model.eval(), torch.randn(5, 3)


case("batch_norm_without_statistics_eval", group=GROUP, expects=CouplingError)(
    without_running_statistics
)


def minus_the_batch_mean() -> Any:
    net = nn.Linear(3, 2)
    return lambda x: net(x - x.mean(0)).tanh(), torch.randn(4, 3)


case("batch_mean_subtracted", group=GROUP, expects=CouplingError)(minus_the_batch_mean)
case("batch_mean_subtracted_sum", group=GROUP, options={"coupling": "sum"}, expected=summed)(
    minus_the_batch_mean
)
case("batch_mean_subtracted_full", group=GROUP, options={"coupling": "full"}, expected=full)(
    minus_the_batch_mean
)


@case("contrastive_similarities", group=GROUP, expects=CouplingError)
def contrastive_similarities() -> Any:
    net = nn.Linear(3, 4)

    def f(x: Tensor) -> Tensor:
        z = F.normalize(net(x), dim=1)
        return (z @ z.T / 0.5).log_softmax(1)

    return f, torch.randn(4, 3)


@case("attention_across_the_batch", group=GROUP, expects=CouplingError)
def attention_across_the_batch() -> Any:
    """The classic mistake: ``batch_first`` forgotten, so samples attend to each other."""
    layer = nn.MultiheadAttention(4, 2)
    return lambda x: layer(x, x, x, need_weights=False)[0], torch.randn(3, 2, 4)


@case("recurrence_across_the_batch", group=GROUP, expects=CouplingError)
def recurrence_across_the_batch() -> Any:
    layer = nn.LSTM(3, 2)
    return lambda x: layer(x)[0], torch.randn(3, 2, 3)


@case("samples_shifted_by_one", group=GROUP, expects=CouplingError)
def samples_shifted_by_one() -> Any:
    """Each output is that of the neighbour: the diagonal is zero, which a sum would hide."""
    return lambda x: x.roll(1, dims=0).sin(), torch.randn(4, 3)


@case("samples_reversed", group=GROUP, expects=CouplingError)
def samples_reversed() -> Any:
    return lambda x: x.flip(0).exp(), torch.randn(3, 2)


@case("one_sample_looks_at_another", group=GROUP, expects=CouplingError)
def one_sample_looks_at_another() -> Any:
    """Only the last output reads only the first input: a probe must not miss a single entry."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        last = y[-1:] + 1e-3 * x[:1]
        return torch.cat([y[:-1], last])

    return f, torch.randn(5, 3)


@case("normalised_by_the_largest_of_the_batch", group=GROUP, expects=CouplingError)
def normalised_by_the_largest_of_the_batch() -> Any:
    return lambda x: x / x.abs().max(), torch.randn(4, 3)


@case("mini_batch_discrimination", group=GROUP, expects=CouplingError)
def mini_batch_discrimination() -> Any:
    """A spread over the batch appended as one more channel (ProGAN)."""
    head = nn.Linear(4, 2)

    def f(x: Tensor) -> Tensor:
        spread = x.std(0).mean().expand(len(x), 1)
        return head(torch.cat([x, spread], dim=1))

    return f, torch.randn(4, 3)


@case("samples_mixed_up", group=GROUP, expects=CouplingError)
def samples_mixed_up() -> Any:
    """Mixup with a fixed partner, as done in training loops."""
    net = nn.Linear(3, 2)
    return lambda x: net(0.7 * x + 0.3 * x[[1, 2, 3, 0]]), torch.randn(4, 3)


@case("coupled_and_cancelled", group=GROUP)
def coupled_and_cancelled() -> Any:
    """Samples meet and part again: a roll and its inverse keep them independent."""
    return lambda x: x.roll(1, dims=0).sin().roll(-1, dims=0) * x, torch.randn(4, 3)


@case("statistics_detached", group=GROUP, without={"directional", "alone", "chunks", "compose"})
def statistics_detached() -> Any:
    """Batch statistics as constants: the value is coupled, the derivative is not."""

    def f(x: Tensor) -> Tensor:
        mean, spread = x.mean(0).detach(), x.std(0).detach()
        return ((x - mean) / spread).tanh()

    return f, torch.randn(4, 3)
