"""Weights and layers that serve more than once, and trunks that do not learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import NOT_ITS_SLOPE, case

GROUP = "shared and frozen"


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t(), self.bias)


@case("tied_autoencoder", group=GROUP)
def tied_autoencoder() -> Any:
    return TiedAutoencoder(), torch.randn(3, 6)


@case("tied_parameters_of_two_layers", group=GROUP)
def tied_parameters_of_two_layers() -> Any:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second), torch.randn(4, 4)


@case("one_layer_called_thrice", group=GROUP)
def one_layer_called_thrice() -> Any:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.SiLU(), layer, nn.SiLU(), layer), torch.randn(4, 4)


@case("one_activation_everywhere", group=GROUP)
def one_activation_everywhere() -> Any:
    act = nn.ReLU()
    return nn.Sequential(nn.Conv1d(1, 2, 2), act, nn.Conv1d(2, 2, 2), act, act), torch.randn(
        3, 1, 6
    )


@case("siamese", group=GROUP)
def siamese() -> Any:
    """One encoder on two halves of the input, compared."""
    encoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    def f(x: Tensor) -> Tensor:
        a, b = encoder(x[:, :3]), encoder(x[:, 3:])
        return torch.stack([F.cosine_similarity(a, b), F.pairwise_distance(a, b)], dim=1)

    return f, torch.randn(4, 6)


@case("one_encoder_on_a_stacked_batch", group=GROUP)
def one_encoder_on_a_stacked_batch() -> Any:
    """Both halves go through the encoder as one batch twice as long."""
    encoder = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid())

    def f(x: Tensor) -> Tensor:
        left, right = encoder(torch.cat([x[:, :3], x[:, 3:]])).chunk(2)
        return left * right

    return f, torch.randn(4, 6)


@case("universal_transformer_steps", group=GROUP)
def universal_transformer_steps() -> Any:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)

    def f(x: Tensor) -> Tensor:
        for _ in range(3):
            x = layer(x)
        return x[:, 0]

    return f, torch.randn(2, 2, 4)


@case("frozen_parameters", group=GROUP)
def frozen_parameters() -> Any:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return model.requires_grad_(False), torch.randn(4, 1, 6)


@case("frozen_trunk_learning_head", group=GROUP)
def frozen_trunk_learning_head() -> Any:
    trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).requires_grad_(False)
    return nn.Sequential(trunk, nn.Linear(5, 3)), torch.randn(4, 4)


# Half of what the value depends on is hidden from the gradient.
@case("trunk_under_no_grad", group=GROUP, without=NOT_ITS_SLOPE)
def trunk_under_no_grad() -> Any:
    trunk, side, head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            features = trunk(x).relu()
        return head(features * side(x).tanh())

    return f, torch.randn(4, 4)


@case("detached_branch", group=GROUP, without=NOT_ITS_SLOPE)
def detached_branch() -> Any:
    layer = nn.Linear(4, 4)
    return lambda x: layer(x) * layer(x).detach().exp() + x.detach().sin(), torch.randn(4, 4)


@case("stop_gradient_by_data", group=GROUP, without=NOT_ITS_SLOPE)
def stop_gradient_by_data() -> Any:
    """The old way of detaching: ``.data``."""
    layer = nn.Linear(4, 3)
    return lambda x: layer(x - x.data.mean(1, keepdim=True)), torch.randn(4, 4)


@case("parameter_list_and_dict", group=GROUP)
def parameter_list_and_dict() -> Any:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
            self.named = nn.ParameterDict({"gain": torch.randn(4)})

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.many:
                x = (x @ weight).tanh() * self.named["gain"]
            return x

    return Held(), torch.randn(4, 4)
