"""Pooling: the maximum, by the places that the forward remembered, and the average.

The places are the same for all rows. They are expanded over them, never copied: a copy would be
``V`` times an integer tensor twice as wide as the activations.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from batchjac.block import Block, Scattered
from batchjac.graph import Step
from batchjac.ordinary import unrecorded
from batchjac.rules.registry import Blocks, only, rule, single
from batchjac.rules.spatial import but_last, images, planes
from batchjac.rules.zeros import onto

aten = torch.ops.aten


def put(data: Tensor, dim: int, size: int, index: Tensor, add: bool) -> Tensor:
    """Zeros of ``size`` along ``dim`` with ``data[v]`` at ``index``, which all rows share."""
    sizes = list(data.shape)
    sizes[dim] = size
    method = "scatter_add" if add else "scatter"
    return onto(data.new_zeros(sizes), method, dim, index.expand(data.shape), data)


def _overlap(step: Step) -> bool:
    """Whether an entry may be the maximum of two windows."""
    kernel = step.saved("kernel_size")
    how = (kernel, step.saved("stride") or kernel, step.saved("dilation"))
    dims = max(map(len, how))  # an entry alone is for all axes
    kernel, stride, dilation = (list(x) * (dims if len(x) == 1 else 1) for x in how)
    wide = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    return any(s < w for s, w in zip(stride, wide, strict=True))


def _uneven(dims: int) -> Callable[[Step], bool]:
    """Whether adaptive windows share entries: where they do not divide the axis."""

    def add(step: Step) -> bool:
        (edge,) = step.edges
        assert edge is not None
        return any(i % o for i, o in zip(edge.shape[-dims:], step.shape[-dims:], strict=True))

    return add


def _always(step: Step) -> bool:
    return True


def _maximum(dims: int, add: Callable[[Step], bool], *names: str) -> None:
    @rule(*names, samples=but_last(dims), fresh=True)
    def pool(step: Step, blocks: Blocks) -> Sequence[Block | None]:
        """``y[n,c,p] = x[n, c, i(n,c,p)]``: ``g[v,n,c,p]`` at ``i``, zero elsewhere."""
        g, edge = only(step, blocks)
        size = edge.shape[-dims:]
        index = step.saved("result1").flatten(-dims)
        if dims == 2 and len(edge.shape) == 4 and not add(step) and unrecorded(g.data):
            few = g.full().flatten(-dims)
            if not isinstance(few, FakeTensor):
                return [Scattered(few, index, edge.shape)]
        data = put(g.full().flatten(-dims), -1, math.prod(size), index, add(step))
        return [Block(data.unflatten(-1, size), edge.shape)]

    @single(*names)
    def pool_forward(step: Step, t: Block) -> Block:
        """``t[v, n, c, i(n,c,p)]``."""
        index = step.saved("result1").flatten(-dims)
        flat = t.full().flatten(-dims)
        data = flat.gather(-1, index.expand(*flat.shape[:-1], -1))
        return Block(data.unflatten(-1, step.shape[-dims:]), step.shape)


_maximum(2, _overlap, "MaxPool2DWithIndicesBackward0")
_maximum(3, _overlap, "MaxPool3DWithIndicesBackward0")
_maximum(2, _uneven(2), "AdaptiveMaxPool2DBackward0")
_maximum(3, _uneven(3), "AdaptiveMaxPool3DBackward0")
_maximum(2, _always, "FractionalMaxPool2DBackward0")
_maximum(3, _always, "FractionalMaxPool3DBackward0")


def _unpooled(dims: int, *names: str) -> None:
    @rule(*names, samples=but_last(dims))
    def unpool(step: Step, blocks: Blocks) -> Sequence[Block | None]:
        """``y[n, c, i(n,c,p)] = x[n,c,p]``: ``g[v, n, c, i(n,c,p)]``."""
        g, edge = only(step, blocks)
        if all(size == 1 for size in g.data.shape[-dims:]):
            return [Block(g.data, edge.shape)]
        index = step.saved("indices").flatten(-dims)
        flat = g.full().flatten(-dims)
        data = flat.gather(-1, index.expand(*flat.shape[:-1], -1))
        return [Block(data.unflatten(-1, edge.shape[-dims:]), edge.shape)]

    @single(*names)
    def unpool_forward(step: Step, t: Block) -> Block:
        """``t[v,n,c,p]`` at ``i(n,c,p)``, zero elsewhere."""
        size = step.shape[-dims:]
        index = step.saved("indices").flatten(-dims)
        data = put(t.full().flatten(-dims), -1, math.prod(size), index, add=True)
        return Block(data.unflatten(-1, size), step.shape)


_unpooled(2, "MaxUnpool2DBackward0")
_unpooled(3, "MaxUnpool3DBackward0")


def _average(dims: int, adjoint: Any, push: Any, *names: str) -> None:
    @rule(*names, samples=but_last(dims))
    def pool(step: Step, blocks: Blocks) -> Sequence[Block | None]:
        """``y[n,c,p] = mean_k x[n, c, p s + k]``: ``g[v,n,c,p] / K`` to each of its window."""
        return planes(step, blocks, dims, lambda g, x: adjoint(g, x, *_averaged(step)))

    @single(*names)
    def pool_forward(step: Step, t: Block) -> Block:
        """``mean_k t[v, n, c, p s + k]``."""
        return images(step, t, dims, lambda x: push(x, *_averaged(step)))


def _averaged(step: Step) -> list[Any]:
    window = [list(step.saved(name)) for name in ("kernel_size", "stride", "padding")]
    how = [step.saved(n) for n in ("ceil_mode", "count_include_pad", "divisor_override")]
    return [*window, *how]


_average(2, aten.avg_pool2d_backward, aten.avg_pool2d, "AvgPool2DBackward0")
_average(3, aten.avg_pool3d_backward, aten.avg_pool3d, "AvgPool3DBackward0")


def _adaptive(dims: int, adjoint: Any, push: Any, *names: str) -> None:
    @rule(*names, samples=but_last(dims))
    def pool(step: Step, blocks: Blocks) -> Sequence[Block | None]:
        """``y[n,c,p]``, the mean of window ``p``: ``g[v,n,c,p]`` over the size of each window."""
        return planes(step, blocks, dims, adjoint)

    @single(*names)
    def pool_forward(step: Step, t: Block) -> Block:
        """The mean of ``t[v]`` in each window."""
        return images(step, t, dims, lambda x: push(x, list(step.shape[-dims:])))


_adaptive(
    2, aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool2d, "AdaptiveAvgPool2DBackward0"
)
_adaptive(
    3, aten._adaptive_avg_pool3d_backward, aten._adaptive_avg_pool3d, "AdaptiveAvgPool3DBackward0"
)
