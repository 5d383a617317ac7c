"""Writes in place: into activations and views of them, new buffers, the input itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import case

GROUP = "in-place"


@case("inplace_activations", group=GROUP)
def inplace_activations() -> Any:
    inplace = [nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.SELU(inplace=True)]
    inplace += [nn.LeakyReLU(inplace=True), nn.SiLU(inplace=True), nn.Hardtanh(inplace=True)]
    layers: list[nn.Module] = []
    for activation in inplace:
        layers += [nn.Linear(4, 4), activation]
    return nn.Sequential(*layers), torch.randn(4, 4)


@case("inplace_methods", group=GROUP)
def inplace_methods() -> Any:
    linear = nn.Linear(4, 4)

    def f(x: Tensor) -> Tensor:
        y = linear(x).mul_(2).add_(x).tanh_().clone()
        y.sub_(y.mean(1, keepdim=True)).div_(1 + x.square())
        y = (y * 1).clamp_(-0.5, 0.5).exp_() * 3
        return y.addcmul_(x, x.cos(), value=0.5).pow_(2).neg_()

    return f, torch.randn(4, 4)


@case("inplace_views", group=GROUP)
def inplace_views() -> Any:
    """Writes through views change their base, and reads of the base see them."""
    linear = nn.Linear(4, 6)

    def f(x: Tensor) -> Tensor:
        y = linear(x)
        y[:, 0] += x[:, 0]
        y[:, 1:3].mul_(x[:, :2])
        y.view(-1, 2, 3)[:, 1, ::2] = x[:, 2:].sin()
        y.t()[3].copy_(y[:, 4].clone() * x[:, 1])
        y.diagonal(0, 0, 1).add_(0.5)
        return y

    return f, torch.randn(4, 4)


@case("inplace_into_new_buffer", group=GROUP)
def inplace_into_new_buffer() -> Any:
    """A result assembled column by column in a tensor that began as zeros."""

    def f(x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 5)
        out[:, 0] = x.prod(1)
        out[:, 1:4] = x.tanh()
        for k in range(1, 5):
            out[:, k] += out[:, k - 1].clone() * 0.5
        return out

    return f, torch.randn(4, 3)


@case("inplace_split_and_unbind", group=GROUP)
def inplace_split_and_unbind() -> Any:
    """Multi-output views forbid writes to themselves; slices that look the same do not."""
    linear = nn.Linear(4, 4)

    def f(x: Tensor) -> Tensor:
        y = linear(x) * 2
        head, tail = y[:, :2], y[:, 2:]
        head *= tail.clone()
        tail.add_(head)
        first, second = torch.split(y, 2, dim=1)
        a, b = torch.unbind(y * 2, dim=1)[:2]
        return torch.cat([first * second, torch.stack([a, b], 1)], 1)

    return f, torch.randn(4, 4)


@case("inplace_on_the_input", group=GROUP)
def inplace_on_the_input() -> Any:
    """Written over by the function; the caller's own tensor must not change."""
    linear = nn.Linear(3, 2)

    def f(x: Tensor) -> Tensor:
        x.mul_(2).sin_()
        return linear(x)

    return f, torch.randn(4, 3)


@case("inplace_on_a_slice_of_the_input", group=GROUP)
def inplace_on_a_slice_of_the_input() -> Any:
    linear = nn.Linear(3, 2)

    def f(x: Tensor) -> Tensor:
        x[:, 0] += x[:, 1].clone() ** 2
        x[:, 2] = 0.0
        return linear(x)

    return f, torch.randn(4, 3)


@case("inplace_first_layer", group=GROUP)
def inplace_first_layer() -> Any:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Dropout(0.3, inplace=True))
    return model.eval(), torch.randn(4, 4)


@case("inplace_fill_and_index", group=GROUP)
def inplace_fill_and_index() -> Any:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.masked_fill_(x > 1, 0.25)
        y.index_fill_(1, torch.tensor([1]), -1.0)
        y.index_add_(1, torch.tensor([0, 2]), x[:, :2].exp())
        y.scatter_(1, torch.full((len(x), 1), 3), x[:, :1] * x[:, 1:2])
        z = y.clone()
        z[:, [0, 3]] = y[:, [3, 0]]
        z.index_put_((torch.arange(len(x)), torch.full((len(x),), 4)), x[:, 0], accumulate=True)
        return z

    return f, torch.randn(4, 5)


@case("inplace_residual_stream", group=GROUP)
def inplace_residual_stream() -> Any:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)

    def f(x: Tensor) -> Tensor:
        stream = x + 0
        stream += first(stream.clone())
        stream += second(F.relu(stream.clone(), inplace=True))
        stream -= stream.mean(1, keepdim=True)
        return stream

    return f, torch.randn(4, 4)


@case("out_is_a_view_of_the_input", group=GROUP)
def out_is_a_view_of_the_input() -> Any:
    return lambda x: x[:, 1:].view(len(x), 2, -1).mT, torch.randn(4, 5)


@case("out_is_the_input", group=GROUP)
def out_is_the_input() -> Any:
    return nn.Identity(), torch.randn(4, 3)


@case("expanded_and_strided_views", group=GROUP)
def expanded_and_strided_views() -> Any:
    def f(x: Tensor) -> Tensor:
        wide = x.unsqueeze(1).expand(-1, 2, -1).repeat(1, 1, 2).repeat_interleave(2, dim=1)
        wide = wide.tile((1, 1, 1)).movedim(1, 2).flip(1).rot90(1, (1, 2)).roll((1, 2), (1, 2))
        picked = wide.as_strided((len(x), 4, 2), (wide.stride(0), wide.stride(1), wide.stride(2)))
        return picked.swapaxes(1, 2).narrow(2, 1, 2).tril().unfold(1, 2, 1).sum(-1)

    return f, torch.randn(3, 3)
