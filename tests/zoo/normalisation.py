"""Layers that normalise values or weights, in training and in evaluation mode."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from .registry import case

GROUP = "normalisation"


def warmed(model: nn.Module, *shape: int) -> nn.Module:
    """In eval mode, with running statistics from a batch of the given shape."""
    model.train()(torch.randn(*shape) * 2 + 1)
    return model.eval()


@case("batch_norm_eval", group=GROUP)
def batch_norm_eval() -> Any:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    return warmed(model, 9, 4), torch.randn(4, 4)


@case("batch_norm_eval_every_dimension", group=GROUP)
def batch_norm_eval_every_dimension() -> Any:
    model = nn.Sequential(
        nn.BatchNorm3d(2), nn.Flatten(2, 3), nn.Tanh(), nn.BatchNorm2d(2, affine=False),
        nn.Flatten(2), nn.Tanh(), nn.BatchNorm1d(2, eps=0.1),
    )  # fmt: skip
    return warmed(model, 5, 2, 2, 1, 3), torch.randn(3, 2, 2, 1, 3)


@case("layer_norm", group=GROUP)
def layer_norm() -> Any:
    model = nn.Sequential(
        nn.LayerNorm([2, 5]), nn.Tanh(), nn.LayerNorm(5, elementwise_affine=False)
    )
    return model, torch.randn(3, 2, 5)


@case("group_norm", group=GROUP)
def group_norm() -> Any:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.GroupNorm(4, 4, affine=False),
        nn.GroupNorm(1, 4), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    return model, torch.randn(3, 2, 3, 3)


@case("instance_norm", group=GROUP)
def instance_norm() -> Any:
    model = nn.Sequential(nn.InstanceNorm2d(2, affine=True), nn.Tanh(), nn.Conv2d(2, 2, 2))
    return model, torch.randn(3, 2, 3, 3)


@case("instance_norm_running_statistics_eval", group=GROUP)
def instance_norm_running_statistics_eval() -> Any:
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Tanh())
    return warmed(model, 4, 3, 5), torch.randn(3, 3, 5)


@case("instance_norm_running_statistics_train", group=GROUP)
def instance_norm_running_statistics_train() -> Any:
    """Updates buffers from the whole batch, yet each sample is normalised by itself."""
    model = nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh())
    return model.train(), torch.randn(3, 3, 5)


@case("buffers_behind_a_function", group=GROUP)
def buffers_behind_a_function() -> Any:
    """A lambda around a module that updates its buffers: they must be put back all the same."""
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten()).train()
    return lambda x: model(x)[:, :4], torch.randn(3, 3, 5)


@case("rms_norm", group=GROUP)
def rms_norm() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 3)), torch.randn(4, 4)


@case("local_response_norm", group=GROUP)
def local_response_norm() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 5, 2), nn.LocalResponseNorm(3, alpha=0.5), nn.AvgPool2d(2))
    return model, torch.randn(3, 1, 5, 5)


@case("weight_norm", group=GROUP)
def weight_norm() -> Any:
    conv = parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    linear = parametrizations.weight_norm(nn.Linear(12, 3), dim=None)
    return nn.Sequential(conv, nn.ELU(), nn.Flatten(), linear), torch.randn(3, 2, 5)


@case("weight_norm_by_forward_pre_hook", group=GROUP)
def weight_norm_by_forward_pre_hook() -> Any:
    with warnings.catch_warnings():  # deprecated, and still what many published models are built on
        warnings.simplefilter("ignore")
        linear = nn.utils.weight_norm(nn.Linear(4, 3))
    return nn.Sequential(linear, nn.Tanh()), torch.randn(4, 4)


def spectral() -> nn.Module:
    layers = [parametrizations.spectral_norm(nn.Linear(*size)) for size in ((4, 6), (6, 3))]
    return nn.Sequential(layers[0], nn.LeakyReLU(), layers[1])


@case("spectral_norm_eval", group=GROUP)
def spectral_norm_eval() -> Any:
    return spectral().eval(), torch.randn(4, 4)


# Every call is one more power iteration, so finite differences and chunks see other weights.
@case("spectral_norm_train", group=GROUP, without={"directional", "alone", "chunks", "compose"})
def spectral_norm_train() -> Any:
    return spectral().train(), torch.randn(4, 4)


@case("orthogonal_weights", group=GROUP)
def orthogonal_weights() -> Any:
    return parametrizations.orthogonal(nn.Linear(4, 3)), torch.randn(4, 4)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


@case("own_parametrisation_cached", group=GROUP)
def own_parametrisation_cached() -> Any:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())

    def f(x: Tensor) -> Tensor:
        with parametrize.cached():
            return layer(torch.tanh(layer(x)))

    return f, torch.randn(4, 4)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: the kernel has zero mean and unit variance at every call."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias)


@case("weight_standardisation", group=GROUP)
def weight_standardisation() -> Any:
    return nn.Sequential(StandardisedConv(2, 4, 2), nn.GroupNorm(2, 4)), torch.randn(2, 2, 3, 3)


@case("standardised_sample_by_sample", group=GROUP)
def standardised_sample_by_sample() -> Any:
    def f(x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        x = F.normalize(x**3, dim=1)
        return (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))

    return f, torch.randn(4, 5)
