"""Nodes that move entries by an index: select, gather, scatter, sort, advanced indexing, embedding.

The index is the same for all rows and is expanded over them, never copied. What was gathered from
several places adds up there; what was overwritten gets zero, whatever its cotangent.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Edge, Step
from batchjac.rules.apart import split
from batchjac.rules.pool import put
from batchjac.rules.registry import Blocks, forward, only, rule, single
from batchjac.rules.zeros import onto
from batchjac.samples import SHARED, Place, SampleAxis, moved


def added(data: Tensor, dim: int, size: int, index: Tensor) -> Tensor:
    """Zeros of ``size`` along ``dim`` to which ``data[..., k, ...]`` is added at ``index[k]``."""
    sizes = list(data.shape)
    sizes[dim] = size
    return onto(data.new_zeros(sizes), "index_add", dim, index, data)


def _across(step: Step, at: SampleAxis) -> list[Place]:
    """Samples stay apart along every axis but the indexed one, where the whole of it is used."""
    if not step.shape or at.dim == step.saved("dim") % len(step.shape):
        return [None for _ in step.edges]
    size = step.shape[at.dim]
    return [at if e and e.shape[at.dim] == size else None for e in step.edges]


@rule("IndexSelectBackward0", samples=_across)
def index_select(step: Step, blocks: Blocks) -> Any:
    """``y[k] = x[i_k]``: ``g[v,k]`` added at ``i_k``."""
    g, edge = only(step, blocks)
    if not edge.shape:
        return NotImplemented
    dim = step.saved("dim") % len(edge.shape)
    index = step.saved("index").reshape(-1)
    return [Block(added(g.spread(dim), dim + 1, edge.shape[dim], index), edge.shape)]


@single("IndexSelectBackward0")
def index_select_forward(step: Step, t: Block) -> Any:
    """``t[v, i_k]``."""
    if not t.shape:
        return NotImplemented
    dim = step.saved("dim") % len(t.shape) + 1
    index = step.saved("index").reshape(-1)
    return Block(t.data if t.data.shape[dim] == 1 else t.data.index_select(dim, index), step.shape)


@rule("GatherBackward0", samples=_across)
def gather(step: Step, blocks: Blocks) -> Any:
    """``y[..., k, ...] = x[..., i(..., k, ...), ...]``: ``g[v]`` added at ``i``."""
    g, edge = only(step, blocks)
    if not edge.shape or step.saved("sparse_grad"):
        return NotImplemented
    dim = step.saved("dim") % len(edge.shape)
    index = step.saved("index").expand(g.rows, *g.shape)
    zeros = g.data.new_zeros(g.rows, *edge.shape)
    return [Block(onto(zeros, "scatter_add", dim + 1, index, g.full()), edge.shape)]


@rule("SortBackward0", "SortBackward1", "TopkBackward0", samples=_across)
def sort(step: Step, blocks: Blocks) -> Any:
    """``y[..., k, ...] = x[..., i(..., k, ...), ...]``, each entry once: ``g[v]`` at ``i``."""
    g, edge = only(step, blocks)
    if not edge.shape:
        return NotImplemented
    dim = step.saved("dim") % len(edge.shape)
    data = put(g.full(), dim + 1, edge.shape[dim], step.saved("indices"), add=False)
    return [Block(data, edge.shape)]


def _gathered(step: Step, t: Block, index: Tensor) -> Any:
    """``t[v]`` at the index along the node's axis."""
    if not t.shape:
        return NotImplemented
    rows = t.full().gather(step.saved("dim") % len(t.shape) + 1, index.expand(t.rows, *index.shape))
    return Block(rows, step.shape)


@single("GatherBackward0")
def gather_forward(step: Step, t: Block) -> Any:
    """``t[v, ..., i(..., k, ...), ...]``."""
    if step.saved("sparse_grad"):
        return NotImplemented
    return _gathered(step, t, step.saved("index"))


@single("SortBackward0", "SortBackward1", "TopkBackward0")
def sort_forward(step: Step, t: Block) -> Any:
    """``t[v, ..., i(..., k, ...), ...]``."""
    return _gathered(step, t, step.saved("indices"))


def _source(step: Step, g: Block) -> Tensor:
    """``g`` at the places of the index, for what was put there."""
    index = step.saved("index").expand(g.rows, *step.saved("index").shape)
    return g.full().gather(step.saved("dim") % len(g.shape) + 1, index)


@rule("ScatterBackward0", "ScatterBackward1", "ScatterAddBackward0", samples=_across)
def scatter(step: Step, blocks: Blocks) -> Any:
    """``y = x``, at ``i`` replaced by or added to ``z``: ``g[v]``, zero at what was replaced.

    Toward z: ``g[v]`` at ``i``.
    """
    (g,) = blocks
    assert g is not None
    x, source = step.wanted(0), step.wanted(1)
    index = step.saved("index")
    if not g.shape or (source is not None and source.shape != tuple(index.shape)):
        return NotImplemented
    found: list[Block | None] = [None] * len(step.edges)
    if x is not None:
        found[0] = g
        if not step.name.startswith("ScatterAdd"):
            where = index.expand(g.rows, *index.shape)
            dim = step.saved("dim") % len(g.shape) + 1
            found[0] = g.with_data(g.full().scatter(dim, where, 0))
    if source is not None:
        found[1] = Block(_source(step, g), source.shape)
    return found


def _pair(step: Step, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
    """Tangents of what was written into, zero where there are none, and of what was written.

    Autograd lets everything that was written to one place count there; so the sum of it.
    """
    x, source = blocks[0], blocks[1] if len(blocks) > 1 else None
    some = x or source
    assert some is not None
    base = some.data.new_zeros(some.rows, *step.shape) if x is None else x.full()
    return base, None if source is None else source.full()


@forward("ScatterBackward0", "ScatterBackward1", "ScatterAddBackward0")
def scatter_forward(step: Step, blocks: Blocks) -> Any:
    """``t_x[v]``, at ``i`` replaced by or added to ``t_z[v]``."""
    index, written = step.saved("index"), step.wanted(1)
    if not step.shape or (written is not None and written.shape != tuple(index.shape)):
        return NotImplemented
    base, source = _pair(step, blocks)
    dim = step.saved("dim") % len(step.shape) + 1
    where = index.expand(base.shape[0], *index.shape)
    if not step.name.startswith("ScatterAdd"):
        base = base.scatter(dim, where, 0)
    return [Block(base if source is None else base.scatter_add(dim, where, source), step.shape)]


@rule("IndexAddBackward0", "IndexCopyBackward0", "IndexFillBackward0", samples=_across)
def index_into(step: Step, blocks: Blocks) -> Any:
    """``y = x``, at ``i_k`` replaced by or added to ``z[k]``: ``g[v]``, zero at what was replaced.

    Toward z: ``g[v, i_k]``, times what ``z`` was multiplied by.
    """
    (g,) = blocks
    assert g is not None
    factor = step.saved("alpha") if step.has("alpha") else 1
    if not g.shape or isinstance(factor, complex):
        return NotImplemented
    dim = step.saved("dim") % len(g.shape)
    index = step.saved("index").reshape(-1)
    found: list[Block | None] = [None] * len(step.edges)
    x, source = step.wanted(0), step.wanted(1)
    if x is not None:
        adds = step.name.startswith("IndexAdd")
        found[0] = g if adds else g.with_data(g.spread(dim).index_fill(dim + 1, index, 0))
    if source is not None:
        data = g.data if g.data.shape[dim + 1] == 1 else g.data.index_select(dim + 1, index)
        found[1] = Block(data if factor == 1 else data * factor, source.shape)
    return found


@forward("IndexAddBackward0", "IndexCopyBackward0", "IndexFillBackward0")
def index_into_forward(step: Step, blocks: Blocks) -> Any:
    """``t_x[v]``, at ``i_k`` replaced by or added to ``t_z[v,k]``."""
    if not step.shape:
        return NotImplemented
    base, source = _pair(step, blocks)
    dim = step.saved("dim") % len(step.shape) + 1
    index = step.saved("index").reshape(-1)
    if not step.name.startswith("IndexAdd"):
        base = base.index_fill(dim, index, 0)
    if source is not None:
        factor = step.saved("alpha") if step.has("alpha") else 1
        base = base.index_add(dim, index, source, alpha=factor)
    return [Block(base, step.shape)]


@rule("MaskedSelectBackward0", samples=lambda step, at: [None])
def masked_select(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = x`` where the mask holds, in row-major order: ``g[v]`` there, zero elsewhere."""
    g, edge = only(step, blocks)
    mask = step.saved("mask")
    shape = torch.broadcast_shapes(mask.shape, edge.shape)
    zeros = g.data.new_zeros(g.rows, *shape)
    data = onto(zeros, "masked_scatter", mask.expand(zeros.shape), g.full())
    return [Block(data, tuple(shape)).sum_to(edge.shape)]


@single("MaskedSelectBackward0")
def masked_select_forward(step: Step, t: Block) -> Block:
    """``t[v]`` where the mask holds."""
    mask = step.saved("mask")
    shape = torch.broadcast_shapes(mask.shape, t.shape)
    return Block(t.broadcast_to(shape).full()[:, mask.expand(shape)], step.shape)


@rule("TakeBackward0", samples=lambda step, at: [None])
def take(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[k] = x.flatten()[i_k]``: ``g[v,k]`` added at ``i_k``."""
    g, edge = only(step, blocks)
    index = step.saved("index").flatten()
    size = math.prod(edge.shape)
    flat = g.reshape((index.numel(),)).full()
    return [Block(added(flat, 1, size, index % size).reshape(g.rows, *edge.shape), edge.shape)]


@single("TakeBackward0")
def take_forward(step: Step, t: Block) -> Block:
    """``t[v].flatten()[i_k]``."""
    size = math.prod(t.shape)
    flat = t.full().reshape(t.rows, size)
    data = flat.index_select(1, step.saved("index").flatten() % size)
    return Block(data.reshape(t.rows, *step.shape), step.shape)


def _embedding_samples(step: Step, at: SampleAxis) -> list[Place]:
    """The indices have the samples, the table has none; features stay apart."""
    features = len(step.shape) - 1
    return [moved(at, 1) if at.dim == features else SHARED]


def _tables(step: Step, g: Tensor, index: Tensor, edge: Edge, count: int = 1) -> Tensor:
    """``g[v,k,d]`` added at ``index[k]`` of ``count`` tables one after the other, [v*count, i, d].

    Nothing is added for the word that only fills up sentences.
    """
    words = edge.shape[0]
    ignored = index % words == step.saved("padding_idx")
    if ignored.any():
        g = g.masked_fill(ignored[:, None], 0)
    return added(g, 1, count * words, index).reshape(-1, *edge.shape[:1], g.shape[2])


def _embedding_alone(step: Step, blocks: Blocks, at: SampleAxis) -> Any:
    """``g[v,n,k,d]`` added at ``index[n,k]`` of sample ``n``'s own table."""
    g, edge = only(step, blocks)
    if step.saved("scale_grad_by_freq"):
        return NotImplemented
    index = split(step.saved("indices"), g.shape, at, at.dim).movedim(at.dim + 1, 0)
    samples = index.shape[0]
    table = torch.arange(samples, device=index.device)
    index = index.reshape(samples, -1) + edge.shape[0] * table[:, None]
    data = split(g.spread(*range(len(g.shape) - 1)), g.shape, at, at.dim + 1)
    flat = data.movedim(at.dim + 2, 1).flatten(1, -2)
    return [Block(_tables(step, flat, index.flatten(), edge, samples), edge.shape)]


@rule("EmbeddingBackward0", samples=_embedding_samples, per_sample=_embedding_alone)
def embedding(step: Step, blocks: Blocks) -> Any:
    """``y[k,d] = w[i_k, d]``: ``g[v,k,d]`` added at ``i_k``."""
    g, edge = only(step, blocks)
    if step.saved("scale_grad_by_freq"):
        return NotImplemented
    flat = g.spread(*range(len(g.shape) - 1))
    flat = flat.reshape(g.rows, math.prod(g.shape[:-1]), flat.shape[-1])
    return [Block(_tables(step, flat, step.saved("indices").flatten(), edge), edge.shape)]


@single("EmbeddingBackward0")
def embedding_forward(step: Step, t: Block) -> Any:
    """``t[v, i_k, d]``; nothing for the word that only fills up sentences."""
    if step.saved("scale_grad_by_freq"):
        return NotImplemented
    index = step.saved("indices")
    data = t.spread(0).index_select(1, index.flatten())
    ignored = index.flatten() == step.saved("padding_idx")
    if ignored.any():
        data = data.masked_fill(ignored[:, None], 0)
    return Block(data.reshape(t.rows, *index.shape, data.shape[-1]), step.shape)
