"""Gradients of what all samples share, one per sample instead of their sum.

A tensor that was broadcast over the samples gets the sum of its rows over them. Here the sample
axis joins the rows, ``[V, ..., N, ...]`` to ``[V*N, ..., 1, ...]``, before anything is summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.registry import Blocks, Forward, Reverse, elementwise, first, forward, rule
from batchjac.samples import SampleAxis


def count(shape: Sequence[int], at: SampleAxis) -> int:
    """The number of samples along ``at`` in a tensor of this shape."""
    return shape[at.dim] // (at.outer * at.inner)


def split(data: Tensor, shape: Sequence[int], at: SampleAxis, dim: int) -> Tensor:
    """Axis ``dim`` of ``data`` as three axes, ``outer, N, inner``; each 1 where it is repeated."""
    whole = data.shape[dim] == shape[at.dim]
    sizes = (at.outer, count(shape, at), at.inner) if whole else (1, 1, 1)
    return data.reshape(*data.shape[:dim], *sizes, *data.shape[dim + 1 :])


def each_sample(block: Block, at: SampleAxis, shape: Sequence[int]) -> Block:
    """Rows ``[V*N, *shape]``: the block summed to ``shape``, for every sample by itself."""
    samples = count(block.shape, at)
    parts = split(block.data, block.shape, at, at.dim + 1)
    data = parts.movedim(at.dim + 2, 1).flatten(at.dim + 2, at.dim + 3)  # [V, N or 1, *rest]
    rest = (*block.shape[: at.dim], at.outer * at.inner, *block.shape[at.dim + 1 :])
    summed = Block(data.flatten(0, 1), rest).sum_to(shape)
    rows = summed.data.unflatten(0, (block.rows, data.shape[1]))
    rows = rows.expand(-1, samples, *(-1,) * len(shape)).flatten(0, 1)
    return Block(rows, summed.shape)


def entrywise(*names: str, fresh: bool = False) -> Callable[[Reverse], Reverse]:
    """Register the rules of nodes whose edges were broadcast to their output, entry by entry.

    It gives for each edge a block of the output's shape, from which each sample's sum follows, and
    the forward rule too.
    """

    def register(reverse: Reverse) -> Reverse:
        def per_sample(step: Step, blocks: Blocks, at: SampleAxis) -> Any:
            found = reverse(step, blocks)
            if found is NotImplemented:
                return NotImplemented
            return [
                None if b is None or e is None else each_sample(b, at, e.shape)
                for b, e in zip(found, step.edges, strict=True)
            ]

        forward(*names)(diagonal(reverse))
        return rule(*names, samples=elementwise, per_sample=per_sample, fresh=fresh)(reverse)

    return register


def diagonal(reverse: Reverse) -> Forward:
    """The forward rule of a node that acts entry by entry: a diagonal is its own transpose."""

    def push(step: Step, blocks: Blocks) -> Any:
        """``sum_k t_k[v n] f_k'(x)[n]``, each argument ``k`` broadcast to the output."""
        total: Block | None = None
        for k, tangent in enumerate(blocks):
            if tangent is None:
                continue
            if len(tangent.shape) > len(step.shape):  # a loss that was reduced to a number
                return NotImplemented
            edges = tuple(e if j == k else None for j, e in enumerate(step.edges))
            rows = first(step, tangent.broadcast_to(step.shape))
            found = reverse(replace(step, edges=edges), rows)
            if found is NotImplemented:
                return NotImplemented
            part = found[k]
            if part is not None:
                part = part.on(step.outputs[0].device)
                total = part if total is None else total.plus(part)
        return first(step, total)

    return push
