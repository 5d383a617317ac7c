"""Tangents through the nodes of ``parts``, which take a tensor apart or put tensors together.

What is taken out of a tensor takes its part of the tangents; what is put beside tensors without
tangents has zeros there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.parts import bounds, pads, starts
from batchjac.rules.registry import Blocks, forward, single


def _resized(data: Tensor, dim: int, size: int) -> Tensor:
    """Zeros like ``data``, of another size along ``dim``."""
    sizes = list(data.shape)
    sizes[dim] = size
    return data.new_zeros(sizes)


@single("SelectBackward0")
def select(step: Step, t: Block) -> Block:
    """``y = x[k]``: ``t[v, k]``."""
    dim = step.saved("dim") % len(t.shape) + 1
    repeated = t.data.shape[dim] == 1
    return Block(t.data.select(dim, 0 if repeated else step.saved("index")), step.shape)


@single("SliceBackward0", "NarrowCopyBackward0")
def cut(step: Step, t: Block) -> Block:
    """``y = x[a:b:s]``: ``t[v, a:b:s]``."""
    dim = step.saved("dim") % len(t.shape)
    if t.data.shape[dim + 1] == 1:
        return Block(t.data, step.shape)
    where = slice(*bounds(step, t.shape[dim]))
    return Block(t.data[(slice(None),) * (dim + 1) + (where,)], step.shape)


def _common(blocks: Sequence[Block], dim: int) -> tuple[int, ...]:
    """The sizes that all tangents have in common, 1 along axis ``dim`` of their data."""
    sizes = [(*b.data.shape[:dim], 1, *b.data.shape[dim + 1 :]) for b in blocks]
    return tuple(torch.broadcast_shapes(*sizes))


@forward("CatBackward0")
def cat(step: Step, blocks: Blocks) -> Sequence[Block]:
    """``y = [x_1, x_2, ...]``: ``[t_1[v], t_2[v], ...]``, zero where nothing arrived."""
    dim = step.saved("dim") % len(step.shape)
    places = [(b, k) for b, k in zip(blocks, starts(step, dim), strict=True) if b and k is not None]
    if not places:  # all of it empty, or of the shape [0] that cat skips
        some = next(b.data for b in blocks if b is not None)
        return [Block(some.new_zeros(some.shape[0], *(1 for _ in step.shape)), step.shape)]
    common = _common([block for block, _ in places], dim + 1)
    parts: list[Tensor] = []
    end = 0
    for block, start in places:
        data = block.spread(dim).expand(*common[: dim + 1], -1, *common[dim + 2 :])
        if start != end:
            parts.append(_resized(data, dim + 1, start - end))
        parts.append(data)
        end = start + block.shape[dim]
    if end != step.shape[dim]:
        parts.append(_resized(parts[-1], dim + 1, step.shape[dim] - end))
    return [Block(torch.cat(parts, dim + 1), step.shape)]


@forward("StackBackward0")
def stack(step: Step, blocks: Blocks) -> Sequence[Block]:
    """``y[k] = x_k``: ``t_k[v]`` for each, zero where nothing arrived."""
    dim = step.saved("dim") % len(step.shape)
    some = next(b.data for b in blocks if b is not None)
    common = torch.broadcast_shapes(*(b.data.shape for b in blocks if b is not None))
    parts = [some.new_zeros(()) if b is None else b.data for b in blocks]
    return [Block(torch.stack([p.expand(common) for p in parts], dim + 1), step.shape)]


@forward(
    "SplitBackward0", "SplitWithSizesBackward0",
    "UnsafeSplitBackward0", "UnsafeSplitWithSizesBackward0",
)  # fmt: skip
def split(step: Step, blocks: Blocks) -> Sequence[Block]:
    """``y_1, y_2, ... = x``: the parts of ``t[v]``."""
    (t,) = blocks
    assert t is not None
    dim = step.saved("dim") % len(t.shape)
    if t.data.shape[dim + 1] == 1:
        return [Block(t.data, meta.shape) for meta in step.outputs]
    parts = t.data.split([meta.shape[dim] for meta in step.outputs], dim + 1)
    return [Block(part, meta.shape) for part, meta in zip(parts, step.outputs, strict=True)]


@forward("UnbindBackward0")
def unbind(step: Step, blocks: Blocks) -> Sequence[Block]:
    """``y_k = x[k]``: ``t[v, k]`` for each."""
    (t,) = blocks
    assert t is not None
    dim = step.saved("dim") % len(t.shape) + 1
    if t.data.shape[dim] == 1:
        return [Block(t.data.squeeze(dim), meta.shape) for meta in step.outputs]
    parts = t.data.unbind(dim)
    return [Block(part, meta.shape) for part, meta in zip(parts, step.outputs, strict=True)]


def _written(step: Step, blocks: Blocks, part: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tangents of what was written into and of what was, a tensor of shape ``part``, or zeros."""
    x, written = blocks
    some = x or written
    assert some is not None
    base = some.data.new_zeros(()) if x is None else x.full()
    source = some.data.new_zeros(()) if written is None else written.full()
    return base.expand(some.rows, *step.shape), source.expand(some.rows, *part)


@forward("SelectScatterBackward0")
def select_put(step: Step, blocks: Blocks) -> Sequence[Block]:
    """``y = x`` but ``y[k] = z``: ``t_x[v]`` with ``t_z[v]`` at ``k``."""
    dim = step.saved("dim") % len(step.shape)
    base, source = _written(step, blocks, (*step.shape[:dim], *step.shape[dim + 1 :]))
    return [Block(torch.select_scatter(base, source, dim + 1, step.saved("index")), step.shape)]


@forward("SliceScatterBackward0")
def slice_put(step: Step, blocks: Blocks) -> Sequence[Block]:
    """``y = x`` but ``y[a:b:s] = z``: ``t_x[v]`` with ``t_z[v]`` there."""
    dim = step.saved("dim") % len(step.shape)
    start, stop, stride = bounds(step, step.shape[dim])
    part = list(step.shape)
    part[dim] = len(range(start, stop, stride))
    base, source = _written(step, blocks, part)
    return [Block(torch.slice_scatter(base, source, dim + 1, start, stop, stride), step.shape)]


@single("DiagonalBackward0")
def diagonal(step: Step, t: Block) -> Block:
    """``y[i] = x[i, i + k]``: ``t[v, i, i + k]``."""
    dims = [step.saved(name) % len(t.shape) for name in ("dim1", "dim2")]
    data = t.spread(*dims).diagonal(step.saved("offset"), *(d + 1 for d in dims))
    return Block(data, step.shape)


@single("DiagEmbedBackward0")
def diag_embed(step: Step, t: Block) -> Block:
    """``y[i, i + k] = x[i]``: ``t[v, i]`` there, zero elsewhere."""
    dims = [step.saved(name) % len(step.shape) + 1 for name in ("dim1", "dim2")]
    return Block(torch.diag_embed(t.spread(-1), step.saved("offset"), *dims), step.shape)


@single("UnfoldBackward0")
def windows(step: Step, t: Block) -> Any:
    """``y[p, k] = x[p s + k]``: ``t[v, p s + k]``."""
    if not t.shape:
        return NotImplemented
    dim = step.saved("dimension") % len(t.shape)
    data = t.spread(dim).unfold(dim + 1, step.saved("size"), step.saved("step"))
    return Block(data, step.shape)


@single("ConstantPadNdBackward0")
def constant_pad(step: Step, t: Block) -> Block:
    """``y = x`` between constants: ``t[v]`` between zeros, cropped where ``y`` crops ``x``."""
    margins = pads(step)
    data = t.spread(*(d for d, margin in enumerate(margins) if margin != (0, 0)))
    return Block(F.pad(data, [size for margin in reversed(margins) for size in margin]), step.shape)
