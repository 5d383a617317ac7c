"""Nodes that only rearrange entries: views, permutations, repetition, mirror images.

Each is linear and its own transpose is a rearrangement too, so a repeated axis of a block stays
of size 1 unless its entries part company.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac.block import Block
from batchjac.factors import Factored
from batchjac.graph import Edge, Step, metas
from batchjac.rules.apart import each_sample
from batchjac.rules.registry import Blocks, elementwise, only, rule, single
from batchjac.rules.spatial import but_last
from batchjac.samples import SHARED, Place, SampleAxis, moved, reshaped

VIEWS = (
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0",
    "SqueezeBackward3", "SqueezeBackward4", "SqueezeBackward5", "UnsqueezeBackward1",
)  # fmt: skip
PERMUTED = (
    "PermuteBackward0", "TransposeBackward0", "TBackward0", "TransposeBackward1", "TBackward1",
)  # fmt: skip


KEEPING = (*VIEWS, "CloneBackward0")  # the order of the entries
REARRANGING = frozenset((*PERMUTED, *KEEPING))


def _reshaped(step: Step, at: SampleAxis) -> list[Place]:
    """The same entries in the same order: the axis is where the volume before it says."""
    (edge,) = step.edges
    assert edge is not None
    return [reshaped(at, step.shape, edge.shape)]


@rule(*VIEWS, samples=_reshaped)
def view(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """The same entries in row-major order: ``g[v, ...]`` in the shape of the input."""
    g, edge = only(step, blocks)
    return [g.reshape(edge.shape)]


@single(*VIEWS)
def view_forward(step: Step, t: Block) -> Block:
    """``t[v, ...]`` in the shape of the output."""
    return t.reshape(step.shape)


def _expand_alone(step: Step, blocks: Blocks, at: SampleAxis) -> Sequence[Block | None]:
    """``g[v,n]`` summed over the other copies."""
    g, edge = only(step, blocks)
    return [each_sample(g, at, edge.shape)]


@rule("ExpandBackward0", samples=elementwise, per_sample=_expand_alone)
def expand(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[r,i] = x[i]``: ``sum_r g[v,r,i]``."""
    g, edge = only(step, blocks)
    return [g.sum_to(edge.shape)]


@single("ExpandBackward0")
def expand_forward(step: Step, t: Block) -> Block:
    """``t[v,i]`` for every ``r``."""
    return t.broadcast_to(step.shape)


def permutation(step: Step) -> list[int]:
    """``order`` with ``y.shape[k] == x.shape[order[k]]`` for a node that permutes axes."""
    order = list(range(len(step.shape)))
    if step.name.startswith("Permute"):
        return [d % len(order) for d in step.saved("dims")]
    dims = (0, -1) if step.name.startswith("TB") else (step.saved("dim0"), step.saved("dim1"))
    if order:  # t() and transpose(0, 0) also take tensors without axes
        a, b = dims
        order[a], order[b] = order[b], order[a]
    return order


def _permuted(step: Step, at: SampleAxis) -> list[Place]:
    return [moved(at, permutation(step)[at.dim])]


def read_in(edge: Edge) -> list[int]:
    """The axes of the edge's block in the order in which its memory will be read, rows first.

    A tensor whose axes are permuted before some are merged, as the parts of a packed projection
    are, is copied at the merging unless it was made in that order.
    """
    node: Any = edge.node
    order = [d for d, size in enumerate(edge.shape) if size != 1]
    while (name := node.name()) in REARRANGING and node.next_functions[0][0] is not None:
        step = Step(node, name, metas(node), ())
        node, slot = node.next_functions[0]
        if step.name in PERMUTED:
            axes = [d for d, n in zip(permutation(step), step.shape, strict=True) if n != 1]
            order = [d for _, d in sorted(zip(axes, order, strict=True))]
        elif not _same_but_ones(step.shape, metas(node)[slot].shape):
            break
    rest = iter(order)
    return [0, *(1 + (d if size == 1 else next(rest)) for d, size in enumerate(edge.shape))]


def _same_but_ones(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are the same but for axes of size 1."""
    return [n for n in a if n != 1] == [n for n in b if n != 1]


def _transposed(step: Step, factored: Factored) -> Factored | None:
    """A matrix seen as its transpose, as ``nn.Linear`` does with its weight."""
    (edge,) = step.edges
    if edge is None or list(permutation(step)) != [1, 0]:
        return None
    return factored.transposed(edge.shape)


@rule(*PERMUTED, samples=_permuted, carry=_transposed)
def permute(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[order] = x``: the block's axes put back, without a copy."""
    g, edge = only(step, blocks)
    back = inverse(permutation(step))
    return [Block(g.data.permute(0, *(d + 1 for d in back)), edge.shape)]


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that puts back what ``order`` moved."""
    return [order.index(d) for d in range(len(order))]


@single(*PERMUTED)
def permute_forward(step: Step, t: Block) -> Block:
    """``t[v, order]``."""
    return Block(t.data.permute(0, *(d + 1 for d in permutation(step))), step.shape)


def _repeated(step: Step, at: SampleAxis) -> list[Place]:
    """Along an axis of ``r`` copies the copies are outermost."""
    (edge,) = step.edges
    assert edge is not None
    dim = at.dim - (len(step.shape) - len(edge.shape))
    copies = step.saved("repeats")[at.dim]
    if dim < 0 or (edge.shape[dim] == 1 and copies != 1):
        return [SHARED]
    if at.outer % copies:
        return [None]
    return [replace(at, dim=dim, outer=at.outer // copies)]


def _repeat_alone(step: Step, blocks: Blocks, at: SampleAxis) -> Any:
    """``g[v,n]`` summed over the other copies; the samples are among the copies."""
    g, edge = only(step, blocks)
    pairs, single = _copies(g, step.saved("repeats"), edge.shape)
    entries = step.shape[at.dim] // step.saved("repeats")[at.dim]
    if at.inner % entries:
        return NotImplemented
    among = replace(at, dim=2 * at.dim, inner=at.inner // entries)
    return [each_sample(pairs, among, single).reshape(edge.shape)]


@rule("RepeatBackward0", samples=_repeated, per_sample=_repeat_alone)
def repeat(step: Step, blocks: Blocks) -> Any:
    """``y[r,i] = x[i]`` with ``r`` and ``i`` on one axis: ``sum_r g[v,r,i]``."""
    g, edge = only(step, blocks)
    if 0 in step.saved("repeats"):
        return NotImplemented
    pairs, single = _copies(g, step.saved("repeats"), edge.shape)
    return [pairs.sum_to(single).reshape(edge.shape)]


@single("RepeatBackward0")
def repeat_forward(step: Step, t: Block) -> Any:
    """``t[v,i]`` for every ``r``."""
    repeats = step.saved("repeats")
    if 0 in repeats:
        return NotImplemented
    sizes = (*(1,) * (len(repeats) - len(t.shape)), *t.shape)
    pairs = [n for pair in zip(repeats, sizes, strict=True) for n in pair]
    return t.reshape([n for n in sizes for n in (1, n)]).broadcast_to(pairs).reshape(step.shape)


def _copies(g: Block, repeats: Sequence[int], shape: Sequence[int]) -> tuple[Block, Sequence[int]]:
    """``g`` with its axes cut in two, copies and entries, and the shape of a single copy."""
    sizes = (*(1,) * (len(repeats) - len(shape)), *shape)
    pairs = g.reshape([n for pair in zip(repeats, sizes, strict=True) for n in pair])
    return pairs, [n for size in sizes for n in (1, size)]


def _still(step: Step, at: SampleAxis) -> list[Place]:
    """Axes that are mirrored or rolled move their samples; the others stay."""
    dims = step.saved("dims") or range(len(step.shape))
    still = at.dim not in [d % len(step.shape) for d in dims]
    return [at if still else None]


@rule("Rot90Backward0", samples=_still)
def rot90(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """A plane of the tensor turned by quarters: ``g[v]`` turned back."""
    g, edge = only(step, blocks)
    plane = [d % len(g.shape) for d in step.saved("dims")]
    turned = torch.rot90(g.spread(*plane), -step.saved("k"), [d + 1 for d in plane])
    return [Block(turned, edge.shape)]


@single("Rot90Backward0")
def rot90_forward(step: Step, t: Block) -> Block:
    """``t[v]`` turned the same way."""
    plane = [d % len(t.shape) for d in step.saved("dims")]
    return Block(torch.rot90(t.spread(*plane), step.saved("k"), [d + 1 for d in plane]), step.shape)


@rule("FlipBackward0", samples=_still)
def flip(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[i] = x[I-1-i]``: ``g[v, I-1-i]``."""
    (g,) = blocks
    assert g is not None
    dims = [d % len(g.shape) + 1 for d in step.saved("dims")]
    changed = [d for d in dims if g.data.shape[d] != 1]
    return [g.with_data(g.data.flip(changed)) if changed else g]


@single("FlipBackward0")
def flip_forward(step: Step, t: Block) -> Any:
    """A mirror image is its own transpose: ``t[v, I-1-i]``."""
    return flip(step, [t])[0]


@rule("RollBackward0", samples=_still)
def roll(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[i] = x[i - s]``: ``g[v, i + s]``, on the listed axes or on all as one."""
    (g,) = blocks
    assert g is not None
    return [_rolled(step, g, [-s for s in step.saved("shifts")])]


@single("RollBackward0")
def roll_forward(step: Step, t: Block) -> Block:
    """``t[v, i - s]``."""
    return _rolled(step, t, list(step.saved("shifts")))


def _rolled(step: Step, block: Block, shifts: list[int]) -> Block:
    if not step.saved("dims"):
        flat = block.reshape((math.prod(block.shape),))
        return flat.with_data(flat.data.roll(shifts, [1])).reshape(block.shape)
    dims = [d % len(block.shape) + 1 for d in step.saved("dims")]
    return block.with_data(block.data.roll(shifts, dims))


def _last(step: Step, g: Block | None, count: int, adjoint: Callable[[Tensor], Tensor]) -> Block:
    """A map of the last ``count`` axes, with these at their full size."""
    (edge,) = step.edges
    assert g is not None
    assert edge is not None
    return Block(adjoint(g.spread(*range(-count, 0))), edge.shape)


def _ahead(step: Step, t: Block, count: int, push: Callable[[Tensor], Tensor]) -> Block:
    """The same for tangents, toward the output."""
    return Block(push(t.spread(*range(-count, 0))), step.shape)


@rule("PixelShuffleBackward0", samples=but_last(3))
def pixel_shuffle(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[c, h r + a, w r + b] = x[(c,a,b), h, w]``: ``g`` unshuffled."""
    factor = step.saved("upscale_factor")
    return [_last(step, blocks[0], 3, lambda g: F.pixel_unshuffle(g, factor))]


@rule("PixelUnshuffleBackward0", samples=but_last(3))
def pixel_unshuffle(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[(c,a,b), h, w] = x[c, h r + a, w r + b]``: ``g`` shuffled."""
    factor = step.saved("downscale_factor")
    return [_last(step, blocks[0], 3, lambda g: F.pixel_shuffle(g, factor))]


@single("PixelShuffleBackward0")
def pixel_shuffle_forward(step: Step, t: Block) -> Block:
    """``t`` shuffled."""
    return _ahead(step, t, 3, lambda x: F.pixel_shuffle(x, step.saved("upscale_factor")))


@single("PixelUnshuffleBackward0")
def pixel_unshuffle_forward(step: Step, t: Block) -> Block:
    """``t`` unshuffled."""
    return _ahead(step, t, 3, lambda x: F.pixel_unshuffle(x, step.saved("downscale_factor")))


def _channels(step: Step, at: SampleAxis) -> list[Place]:
    return [at if at.dim != 1 else None]


@rule("ChannelShuffleBackward0", samples=_channels)
def channel_shuffle(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[n, (c,a)] = x[n, (a,c)]``: the two parts of the channel axis swapped back."""
    (g,) = blocks
    assert g is not None
    if g.data.shape[2] == 1:
        return [g]
    groups = step.saved("groups")
    parts = g.data.unflatten(2, (-1, groups)).transpose(2, 3)
    return [g.with_data(parts.flatten(2, 3))]


@single("ChannelShuffleBackward0")
def channel_shuffle_forward(step: Step, t: Block) -> Block:
    """The two parts of the channel axis swapped."""
    if t.data.shape[2] == 1:
        return t
    parts = t.data.unflatten(2, (step.saved("groups"), -1)).transpose(2, 3)
    return t.with_data(parts.flatten(2, 3))


@rule("TrilBackward0", "TriuBackward0", samples=but_last(2))
def triangle(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = x`` on one side of a diagonal, 0 on the other: the same of ``g``."""
    keep = torch.tril if step.name.startswith("Tril") else torch.triu
    diagonal = step.saved("diagonal")
    return [_last(step, blocks[0], 2, lambda g: keep(g, diagonal))]


@single("TrilBackward0", "TriuBackward0")
def triangle_forward(step: Step, t: Block) -> Any:
    """A mask is its own transpose: the same of ``t``."""
    return triangle(step, [t])[0]


@rule("ViewAsComplexBackward0", samples=lambda step, at: [at])
def view_as_complex(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = x[..., 0] + i x[..., 1]``: the real and the imaginary part of ``g``."""
    g, edge = only(step, blocks)
    return [Block(torch.view_as_real(g.data.resolve_conj()), edge.shape)]


@rule("ViewAsRealBackward0", samples=but_last(1))
def view_as_real(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[..., 0], y[..., 1] = Re x, Im x``: ``g[..., 0] + i g[..., 1]``."""
    return [_last(step, blocks[0], 1, lambda g: torch.view_as_complex(g.contiguous()))]
