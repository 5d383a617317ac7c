"""Stacks of linear layers: plain, residual, dense, gated, and some that are not layers at all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import case

GROUP = "feedforward"


@case("affine", group=GROUP)
def affine() -> Any:
    return nn.Linear(5, 3), torch.randn(4, 5)


@case("mlp_tanh", group=GROUP)
def mlp_tanh() -> Any:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(4, 5)


@case("mlp_every_smooth_activation", group=GROUP)
def mlp_every_smooth_activation() -> Any:
    smooth = [
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.Mish(),
        nn.ELU(0.7),
        nn.SELU(),
        nn.CELU(0.5),
    ]
    smooth += [nn.Softplus(2.0), nn.Sigmoid(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink()]
    layers: list[nn.Module] = []
    for activation in smooth:
        layers += [nn.Linear(6, 6), activation]
    return nn.Sequential(*layers, nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(4, 6)


@case("mlp_relu_log_softmax", group=GROUP)
def mlp_relu_log_softmax() -> Any:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4), nn.LogSoftmax(1)
    )
    return model.eval(), torch.randn(4, 2, 4)


@case("one_sample", group=GROUP)
def one_sample() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3)), torch.randn(1, 4)


@case("scalar_per_sample", group=GROUP)
def scalar_per_sample() -> Any:
    net = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 1))
    return lambda x: net(x).squeeze(-1), torch.randn(5, 4)


@case("scalar_input_per_sample", group=GROUP)
def scalar_input_per_sample() -> Any:
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 3))
    return lambda x: net(x.unsqueeze(-1)), torch.randn(5)


class ResidualMLP(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@case("residual_mlp", group=GROUP)
def residual_mlp() -> Any:
    return ResidualMLP(6, 3), torch.randn(4, 6)


class DenseMLP(nn.Module):
    """Every layer reads all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 + 3 * k, 3) for k in range(3))
        self.head = nn.Linear(13, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(torch.tanh(layer(torch.cat(seen, dim=1))))
        return self.head(torch.cat(seen, dim=1))


@case("dense_connections", group=GROUP)
def dense_connections() -> Any:
    return DenseMLP(), torch.randn(4, 4)


class Highway(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.carry = nn.Linear(width, width)
        self.change = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.carry(x))
        return gate * torch.relu(self.change(x)) + (1 - gate) * x


@case("highway", group=GROUP)
def highway() -> Any:
    return nn.Sequential(Highway(5), Highway(5), nn.Linear(5, 3)), torch.randn(4, 5)


class Maxout(nn.Module):
    def __init__(self, inputs: int, outputs: int, pieces: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs * pieces)
        self.outputs, self.pieces = outputs, pieces

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(-1, self.outputs, self.pieces).max(dim=-1).values


@case("maxout", group=GROUP)
def maxout() -> Any:
    return nn.Sequential(Maxout(5, 4, 3), Maxout(4, 2, 2)), torch.randn(4, 5)


class GatedUnit(nn.Module):
    """SwiGLU: one matrix makes both halves, which are split apart again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 12, bias=False)
        self.down = nn.Linear(6, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


@case("swiglu", group=GROUP)
def swiglu() -> Any:
    return nn.Sequential(GatedUnit(4), nn.GLU(dim=1)), torch.randn(4, 4)


@case("bilinear", group=GROUP)
def bilinear() -> Any:
    layer = nn.Bilinear(4, 4, 3)
    return lambda x: layer(x, torch.sin(x)), torch.randn(4, 4)


@case("autoencoder", group=GROUP)
def autoencoder() -> Any:
    down = [nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2)]
    up = [nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 8), nn.Sigmoid()]
    return nn.Sequential(*down, *up), torch.randn(3, 8)


@case("decoder_many_outputs", group=GROUP)
def decoder_many_outputs() -> Any:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 24), nn.Unflatten(1, (2, 3, 4)))
    return model, torch.randn(3, 2)


class Siren(nn.Module):
    """A field over coordinates: random Fourier features, then sines."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 4))
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x @ self.frequencies
        x = torch.cat([phase.sin(), phase.cos()], dim=-1)
        return self.head(torch.sin(3.0 * self.hidden(x)))


@case("siren_fourier_features", group=GROUP)
def siren_fourier_features() -> Any:
    return Siren(), torch.rand(5, 2)


class Mixer(nn.Module):
    """MLP-Mixer: one MLP across tokens, one across channels."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.across_tokens = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.across_channels = nn.Sequential(
            nn.Linear(channels, 6), nn.GELU(), nn.Linear(6, channels)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across_tokens(self.norm(x).mT).mT
        return x + self.across_channels(self.norm(x))


@case("mlp_mixer_tokens_out", group=GROUP)
def mlp_mixer_tokens_out() -> Any:
    return Mixer(3, 4), torch.randn(3, 3, 4)


class HyperNetwork(nn.Module):
    """Each sample makes the weights that are applied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(x).view(-1, 3, 4)
        return torch.bmm(weight, x.unsqueeze(2)).squeeze(2)


@case("hypernetwork", group=GROUP)
def hypernetwork() -> Any:
    return HyperNetwork(), torch.randn(4, 4)


@case("mlp_with_extra_axes", group=GROUP)
def mlp_with_extra_axes() -> Any:
    model = nn.Sequential(nn.Linear(3, 5), nn.ELU(), nn.Linear(5, 2))
    return model, torch.randn(3, 2, 2, 3)


@case("polynomial", group=GROUP)
def polynomial() -> Any:
    """No layer at all: powers, quotients and a horner scheme."""

    def f(x: Tensor) -> Tensor:
        horner = ((2 * x - 1) * x + 3) * x - 5
        return torch.stack([x.pow(3).sum(1), horner.prod(1), (x / (1 + x**2)).mean(1)], dim=1)

    return f, torch.randn(4, 3)
