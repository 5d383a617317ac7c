"""Nodes that fold axes together: sums, means, norms, extrema.

The cotangent of a folded axis is the same all along it, so the axis comes back with size 1. A sum
is done then; the others multiply by their derivative, the node called once on ones, or keep the
entries that were chosen.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.diagonal import keep, times, zero
from batchjac.rules.pointwise import derivative, only, real_within_complex
from batchjac.rules.registry import Blocks, forward, rule, single
from batchjac.samples import Place, SampleAxis, moved

WEIGHTED = (
    "AmaxBackward0", "AminBackward0", "AminmaxBackward0", "LinalgVectorNormBackward0",
    "LogsumexpBackward0", "NansumBackward0", "NormBackward0", "NormBackward1", "NormBackward2",
    "NormBackward3", "ProdBackward0", "ProdBackward1", "StdBackward0", "StdMeanBackward0",
    "VarBackward0", "VarMeanBackward0",
)  # fmt: skip


def folded(step: Step) -> tuple[int, ...]:
    """The axes of the input that were folded, all of them unless the node saved which."""
    (edge,) = step.edges
    assert edge is not None
    count = len(edge.shape)
    dim = step.saved("dim") if step.has("dim") else None
    if dim is None or dim == ():
        return tuple(range(count))
    dims = (dim,) if isinstance(dim, int) else dim
    return tuple(sorted({d % count for d in dims})) if count else ()


def kept(step: Step) -> list[int]:
    """For each axis of the output, the axis of the input that it was."""
    (edge,) = step.edges
    assert edge is not None
    dims = folded(step)
    every = range(len(edge.shape))
    return [d for d in every if d not in dims or (step.has("keepdim") and step.saved("keepdim"))]


def reduced_samples(step: Step, at: SampleAxis) -> list[Place]:
    """The axes that were not folded stay, in their order."""
    dim = kept(step)[at.dim]
    return [None if dim in folded(step) else moved(at, dim)]


def restored(step: Step, g: Block) -> Block:
    """The block with the folded axes back, each of size 1."""
    (edge,) = step.edges
    assert edge is not None
    sizes = dict(zip(kept(step), g.data.shape[1:], strict=True))
    data = g.data.reshape(g.rows, *(sizes.get(d, 1) for d in range(len(edge.shape))))
    return Block(data, edge.shape)


def fold(step: Step, t: Block) -> Block:
    """Tangents of the input summed over the folded axes, in the shape of the output."""
    dims = folded(step)
    rows = t.sum_to([1 if d in dims else size for d, size in enumerate(t.shape)]).data
    return Block(rows.reshape(t.rows, *(rows.shape[1 + d] for d in kept(step))), step.shape)


@rule("SumBackward0", "SumBackward1", samples=reduced_samples)
def summed(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[n] = sum_k x[n,k]``: ``g[v n]`` for every ``k``."""
    return [restored(step, only(blocks))]


@single("SumBackward0", "SumBackward1")
def summed_forward(step: Step, t: Block) -> Block:
    """``sum_k t[v n k]``."""
    return fold(step, t)


@rule("MeanBackward0", "MeanBackward1", samples=reduced_samples)
def mean(step: Step, blocks: Blocks) -> Any:
    """``y[n] = sum_k x[n,k] / K``: ``g[v n] / K`` for every ``k``."""
    g = restored(step, only(blocks))
    terms = math.prod(g.shape[d] for d in folded(step))
    return [g.with_data(g.data / terms)] if terms else NotImplemented


@single("MeanBackward0", "MeanBackward1")
def mean_forward(step: Step, t: Block) -> Any:
    """``sum_k t[v n k] / K``."""
    terms = math.prod(t.shape[d] for d in folded(step))
    found = fold(step, t)
    return found.with_data(found.data / terms) if terms else NotImplemented


@rule(*WEIGHTED, samples=reduced_samples)
def weighted(step: Step, blocks: Blocks) -> Any:
    """``y_j[n] = f_j(x[n,:])``: ``sum_j g_j[v n] f_j'(x)[n,k]``."""
    if real_within_complex(step):
        return NotImplemented
    total = None
    for j, g in enumerate(blocks):
        if g is None:
            continue
        if step.name.startswith("Std") and j == 0:  # std has no slope where nothing varies
            g = keep(g, step.saved("result" if step.has("result") else "result0") != 0)
        (weight,) = derivative(step, j)
        part = restored(step, g)
        part = zero(part) if weight is None else times(part, weight)
        total = part if total is None else total.plus(part)
    return [total]


@forward(*WEIGHTED)
def weighted_forward(step: Step, blocks: Blocks) -> list[Block | None]:
    """``sum_k f_j'(x)[n,k] t[v n k]`` for each output ``j``."""
    t = only(blocks)
    found: list[Block | None] = []
    for j in range(len(step.outputs)):
        (weight,) = derivative(step, j)
        part = fold(step, zero(t) if weight is None else times(t, weight))
        if step.name.startswith("Std") and j == 0:
            part = keep(part, step.saved("result" if step.has("result") else "result0") != 0)
        found.append(part)
    return found


OF_ALL = ("MaxBackward1", "MinBackward1", "MedianBackward0", "NanmedianBackward0")
CHOSEN = (
    "KthvalueBackward0", "MaxBackward0", "MedianBackward1", "MinBackward0", "ModeBackward0",
    "NanmedianBackward1",
)  # fmt: skip


@rule(*OF_ALL, samples=reduced_samples)
def chosen_of_all(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = max x``: ``g[v]`` in equal parts toward the entries that attain it, 0 elsewhere."""
    (weight,) = derivative(step)
    assert weight is not None
    return [keep(times(restored(step, only(blocks)), weight), weight != 0)]


@single(*OF_ALL)
def chosen_of_all_forward(step: Step, t: Block) -> Block:
    """The mean of ``t[v]`` over the entries that attain the extremum."""
    (weight,) = derivative(step)
    assert weight is not None
    return fold(step, keep(times(t, weight), weight != 0))


@rule(*CHOSEN, samples=reduced_samples)
def chosen(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[n] = x[n,k(n)]``: ``g[v n]`` at ``k(n)``, 0 elsewhere."""
    g = restored(step, only(blocks))
    return [keep(g, _attained(step, g.shape))]


@single(*CHOSEN)
def chosen_forward(step: Step, t: Block) -> Block:
    """``t[v n k(n)]``."""
    if not t.shape:
        return t
    (dim,) = folded(step)
    index = step.saved("indices")
    if not step.saved("keepdim"):
        index = index.unsqueeze(dim)
    data = t.full().gather(dim + 1, index.expand(t.rows, *index.shape))
    return Block(data.reshape(t.rows, *step.shape), step.shape)


def _attained(step: Step, shape: Sequence[int]) -> Tensor:
    """Where in the input the chosen entries are."""
    index = step.saved("indices")
    if not shape:
        return torch.ones((), dtype=torch.bool, device=index.device)
    (dim,) = folded(step)
    if not step.saved("keepdim"):
        index = index.unsqueeze(dim)
    return torch.zeros(shape, dtype=torch.bool, device=index.device).scatter(dim, index, True)


def _class_axis(step: Step) -> int:
    """The axis of classes in the input of a classification loss; the output has none."""
    edge = step.edges[0]
    return 1 if edge is not None and len(edge.shape) > 1 else 0


def _loss_samples(step: Step, at: SampleAxis) -> list[Place]:
    """The other axes stay, in their order."""
    return [moved(at, at.dim + (at.dim >= _class_axis(step)))]


@rule("NllLossBackward0", "NllLoss2DBackward0", samples=_loss_samples)
def classified(step: Step, blocks: Blocks) -> Any:
    """``y[n] = -w x[n,t(n)]``: ``-w g[v n]`` at the target ``t(n)``, 0 elsewhere."""
    g = only(blocks)
    (edge,) = step.edges
    assert edge is not None
    if step.saved("reduction") != 0:
        return NotImplemented
    (weight,) = derivative(step)
    assert weight is not None
    rows = Block(g.data.unsqueeze(1 + _class_axis(step)), edge.shape)
    return [keep(times(rows, weight), weight != 0)]


@single("NllLossBackward0", "NllLoss2DBackward0")
def classified_forward(step: Step, t: Block) -> Any:
    """``-w t[v n t(n)]`` at the target."""
    if step.saved("reduction") != 0:
        return NotImplemented
    (weight,) = derivative(step)
    assert weight is not None
    rows = keep(times(t, weight), weight != 0)
    return Block(rows.data.sum(1 + _class_axis(step)), step.shape)


def _along(step: Step, at: SampleAxis) -> list[Place]:
    """A node that works along one axis, ``dim``, keeps the others apart."""
    size = len(step.shape)
    return [at if size and at.dim != step.saved("dim") % size else None]


@rule("CumsumBackward0", samples=_along)
def cumulated(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[n,k] = sum_{j<=k} x[n,j]``: ``sum_{j>=k} g[v n j]``."""
    g = only(blocks)
    (edge,) = step.edges
    assert edge is not None
    if not g.shape:
        return [g]
    dim = step.saved("dim") % len(g.shape)
    data = g.to(edge.meta.dtype).spread(dim).flip(dim + 1).cumsum(dim + 1).flip(dim + 1)
    return [g.with_data(data)]


@single("CumsumBackward0")
def cumulated_forward(step: Step, t: Block) -> Block:
    """``sum_{j<=k} t[v n j]``."""
    if not t.shape:
        return t
    dim = step.saved("dim") % len(t.shape)
    return t.with_data(t.spread(dim).cumsum(dim + 1))


@rule("CummaxBackward0", "CumminBackward0", samples=_along)
def cumulated_extremum(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[n,k] = x[n,i(n,k)]``: the sum of ``g[v n k]`` over the ``k`` that took ``i``."""
    g = only(blocks)
    if not g.shape:
        return [g]
    dim = step.saved("dim") % len(g.shape) + 1
    rows = g.full()
    index = step.saved("indices").expand(rows.shape)
    return [g.with_data(torch.zeros_like(rows).scatter_add(dim, index, rows))]


@single("CummaxBackward0", "CumminBackward0")
def cumulated_extremum_forward(step: Step, t: Block) -> Block:
    """``t[v n i(n,k)]``."""
    if not t.shape:
        return t
    rows = t.full()
    index = step.saved("indices").expand(rows.shape)
    return t.with_data(rows.gather(step.saved("dim") % len(t.shape) + 1, index))


@rule("CumprodBackward0", "LogcumsumexpBackward0", samples=_along)
def left_to_the_node(step: Step, blocks: Blocks) -> Any:
    """Every entry depends on all before it: the node's own formula, row by row."""
    return NotImplemented
