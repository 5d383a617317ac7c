"""The models of the cases: plain PyTorch, built the way their users build them."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def lenet5() -> nn.Module:
    """LeCun et al., 1998, as the fourth seed sizes it, with ReLU and max pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def cnn1d() -> nn.Module:
    """A 1-D classifier of 224 features into 3 classes, as in the third seed."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    """Linear layers of these widths with an activation between them."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        return nn.Sequential(*layers[:-1])

    return build


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a skip, itself ``normed`` or not."""

    def __init__(self, inputs: int, outputs: int, stride: int, normed: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        norm = nn.BatchNorm2d(outputs) if normed else nn.Identity()
        self.skip = nn.Identity() if same else nn.Sequential(short, norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def small_resnet() -> nn.Module:
    """Three residual stages of 16, 32 and 64 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def resnet18() -> nn.Module:
    """Eighteen layers for ten classes: He et al., 2016, table 1, with its 7x7 stem and pooling."""
    widths = (64, 64, 128, 256, 512)
    stages = [
        Residual(a if first else b, b, 2 if first and a != b else 1, normed=True)
        for a, b in itertools.pairwise(widths)
        for first in (True, False)
    ]
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def conv_autoencoder() -> nn.Module:
    """3x32x32 to 64 latent numbers and back."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 64),
        nn.Linear(64, 2048), nn.ReLU(), nn.Unflatten(1, (32, 8, 8)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1),
    )  # fmt: skip


class TokenMean(nn.Module):
    """``[N, T, d]`` to ``[N, d]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def encoder_layers(width: int, heads: int, hidden: int, count: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, count, enable_nested_tensor=False)


def encoder() -> nn.Module:
    """A transformer encoder of two layers, its tokens averaged, and a linear head."""
    return nn.Sequential(encoder_layers(64, 4, 128, 2), TokenMean(), nn.Linear(64, 5))


class Patches(nn.Module):
    """An image as tokens: one convolution whose kernel is the patch, and a learned position."""

    def __init__(self, channels: int, width: int, patch: int, count: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.randn(count, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(x).flatten(2).transpose(1, 2) + self.position


def vit() -> nn.Module:
    """Dosovitskiy et al., 2021, in small: 64 patches of 3x4x4, width 64, four layers."""
    return nn.Sequential(
        Patches(3, 64, 4, 64), encoder_layers(64, 4, 128, 4), TokenMean(), nn.Linear(64, 10)
    )


class LastState(nn.Module):
    """A GRU over the tokens, and the state after the last."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.cells = nn.GRU(inputs, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.cells(x)[0]
        return states[:, -1]


def gru() -> nn.Module:
    """32 steps of 16 numbers into 5 classes."""
    return nn.Sequential(LastState(16, 64), nn.Linear(64, 5))


class Block(nn.Module):
    """A GPT block: causal attention and a two-layer network, each after a norm, each added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.before(x)).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.join(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.shrink(functional.gelu(self.grow(self.between(x))))
        return y


def gpt_block() -> nn.Module:
    """Every number of every token by every number of every token: ``[N, T, d, T, d]``."""
    return nn.Sequential(Block(64, 4))
