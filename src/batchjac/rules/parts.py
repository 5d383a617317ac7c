"""Nodes that take a tensor apart or put tensors together: select, slice, split, cat, pad.

What is taken out of a tensor gives zeros to the rest of it; only the axis concerned is brought to
its full size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac.block import Block
from batchjac.graph import Edge, Meta, Step
from batchjac.rules.registry import Blocks, Gathered, only, rule
from batchjac.rules.shape import inverse, read_in
from batchjac.samples import Place, SampleAxis, moved


def _all(step: Step, place: Place) -> list[Place]:
    return [None if e is None else place for e in step.edges]


def _sizes(data: Tensor, dim: int, size: int) -> list[int]:
    """The sizes of ``data`` with another size along ``dim``."""
    sizes = list(data.shape)
    sizes[dim] = size
    return sizes


def common(sizes: Iterable[Sequence[int]]) -> list[int]:
    """What sizes of as many axes are broadcast to; torch takes ten times as long."""
    return [next((n for n in along if n != 1), 1) for along in zip(*sizes, strict=True)]


def _select_samples(step: Step, at: SampleAxis) -> list[Place]:
    """The axis selected from returns, and those after it move up."""
    dim = step.saved("dim") % (len(step.shape) + 1)
    return [moved(at, at.dim + (dim <= at.dim))]


@dataclass
class Slices:
    """Rows of some slices ``x[k]`` along ``dim`` of the edge's tensor, and of all of it."""

    edge: Edge
    dim: int
    found: dict[int, Block]
    rest: Block | None = None

    def take(self, other: Block | Gathered) -> None:
        """Rows of the same slice are added, and what is no slice along this axis is a rest."""
        if isinstance(other, Slices) and other.dim == self.dim:
            assert other.rest is None
            for k, block in other.found.items():
                before = self.found.get(k)
                self.found[k] = block if before is None else before.plus(block)
        else:
            whole = other if isinstance(other, Block) else other.block()
            self.rest = whole if self.rest is None else self.rest.plus(whole)
        if self.rest is not None and self.rest.writable:  # no need to keep both
            for k, part in self._parts().items():
                self.rest.data.narrow(self.dim + 1, k, 1).add_(part)
            self.found.clear()

    def block(self) -> Block:
        """Side by side; zeros are written only where a slice is missing."""
        if not self.found:
            assert self.rest is not None
            return self.rest
        parts, size = self._parts(), self.edge.shape[self.dim]
        recorded = torch.is_grad_enabled()
        if len(parts) == size or recorded:  # recorded writes would each copy all of it
            zero = torch.zeros_like(next(iter(parts.values())))
            whole = _joined([parts.get(k, zero) for k in range(size)], self.dim, self.edge)
        else:
            whole = self._among_zeros(parts)
        whole = whole.owned_if(not recorded)
        return whole if self.rest is None else whole.plus(self.rest)

    def _parts(self) -> dict[int, Tensor]:
        """The slices, each with an axis of size 1 where it was cut, all of the same sizes."""
        shape = (*self.edge.shape[: self.dim], 1, *self.edge.shape[self.dim + 1 :])
        parts = {k: block.reshape(shape).data for k, block in self.found.items()}
        if not parts:
            return {}
        sizes = common(_sizes(p, self.dim + 1, 1) for p in parts.values())
        return {k: part.expand(sizes) for k, part in parts.items()}

    def _among_zeros(self, parts: dict[int, Tensor]) -> Block:
        one = next(iter(parts.values()))
        sizes = _sizes(one, self.dim + 1, self.edge.shape[self.dim])
        order = read_in(self.edge)
        data = one.new_zeros([sizes[d] for d in order]).permute(inverse(order))
        for k, part in parts.items():
            data.narrow(self.dim + 1, k, 1).copy_(part)
        return Block(data, self.edge.shape)


def _slice(step: Step, blocks: Blocks) -> Slices:
    g, edge = only(step, blocks)
    dim = step.saved("dim") % len(edge.shape)
    data = g.data
    if data.untyped_storage().nbytes() > 2 * data.nbytes and not torch.is_grad_enabled():
        g = g.with_data(data.clone())  # while it waits, a view keeps all that it is a view of
    return Slices(edge, dim, {step.saved("index") % edge.shape[dim]: g})


@rule("SelectBackward0", samples=_select_samples, gather=_slice)
def select(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = x[k]``: ``g[v]`` at ``k``, zero elsewhere."""
    return [_slice(step, blocks).block()]


def _along_dim(step: Step, at: SampleAxis) -> list[Place]:
    """Samples stay where they are unless the node cuts their own axis."""
    (edge,) = step.edges
    assert edge is not None
    same = edge.shape == step.shape
    return [at if same or at.dim != step.saved("dim") % len(step.shape) else None]


@rule("SliceBackward0", "NarrowCopyBackward0", samples=_along_dim)
def cut(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = x[a:b:s]``: ``g[v]`` there, zero elsewhere."""
    g, edge = only(step, blocks)
    dim = step.saved("dim") % len(edge.shape)
    start, stop, stride = bounds(step, edge.shape[dim])
    if (start, stop, stride) == (0, edge.shape[dim], 1):
        return [g]
    data = g.spread(dim)
    sizes = _sizes(data, dim + 1, edge.shape[dim])
    return [
        Block(torch.ops.aten.slice_backward(data, sizes, dim + 1, start, stop, stride), edge.shape)
    ]


def bounds(step: Step, size: int) -> tuple[int, int, int]:
    """Start, stop and step of what was cut out of an axis of this size."""
    if step.name == "NarrowCopyBackward0":
        start = step.saved("start")
        where = slice(start, start + step.saved("length"), 1)
    else:
        where = slice(step.saved("start"), step.saved("end"), step.saved("step"))
    return where.indices(size)


def _cat_samples(step: Step, at: SampleAxis) -> list[Place]:
    along = step.saved("dim") % len(step.shape) == at.dim
    return _all(step, None if along else at)


@rule("CatBackward0", samples=_cat_samples)
def cat(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = [x_1, x_2, ...]``: the part of ``g[v]`` that came from each."""
    (g,) = blocks
    assert g is not None
    dim = step.saved("dim") % len(g.shape)
    if g.data.shape[dim + 1] == 1:
        return [Block(g.data, e.shape) if e and _in_cat(step, e) else None for e in step.edges]
    found: list[Block | None] = []
    for edge, start in zip(step.edges, starts(step, dim), strict=True):
        if edge is None or start is None:
            found.append(None)
        else:
            data = g.data.narrow(dim + 1, start, edge.shape[dim])
            found.append(Block(data, edge.shape))
    return found


def _in_cat(step: Step, edge: Edge) -> bool:
    """``cat`` skips tensors of shape ``[0]`` whatever the others' axes."""
    return len(edge.shape) == len(step.shape)


def starts(step: Step, dim: int) -> list[int | None]:
    """Where each tensor begins along ``dim``.

    The node keeps no sizes of the tensors that need no gradient, but hands out parts of whatever
    it is given: so it is given the positions.
    """
    found: list[int | None] = step.called(f"starts {dim}", partial(_starts, dim=dim))
    return found


def _starts(step: Step, dim: int) -> list[int | None]:
    place = torch.arange(step.shape[dim], dtype=torch.float64)
    shape = [1] * len(step.shape)
    shape[dim] = -1
    parts = step.node(place.reshape(shape).expand(step.shape))
    if isinstance(parts, Tensor):  # of a single tensor
        parts = (parts,)
    return [
        int(part[(0,) * part.dim()]) if edge and _in_cat(step, edge) and part.numel() else None
        for edge, part in zip(step.edges, parts, strict=True)
    ]


def _stack_samples(step: Step, at: SampleAxis) -> list[Place]:
    dim = step.saved("dim") % len(step.shape)
    return _all(step, None if at.dim == dim else moved(at, at.dim - (dim < at.dim)))


@rule("StackBackward0", samples=_stack_samples)
def stack(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[k] = x_k``: ``g[v, k]`` for each."""
    (g,) = blocks
    assert g is not None
    dim = step.saved("dim") % len(g.shape)
    parts = g.spread(dim).unbind(dim + 1)
    return [
        None if e is None else Block(part, e.shape)
        for e, part in zip(step.edges, parts, strict=True)
    ]


def _filled(blocks: Blocks, outputs: Sequence[Meta], dim: int) -> list[Tensor]:
    """The parts with the same sizes but along ``dim``; zeros where no gradient arrived."""
    present = [b.spread(dim) for b in blocks if b is not None]
    sizes = common(_sizes(p, dim + 1, 1) for p in present)
    spread = iter(present)
    parts = []
    for block, meta in zip(blocks, outputs, strict=True):
        sizes[dim + 1] = meta.shape[dim]
        found = present[0].new_zeros(sizes) if block is None else next(spread)
        parts.append(found if found.shape == tuple(sizes) else found.expand(sizes))
    return parts


@rule(
    "SplitBackward0", "SplitWithSizesBackward0",
    "UnsafeSplitBackward0", "UnsafeSplitWithSizesBackward0",
    samples=_along_dim,
)  # fmt: skip
def split(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y_1, y_2, ... = x``: ``[g_1[v], g_2[v], ...]``."""
    (edge,) = step.edges
    assert edge is not None
    dim = step.saved("dim") % len(edge.shape)
    return [_joined(_filled(blocks, step.outputs, dim), dim, edge)]


def _joined(parts: list[Tensor], dim: int, edge: Edge) -> Block:
    """The parts side by side along ``dim``, in the order in which the whole will be read."""
    order = read_in(edge)
    if order == sorted(order):
        return Block(torch.cat(parts, dim + 1), edge.shape)
    data = torch.cat([part.permute(order) for part in parts], order.index(dim + 1))
    return Block(data.permute(inverse(order)), edge.shape)


@rule("UnbindBackward0", samples=_select_samples)
def unbind(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y_k = x[k]``: ``[g_1[v], g_2[v], ...]``, stacked."""
    (edge,) = step.edges
    assert edge is not None
    dim = step.saved("dim") % len(edge.shape)
    shape = (*edge.shape[:dim], 1, *edge.shape[dim + 1 :])
    apart = [b and b.reshape(shape) for b in blocks]
    outputs = [replace(meta, shape=shape) for meta in step.outputs]
    return [_joined(_filled(apart, outputs, dim), dim, edge)]


def _select_put_samples(step: Step, at: SampleAxis) -> list[Place]:
    """Samples stay apart along every axis but the one written at."""
    dim = step.saved("dim") % len(step.shape)
    if at.dim == dim:
        return [None for _ in step.edges]
    return [at, moved(at, at.dim - (dim < at.dim))]


@rule("SelectScatterBackward0", samples=_select_put_samples)
def select_put(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = x`` but ``y[k] = z``: ``g[v]`` with zero at ``k``; toward z ``g[v,k]``."""
    (g,) = blocks
    assert g is not None
    dim = step.saved("dim") % len(g.shape)
    data, index = g.spread(dim), step.saved("index")
    x, written = step.edges
    part = data.select(dim + 1, index)
    zero = torch.zeros_like(part)
    return [
        None if x is None else Block(torch.select_scatter(data, zero, dim + 1, index), x.shape),
        None if written is None else Block(part, written.shape),
    ]


@rule("SliceScatterBackward0", samples=_cat_samples)
def slice_put(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = x`` but ``y[a:b:s] = z``: ``g[v]`` with zero there; toward z ``g[v, a:b:s]``."""
    (g,) = blocks
    assert g is not None
    dim = step.saved("dim") % len(g.shape)
    start, stop, stride = bounds(step, g.shape[dim])
    data = g.spread(dim)
    x, written = step.edges
    part = data.movedim(dim + 1, 0)[start:stop:stride].movedim(0, dim + 1)
    zero = torch.zeros_like(part)
    where = (dim + 1, start, stop, stride)
    return [
        None if x is None else Block(torch.slice_scatter(data, zero, *where), x.shape),
        None if written is None else Block(part, written.shape),
    ]


def _others(step: Step, rank: int) -> list[int]:
    """The axes that a diagonal of a tensor of ``rank`` axes leaves alone, in order."""
    pair = (step.saved("dim1") % rank, step.saved("dim2") % rank)
    return [d for d in range(rank) if d not in pair]


def _diagonal_samples(step: Step, at: SampleAxis) -> list[Place]:
    others = _others(step, len(step.shape) + 1)
    return [moved(at, others[at.dim]) if at.dim < len(others) else None]


@rule("DiagonalBackward0", samples=_diagonal_samples)
def diagonal(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[i] = x[i, i + k]``: ``g[v, i]`` there, zero elsewhere."""
    g, edge = only(step, blocks)
    rank = len(edge.shape)
    dims = [step.saved(name) % rank + 1 for name in ("dim1", "dim2")]
    data = g.spread(-1)
    sizes = [data.shape[0], *edge.shape]
    for k, d in enumerate(_others(step, rank)):
        sizes[d + 1] = data.shape[k + 1]
    return [
        Block(
            torch.ops.aten.diagonal_backward(data, sizes, step.saved("offset"), *dims), edge.shape
        )
    ]


def _embed_samples(step: Step, at: SampleAxis) -> list[Place]:
    others = _others(step, len(step.shape))
    return [moved(at, others.index(at.dim)) if at.dim in others else None]


@rule("DiagEmbedBackward0", samples=_embed_samples)
def diag_embed(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[i, i + k] = x[i]``: ``g[v, i, i + k]``."""
    g, edge = only(step, blocks)
    dims = [step.saved(name) % len(g.shape) for name in ("dim1", "dim2")]
    shifted = [d + 1 for d in dims]
    return [Block(g.spread(*dims).diagonal(step.saved("offset"), *shifted), edge.shape)]


def _window_samples(step: Step, at: SampleAxis) -> list[Place]:
    rank = len(step.shape) - 1
    cut = (step.saved("dimension") % max(rank, 1), rank)
    return [None if at.dim in cut else at]


@rule("UnfoldBackward0", samples=_window_samples)
def windows(step: Step, blocks: Blocks) -> Any:
    """``y[p, k] = x[p s + k]``: ``sum over p s + k = i of g[v, p, k]``."""
    g, edge = only(step, blocks)
    if not edge.shape:
        return NotImplemented
    dim = step.saved("dimension") % len(edge.shape)
    data = g.spread(dim, -1)
    sizes = _sizes(data[..., 0], dim + 1, edge.shape[dim])
    how = (step.saved("size"), step.saved("step"))
    return [Block(torch.ops.aten.unfold_backward(data, sizes, dim + 1, *how), edge.shape)]


def pads(step: Step) -> list[tuple[int, int]]:
    """Before and after each axis; the node keeps them from the last axis on."""
    pad = step.saved("pad")
    pairs = [(pad[k], pad[k + 1]) for k in range(0, len(pad), 2)]
    return [(0, 0)] * (len(step.shape) - len(pairs)) + pairs[::-1]


def _pad_samples(step: Step, at: SampleAxis) -> list[Place]:
    return [at if pads(step)[at.dim] == (0, 0) else None]


@rule("ConstantPadNdBackward0", samples=_pad_samples)
def constant_pad(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = x`` between constants: ``g[v]`` without its margins, zero where ``y`` cropped ``x``."""
    g, edge = only(step, blocks)
    data = g.data
    zeros: list[int] = []
    for d, (before, after) in enumerate(pads(step)):
        margin = (max(before, 0), max(after, 0))
        cropped = (max(-before, 0), max(-after, 0))
        zeros = [*cropped, *zeros]
        size = edge.shape[d] - sum(cropped)
        if data.shape[d + 1] != 1 or any(cropped):
            data = data.expand(_sizes(data, d + 1, g.shape[d])).narrow(d + 1, margin[0], size)
    return [Block(F.pad(data, zeros) if any(zeros) else data, edge.shape)]
