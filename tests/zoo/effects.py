"""Functions that do more than return a value: counters, prints, buffers, caches, random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchjac.errors import StateError

from .registry import LAWS, NOISY, NOT_ITS_SLOPE, case

GROUP = "side effects"


class Diary(nn.Module):
    """Writes attributes, appends to lists and prints."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.shapes: list[torch.Size] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        print("diary:", len(self.shapes), end="\r")
        self.last = self.net(x).tanh()
        return self.last * 2


@case("prints_and_appends", group=GROUP)
def prints_and_appends() -> Any:
    return Diary(), torch.randn(4, 3)


class RunningScale(nn.Module):
    """Reads a buffer, then overwrites it and counts the call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = x / self.scale.clone()
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * x.abs().mean(0))
            self.calls += 1
        return y.sin()


# A second call reads other buffers.
@case("buffers_updated_in_forward", group=GROUP, without={"directional", "chunks", "alone"})
def buffers_updated_in_forward() -> Any:
    return RunningScale(), torch.randn(4, 3)


class Rebinding(nn.Module):
    """Buffers that are replaced by another tensor rather than written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, :2] * (1 + self.state)
        self.state = self.state + x.detach().mean()
        self.absent = x.detach().clone()
        return y**2


@case("buffers_replaced_in_forward", group=GROUP, without={"directional", "chunks", "alone"})
def buffers_replaced_in_forward() -> Any:
    return Rebinding(), torch.randn(4, 3)


class Centres(nn.Module):
    """VQ-VAE with codes that follow the data: nearest code, straight through, moving averages."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)
        self.register_buffer("codes", torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        nearest = torch.cdist(z, self.codes).argmin(1)
        quantised = self.codes[nearest]
        if self.training:
            with torch.no_grad():
                self.codes[nearest] += 0.1 * (z - quantised)
        return self.decoder(z + (quantised - z).detach())


@case("vector_quantised_train", group=GROUP, without=LAWS - {"out"})
def vector_quantised_train() -> Any:
    return Centres().train(), torch.randn(4, 3)


@case("vector_quantised_eval", group=GROUP, without=NOT_ITS_SLOPE)
def vector_quantised_eval() -> Any:
    return Centres().eval(), torch.randn(4, 3)


@case("seeds_itself", group=GROUP, without={"permute", "chunks"})
def seeds_itself() -> Any:
    """The function seeds torch's generator: the caller's random state must not follow."""

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        return x * torch.randn_like(x)

    return f, torch.randn(4, 3)


@case("noise_of_python_and_numpy", group=GROUP, without=LAWS - {"out"})
def noise_of_python_and_numpy() -> Any:
    def f(x: Tensor) -> Tensor:
        random.seed(5)
        np.random.seed(7)
        return x.sin() * random.random() * torch.from_numpy(np.random.rand(*x.shape))

    return f, torch.randn(4, 3)


@case("gradient_mode_left_off", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def gradient_mode_left_off() -> Any:
    """Turns recording off half way and never on again: what follows is a constant."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        torch.set_grad_enabled(False)
        return y, y * 2

    return f, torch.randn(4, 3)


# One mask for all rows of a call.
@case("dropout_train", group=GROUP, without=NOISY)
def dropout_train() -> Any:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    return model.train(), torch.randn(4, 4)


@case("dropout_of_every_kind", group=GROUP, without=NOISY)
def dropout_of_every_kind() -> Any:
    model = nn.Sequential(
        nn.AlphaDropout(0.3), nn.Conv1d(2, 4, 2), nn.Dropout1d(0.4), nn.FeatureAlphaDropout(0.4),
        nn.Unflatten(2, (2, 1)), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    return model.train(), torch.randn(4, 2, 3)


class StochasticDepth(nn.Module):
    """Each sample skips the block by a coin of its own, and noise is added."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.bernoulli(torch.full((len(x), 1), 0.6, dtype=x.dtype)) / 0.6
        return x + keep * self.block(x) + 0.1 * torch.randn_like(x) * x


@case("stochastic_depth_and_noise", group=GROUP, without=NOISY)
def stochastic_depth_and_noise() -> Any:
    return StochasticDepth().train(), torch.randn(4, 4)


@case("own_generator", group=GROUP, without=NOISY)
def own_generator() -> Any:
    """Noise from a generator that no library can know of: rewound by the function itself."""
    generator = torch.Generator()

    def f(x: Tensor) -> Tensor:
        generator.manual_seed(3)
        return x * torch.rand(x.shape, generator=generator, dtype=x.dtype)

    return f, torch.randn(4, 3)


@case("cached_by_the_model", group=GROUP, without={"chunks"})
def cached_by_the_model() -> Any:
    """Positions are computed at the first call and kept as a plain attribute."""

    class Cached(nn.Module):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(x.shape[1], dtype=x.dtype).sin()
            return (x + self.table).exp()

    return Cached(), torch.randn(4, 3)


@case("mode_switched_inside", group=GROUP, without=NOISY)
def mode_switched_inside() -> Any:
    """Monte Carlo dropout: the forward itself turns dropout on and leaves it on."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).eval()

    class MonteCarlo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            self.model[1].train()
            return self.model(x)

    return MonteCarlo().eval(), torch.randn(4, 4)


class Clipped(nn.Module):
    """WGAN's weight clipping inside the forward: the walk would read weights that changed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3) * 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        with torch.no_grad():
            self.weight.clamp_(-0.5, 0.5)
        return y.tanh()


# A copy of every parameter, for the case that one is written to, would double the model.
@case("parameter_changed_in_forward", group=GROUP, expects=StateError, may_change="weight")
def parameter_changed_in_forward() -> Any:
    return Clipped(), torch.randn(4, 3)


@case("saved_value_overwritten", group=GROUP, expects=StateError)
def saved_value_overwritten() -> Any:
    """What the backward of exp needs is written over: PyTorch itself refuses this graph."""
    return lambda x: x.exp().mul_(2), torch.randn(4, 3)


@case("lazy_layer_not_initialised", group=GROUP, expects=StateError)
def lazy_layer_not_initialised() -> Any:
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh()), torch.randn(4, 3)
