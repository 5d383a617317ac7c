"""Convolution of one to three dimensions: strided, dilated, grouped, transposed.

Written for one dimension, with ``o`` and ``c`` the channels of one group::

    y[n,o,p] = b[o] + sum_{c,k} x[n, c, p s + k d - pad] w[o,c,k]        plain
    y[n,o, p s + k d - pad]  <-  x[n,c,p] w[c,o,k], summed; + b[o]       transposed
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from batchjac import convolutions
from batchjac.block import Block, Scattered
from batchjac.convolutions import Convolution
from batchjac.factors import Factored, Pair
from batchjac.graph import Edge, Step
from batchjac.rules.apart import each_sample, split
from batchjac.rules.registry import Blocks, forward, rule
from batchjac.samples import SHARED, Place, SampleAxis


def _samples(step: Step, at: SampleAxis) -> list[Place]:
    """Images stay apart; channels too, where whole groups belong to one sample."""
    places: tuple[Place, Place, Place] = (None, None, None)
    if at.dim == 0:
        places = (at, SHARED, SHARED)
    elif at.dim == 1:
        groups = step.saved("groups")
        wide, narrow = step.shape[1] // groups, step.saved("input").shape[1] // groups
        if at.inner % wide == 0:
            before = SampleAxis(1, at.outer, at.inner // wide * narrow)
            after = SampleAxis(0, at.outer, at.inner)
            weight = SampleAxis(0, at.outer, before.inner) if step.saved("transposed") else after
            places = (before, weight, after)
    return [None if e is None else p for e, p in zip(step.edges, places, strict=True)]


def _alone(step: Step, blocks: Blocks, at: SampleAxis) -> Sequence[Block | None]:
    """``g[v,n,o,p] x[n,c,p+k]`` summed over ``p`` and not over ``n``."""
    (g,) = blocks
    assert g is not None
    _, weight, bias = step.edges
    return [
        None,
        None if weight is None else Block(_toward_weight(step, g, at), weight.shape),
        None if bias is None else _toward_bias(g, at, bias),
    ]


def _factors(step: Step, blocks: Blocks, at: SampleAxis) -> Sequence[Block | Factored | None]:
    """The same, toward w not yet multiplied: ``g[v,n,o,p]`` and the windows ``x[n,c,p+k]``."""
    (g,) = blocks
    assert g is not None
    _, weight, bias = step.edges
    if weight is None or step.saved("transposed") or at.dim != 0:
        return _alone(step, blocks, at)
    x, groups = step.saved("input"), step.saved("groups")
    wide = g.spread(*range(len(g.shape)))
    out = split(wide, g.shape, at, 1).unflatten(4, (groups, -1))  # v a n b g o P
    cotangent = out.permute(0, 2, 4, 5, 1, 3, *range(6, out.dim())).flatten(4)
    moving = split(_windows(step, x, g.shape[2:]), g.shape, at, 0).unflatten(3, (groups, -1))
    rank = x.dim() - 2  # a n b g c P K, to n g (c K) (a b P)
    places, taps = range(5, 5 + rank), range(5 + rank, 5 + 2 * rank)
    windows = moving.permute(1, 3, 4, *taps, 0, 2, *places)
    pair = Pair(cotangent, windows, 2 + rank)
    return [
        None,
        Factored((pair,), weight.shape),
        None if bias is None else _toward_bias(g, at, bias),
    ]


@rule(
    "ConvolutionBackward0", "ConvolutionBackward1", samples=_samples, per_sample=_alone, fresh=True,
    factors=_factors,
)  # fmt: skip
def convolution(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """Toward x: ``g`` convolved back with ``w``, rows and images as one batch.

    Toward w: ``sum_{n,p} g[v,n,o,p] x[n,c,p+k]``. Toward b: ``sum_{n,p} g[v,n,o,p]``.
    """
    (g,) = blocks
    assert g is not None
    x, weight, bias = step.edges
    one = SampleAxis(0, outer=g.shape[0])  # all images taken for those of a single sample
    return [
        None if x is None else _toward_input(step, g, x),
        None if weight is None else Block(_toward_weight(step, g, one), weight.shape),
        None if bias is None else _toward_bias(g, one, bias),
    ]


def _toward_input(step: Step, g: Block, edge: Edge) -> Block:
    """``sum_{o,k} g[v,n,o,q] w[o,c,k]`` over ``q s + k d - pad = p``.

    What a batch shares is pushed once, and an axis that the kernel does not move along keeps its
    size 1. The input itself is not read; the kernels ask only for its shape.
    """
    weight = step.saved("weight")
    if isinstance(g, Scattered):
        sparse = convolutions.scattered(g.few, g.index, g.shape, weight, edge.shape, layer(step))
        if sparse is not None:
            return Block(sparse, edge.shape)
    kept = [d for d in range(2, len(g.shape)) if g.data.shape[d + 1] == 1 and _still(step, d - 2)]
    data = g.spread(*(d for d in range(1, len(g.shape)) if d not in kept))
    sizes = [1 if d in kept else size for d, size in enumerate(edge.shape)]
    sizes[0] = data.shape[0] * data.shape[1]
    flat = data.reshape(sizes[0], *data.shape[2:])
    found = convolutions.convolution(flat, weight, sizes, layer(step), onward(edge))
    return Block(found.unflatten(0, data.shape[:2]), edge.shape)


# What works entry by entry, or channel by channel, at the same speed in any order of axes.
_INDIFFERENT = (
    "AddBackward0", "CloneBackward0", "GeluBackward0", "NativeBatchNormBackward0", "ReluBackward0",
    "SiluBackward0", "TanhBackward0",
)  # fmt: skip


def onward(edge: Edge) -> bool:
    """Whether the rows go to another convolution, or to the result, through indifferent nodes."""
    node: Node | None = edge.node
    while node is not None and node.name() in _INDIFFERENT:
        node = node.next_functions[0][0]
    return node is None or node.name().startswith(("Convolution", "torch::autograd::Accumulate"))


def _still(step: Step, axis: int) -> bool:
    """The kernel is a single entry along this axis: what is the same all along stays so."""
    pointwise = step.saved("weight").shape[axis + 2] == 1
    return bool(pointwise and step.saved("stride")[axis] == 1 and step.saved("padding")[axis] == 0)


def layer(step: Step) -> Convolution:
    """The layer without its tensors."""
    return Convolution(
        stride=tuple(step.saved("stride")),
        padding=tuple(step.saved("padding")),
        dilation=tuple(step.saved("dilation")),
        output_padding=tuple(step.saved("output_padding")),
        transposed=step.saved("transposed"),
        groups=step.saved("groups"),
    )


def _toward_bias(g: Block, at: SampleAxis, edge: Edge) -> Block:
    """``sum_p g[v,n,o,p]``."""
    column = (*edge.shape, *(1 for _ in g.shape[2:]))
    return each_sample(g, at, column).reshape(edge.shape)


def _toward_weight(step: Step, g: Block, at: SampleAxis) -> Tensor:
    """Rows ``(v n)``: ``sum_p g[v,n,o,p] x[n, c, p s + k d - pad]``; transposed, x and g change.

    The letters ``a`` and ``b`` are what the sample axis holds outside and inside the samples.
    """
    x, groups = step.saved("input"), step.saved("groups")
    out = split(g.spread(1), g.shape, at, 1).unflatten(4, (groups, -1))  # v a n b g o P
    image = split(x, g.shape, at, 0).unflatten(3, (groups, -1))  # a n b g c S
    places, taps = "pqr"[: x.dim() - 2], "ijk"[: x.dim() - 2]
    if step.saved("transposed"):
        moving = _windows(step, g.spread(*range(1, len(g.shape))), x.shape[2:])
        moving = split(moving, g.shape, at, 1).unflatten(4, (groups, -1))
        sentence = f"anbgc{places},vanbgo{places}{taps}->vngco{taps}"
        found = torch.einsum(sentence, image, moving)
    else:
        moving = split(_windows(step, x, g.shape[2:]), g.shape, at, 0).unflatten(3, (groups, -1))
        sentence = f"vanbgo{places},anbgc{places}{taps}->vngoc{taps}"
        found = torch.einsum(sentence, out, moving)
    return found.flatten(2, 3).flatten(0, 1)


def _windows(step: Step, data: Tensor, count: Sequence[int]) -> Tensor:
    """``data[..., p s + k d - pad]`` as axes ``[..., *p, *k]``, a view of the padded data."""
    padding = step.saved("padding")
    kernel = step.saved("weight").shape[2:]
    first = data.dim() - len(kernel)
    data = F.pad(data, [p for p in reversed(padding) for _ in range(2)])
    for axis, size in enumerate(kernel):
        stride, dilation = step.saved("stride")[axis], step.saved("dilation")[axis]
        data = data.unfold(first + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        data = data.narrow(first + axis, 0, count[axis])
    return data


@forward("ConvolutionBackward0", "ConvolutionBackward1")
def convolution_forward(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``t_x * w + x * t_w + t_b``: the convolution is linear in each."""
    x, weight, bias = blocks
    parts = [
        None if x is None else _from_input(step, x),
        None if weight is None else _from_weight(step, weight),
        None if bias is None else _from_bias(step, bias),
    ]
    total: Block | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total.plus(part)
    return [total]


def _from_input(step: Step, t: Block) -> Block:
    """``sum_{c,k} t[v, n, c, p s + k d - pad] w[o,c,k]``, rows and images as one batch.

    What a batch shares is pushed once; an axis that the kernel does not move along keeps size 1.
    """
    kept = [d for d in range(2, len(t.shape)) if t.data.shape[d + 1] == 1 and _still(step, d - 2)]
    data = t.spread(*(d for d in range(1, len(t.shape)) if d not in kept))
    found = _convolved(step, data.flatten(0, 1), step.saved("weight"))
    return Block(found.unflatten(0, data.shape[:2]), step.shape)


def _convolved(step: Step, x: Tensor, w: Tensor) -> Tensor:
    how = layer(step)
    return torch.convolution(
        x, w, None, how.stride, how.padding, how.dilation, how.transposed, how.output_padding,
        how.groups,
    )  # fmt: skip


def _from_weight(step: Step, t: Block) -> Block:
    """``sum_{c,k} x[n, c, p s + k d - pad] t[v,o,c,k]``: the rows as so many output channels."""
    groups = step.saved("groups")
    data = t.full()
    if step.saved("transposed"):  # [c, o, k], with o of one group
        wide = data.transpose(0, 1).flatten(1, 2)
    else:  # [(group o), c, k]
        wide = data.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)
    found = _convolved(step, step.saved("input"), wide)
    apart = found.unflatten(1, (groups, t.rows, -1))  # n group v o p
    return Block(apart.movedim(2, 0).flatten(2, 3), step.shape)


def _from_bias(step: Step, t: Block) -> Block:
    """``t[v,o]`` at every place of every image."""
    return t.reshape((*t.shape, *(1 for _ in step.shape[2:]))).broadcast_to(step.shape)
