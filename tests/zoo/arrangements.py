"""Every operation along every axis of every arrangement of the samples.

An arrangement moves or merges the axes and has a way back; a mixer works along one axis. Put
between the two halves of an arrangement, a mixer couples samples or does not, and only gradients
can tell: nothing here says which.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

N = 4
Change = Callable[[Tensor], Tensor]
Mixer = Callable[[Tensor, int], Tensor]


def viewed(*shape: int) -> Change:
    return lambda x: x.reshape(shape)


def permuted(*order: int) -> Change:
    return lambda x: x.permute(order)


# There and back; the first table for [N, N], the second for [N, N, N].
ARRANGEMENTS: dict[str, tuple[int, Change, Change]] = {
    "as it is": (2, lambda x: x.sin(), lambda y: y.sin()),
    "transposed": (2, lambda x: x.t(), lambda y: y.t()),
    "transposed and left": (2, lambda x: x.t(), lambda y: y * 1),
    "one more axis in front": (2, lambda x: x.unsqueeze(0), lambda y: y.squeeze(0)),
    "one more axis inside": (2, lambda x: x.unsqueeze(1), lambda y: y.squeeze(1)),
    "one row": (2, viewed(1, 16), viewed(N, N)),
    "one column": (2, viewed(16, 1), viewed(N, N)),
    "samples in pairs": (2, viewed(2, 8), viewed(N, N)),
    "samples halved": (2, viewed(8, 2), viewed(N, N)),
    "samples in two axes": (2, viewed(2, 2, N), viewed(N, N)),
    "entries in two axes": (2, viewed(N, 2, 2), viewed(N, N)),
    "columns in pairs": (2, lambda x: x.t().reshape(2, 8), lambda y: y.reshape(N, N).t()),
    "columns as samples": (2, lambda x: torch.stack(x.unbind(1)),
                           lambda y: torch.stack(y.unbind(1))),
    "repeated": (2, lambda x: x.repeat(2, 1), lambda y: y[N:]),
    "stretched": (2, lambda x: x.repeat_interleave(2, 0), lambda y: y[::2]),
    "expanded": (2, lambda x: x.unsqueeze(1).expand(N, 2, N), lambda y: y.select(1, 1)),
    "padded": (2, lambda x: F.pad(x, (0, 0, 1, 2)), lambda y: y[1:-2]),
    "in two parts": (2, lambda x: torch.cat(x.split(2, 0), 1),
                     lambda y: torch.cat(y.chunk(2, 1), 0)),
    "on a diagonal": (2, lambda x: torch.diag_embed(x, 0, 0, 2), lambda y: y.diagonal(0, 0, 2)),
    "first two swapped": (3, lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "samples last": (3, lambda x: x.movedim(0, 2), lambda y: y.movedim(2, 0)),
    "turned round": (3, permuted(2, 0, 1), permuted(1, 2, 0)),
    "tokens of all samples": (3, lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (N, N))),
    "tokens first, then all": (3, lambda x: x.transpose(0, 1).flatten(0, 1),
                               lambda y: y.unflatten(0, (N, N)).transpose(0, 1)),
    "samples and channels": (3, lambda x: x.transpose(1, 2).flatten(0, 1),
                             lambda y: y.unflatten(0, (N, N)).transpose(1, 2)),
    "channels and samples": (3, lambda x: x.permute(1, 2, 0).flatten(1, 2),
                             lambda y: y.unflatten(1, (N, N)).permute(2, 0, 1)),
    "everything": (3, viewed(1, 64), viewed(N, N, N)),
}  # fmt: skip


def reversed_order(t: Tensor, dim: int) -> Tensor:
    return torch.arange(t.shape[dim] - 1, -1, -1)


def reversed_index(t: Tensor, dim: int) -> Tensor:
    """The reversed order, shaped for gather and scatter along ``dim``."""
    shape = [1] * t.dim()
    shape[dim] = -1
    return reversed_order(t, dim).view(shape).expand_as(t)


def along(f: Change) -> Mixer:
    """A function of the last axis, along any."""
    return lambda t, dim: f(t.movedim(dim, -1)).movedim(-1, dim)


def weight(size: int) -> Tensor:
    return torch.linspace(-1, 2, size * size, dtype=torch.float64).view(size, size).cos()


def written(t: Tensor, dim: int) -> Tensor:
    y = t.sin()
    y.select(dim, 0).mul_(t.select(dim, -1))
    return y


def indexed(t: Tensor, dim: int) -> Tensor:
    return t[(*[slice(None)] * dim, reversed_order(t, dim))]


def put(t: Tensor, dim: int) -> Tensor:
    moved = t.movedim(dim, 0)
    return torch.zeros_like(moved).index_put((reversed_order(t, dim),), moved).movedim(0, dim)


def pooled(t: Tensor) -> Tensor:
    flat = t.reshape(1, -1, t.shape[-1])
    return F.avg_pool1d(flat, 3, 1, 1).view(t.shape)


def max_pooled(t: Tensor) -> Tensor:
    flat = t.reshape(1, -1, t.shape[-1])
    return F.max_pool1d(flat, 3, 1, 1).view(t.shape)


def convolved(t: Tensor) -> Tensor:
    kernel = torch.tensor([[[0.5, -1.0, 2.0]]], dtype=t.dtype)
    return F.conv1d(t.reshape(-1, 1, t.shape[-1]), kernel, padding=1).view(t.shape)


def attended(t: Tensor) -> Tensor:
    """Attention with the entries along the last axis as tokens."""
    flat = t.reshape(-1, t.shape[-1], 1)
    return F.scaled_dot_product_attention(flat, flat, flat).view(t.shape)


def planes(f: Change, axes: int, *, channels: bool) -> Mixer:
    """A layer on images or volumes, one place wide but along the axis; the rest is merged."""

    def run(t: Tensor) -> Tensor:
        ones = (1,) * (axes - 1)
        front = (1, -1) if channels else (-1, 1)
        y = f(t.reshape(*front, t.shape[-1], *ones))
        return y.reshape(t.shape)

    return along(run)


def stretched(mode: str, axes: int) -> Change:
    """Twice the places and back again; what lies between differs from mode to mode."""

    def run(x: Tensor) -> Tensor:
        ones = (1,) * (axes - 1)
        wide = F.interpolate(x, (2 * x.shape[2] + 1, *ones), mode=mode)
        return F.interpolate(wide.tanh(), x.shape[2:], mode=mode)

    return run


def padded(mode: str) -> Change:
    return lambda x: F.pad(x, (0, 0, 1, 0), mode=mode)[:, :, :-1].sin()


MIXERS: dict[str, Mixer] = {
    "nothing": lambda t, d: t.tanh(),
    "softmax": lambda t, d: t.softmax(d),
    "log_softmax": lambda t, d: t.log_softmax(d),
    "cumsum": lambda t, d: t.cumsum(d),
    "cumprod": lambda t, d: t.cumprod(d),
    "logcumsumexp": lambda t, d: t.logcumsumexp(d),
    "cummax": lambda t, d: t.cummax(d).values,
    "sort": lambda t, d: t.sort(d).values,
    "topk": lambda t, d: t.topk(t.shape[d], d).values,
    "flip": lambda t, d: t.flip(d),
    "roll": lambda t, d: t.roll(1, d),
    "sum": lambda t, d: t - t.sum(d, keepdim=True),
    "mean": lambda t, d: (t.movedim(d, 0) * t.mean(d)).movedim(0, d),
    "amax": lambda t, d: t - t.amax(d, keepdim=True),
    "max": lambda t, d: t - t.max(d, keepdim=True).values,
    "median": lambda t, d: t - t.median(d, keepdim=True).values,
    "kthvalue": lambda t, d: t - t.kthvalue(1, d, keepdim=True).values,
    "var": lambda t, d: t * t.var(d, correction=0, keepdim=True),
    "std": lambda t, d: t * (t.abs() + t.std(d, correction=0, keepdim=True).detach()),
    "norm": lambda t, d: t / t.norm(dim=d, keepdim=True),
    "logsumexp": lambda t, d: t - t.logsumexp(d, keepdim=True),
    "prod": lambda t, d: t + t.prod(d, keepdim=True),
    "index_select": lambda t, d: t.index_select(d, reversed_order(t, d)),
    "gather": lambda t, d: t.gather(d, reversed_index(t, d)),
    "index": indexed,
    "index_put": put,
    "index_add": lambda t, d: t.index_add(d, reversed_order(t, d), t.cos()),
    "scatter_add": lambda t, d: t.scatter_add(d, reversed_index(t, d), t.cos()),
    "scatter": lambda t, d: torch.zeros_like(t).scatter(d, reversed_index(t, d), t),
    "select": lambda t, d: t * t.select(d, 0).unsqueeze(d),
    "unbind": lambda t, d: torch.stack(t.unbind(d)[::-1], d),
    "split": lambda t, d: torch.cat(t.split(1, d)[::-1], d),
    "shifted by padding": along(lambda t: F.pad(t, (1, 0))[..., :-1]),
    "shifted by cat": lambda t, d: torch.cat([t, t], d).narrow(d, 1, t.shape[d]),
    "shifted by repeat": along(lambda t: t.repeat_interleave(2, -1)[..., 1::2].roll(1, -1)),
    "written": written,
    "where": lambda t, d: torch.where(t > 0, t, t.flip(d)),
    "maximum": lambda t, d: torch.maximum(t, t.flip(d)),
    "product": along(lambda t: t @ weight(t.shape[-1])),
    "einsum": along(lambda t: torch.einsum("...i,ij->...j", t, weight(t.shape[-1]))),
    "gram": along(lambda t: torch.einsum("...i,...j->...ij", t, t).sum(-2)),
    "fourier": lambda t, d: torch.fft.fft(t, dim=d).real,
    "layer_norm": along(lambda t: F.layer_norm(t, t.shape[-1:])),
    "average pool": along(pooled),
    "max pool": along(max_pooled),
    "convolution": along(convolved),
    "attention": along(attended),
    "unfold": along(lambda t: F.pad(t, (1, 0)).unfold(-1, 2, 1).sum(-1)),
    "pool 2d": planes(lambda x: F.avg_pool2d(x, (3, 1), 1, (1, 0)), 2, channels=False),
    "pool 3d": planes(lambda x: F.avg_pool3d(x, (2, 1, 1), 1, (1, 0, 0))[:, :, 1:], 3,
                   channels=True),
    "max pool 2d": planes(lambda x: F.max_pool2d(x, (3, 1), 1, (1, 0)), 2, channels=False),
    "max pool 3d": planes(lambda x: F.max_pool3d(x, (2, 1, 1), 1, (1, 0, 0))[:, :, 1:], 3,
                       channels=True),
    "adaptive pool": planes(lambda x: x * F.adaptive_avg_pool2d(x, 1), 2, channels=True),
    "adaptive max pool": planes(lambda x: x * F.adaptive_max_pool2d(x, 1), 2, channels=False),
    "stretched linear": planes(stretched("linear", 1), 1, channels=True),
    "stretched bilinear": planes(stretched("bilinear", 2), 2, channels=False),
    "stretched bicubic": planes(stretched("bicubic", 2), 2, channels=True),
    "stretched nearest": planes(stretched("nearest", 3), 3, channels=False),
    "replicated edge": planes(padded("replicate"), 2, channels=False),
    "circular edge": planes(padded("circular"), 2, channels=True),
    "batch norm": along(lambda t: F.batch_norm(t.reshape(1, -1, t.shape[-1]), None, None,
                                               training=True).view(t.shape)),
    "group norm": along(lambda t: F.group_norm(t.reshape(-1, t.shape[-1]), 1).view(t.shape)),
    "instance norm": along(lambda t: F.instance_norm(t.reshape(1, -1, t.shape[-1]), eps=1.0)
                           .view(t.shape)),
    "local response": along(lambda t: F.local_response_norm(t.reshape(-1, t.shape[-1], 1), 3)
                            .view(t.shape)),
    "cosine similarity": along(lambda t: t * F.cosine_similarity(t, t.cos(), -1).unsqueeze(-1)),
    "linear": along(lambda t: F.linear(t, weight(t.shape[-1]), weight(t.shape[-1])[0])),
    "image to columns": planes(lambda x: F.unfold(x, (3, 1), padding=(1, 0)).sum(1), 2,
                               channels=False),
    "cross entropy": lambda t, d: t * (t.movedim(d, -1) - t.logsumexp(d).unsqueeze(-1)).mean(
        -1, keepdim=True).movedim(-1, d),
}  # fmt: skip

# An axis less: what is left of [N, N, N] still has N in front, whichever axis went.
REDUCERS: dict[str, Mixer] = {
    "sum": lambda t, d: t.sum(d),
    "mean": lambda t, d: t.mean(d),
    "nansum": lambda t, d: t.nansum(d),
    "prod": lambda t, d: t.prod(d),
    "amax": lambda t, d: t.amax(d),
    "amin": lambda t, d: t.amin(d),
    "aminmax": lambda t, d: t.aminmax(dim=d).max,
    "max": lambda t, d: t.max(d).values,
    "min": lambda t, d: t.min(d).values,
    "median": lambda t, d: t.median(d).values,
    "mode": lambda t, d: t.mode(d).values,
    "kthvalue": lambda t, d: t.kthvalue(2, d).values,
    "var": lambda t, d: t.var(d),
    "std": lambda t, d: t.std(d),
    "norm": lambda t, d: t.norm(dim=d),
    "norm of order 3": lambda t, d: t.norm(p=3, dim=d),
    "logsumexp": lambda t, d: t.logsumexp(d),
    "select": lambda t, d: t.select(d, 1),
    "unbind": lambda t, d: t.unbind(d)[1],
    "slice": lambda t, d: t.narrow(d, 1, 1).squeeze(d),
    "index": lambda t, d: t.index_select(d, torch.tensor([2])).squeeze(d),
    "diagonal with the next": lambda t, d: t.diagonal(0, d, (d + 1) % 3),
    "product": lambda t, d: torch.tensordot(t, torch.arange(4.0).to(t), ([d], [0])),
    "last of a cumsum": lambda t, d: t.cumsum(d).select(d, -1),
    "quantile": lambda t, d: t.quantile(0.3, d),
}
