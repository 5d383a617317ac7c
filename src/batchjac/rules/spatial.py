"""Maps that treat every channel of every image alike: padding by mirror or edge, resizing, unfold.

Each is linear with coefficients that depend on sizes alone, so rows, images and channels are one
batch for the kernel that autograd itself uses, and an axis of the batch that is the same all along
stays of size 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.registry import Blocks, only, rule, single
from batchjac.samples import Place, SampleAxis

aten = torch.ops.aten


def but_last(count: int) -> Callable[[Step, SampleAxis], list[Place]]:
    """Samples stay where they are unless among the last ``count`` axes."""

    def samples(step: Step, at: SampleAxis) -> list[Place]:
        return [at if at.dim < len(step.shape) - count else None]

    return samples


def planes(step: Step, blocks: Blocks, dims: int, adjoint: Callable[..., Tensor]) -> list[Block]:
    """``adjoint(g, x)`` on batches ``[*, channel, ...]``; of ``x`` it may read only the shape."""
    g, edge = only(step, blocks)
    data = g.spread(*range(-dims, 0))
    lead, size = data.shape[:-dims], edge.shape[-dims:]
    batch = lead[:-1].numel()
    flat = data.reshape(batch, lead[-1], *data.shape[-dims:])
    like = flat.new_zeros(1).expand(batch, lead[-1], *size)
    return [Block(adjoint(flat, like).reshape(*lead, *size), edge.shape)]


def images(step: Step, t: Block, dims: int, push: Callable[[Tensor], Tensor]) -> Block:
    """Tangents as a batch ``[*, channel, ...]`` through the operator of the forward itself."""
    data = t.spread(*range(-dims, 0))
    lead = data.shape[:-dims]
    found = push(data.reshape(lead[:-1].numel(), lead[-1], *data.shape[-dims:]))
    return Block(found.reshape(*lead, *found.shape[-dims:]), step.shape)


def _padded(dims: int, adjoint: Any, push: Any, *names: str) -> None:
    @rule(*names, samples=but_last(dims))
    def pad(step: Step, blocks: Blocks) -> Sequence[Block | None]:
        """``y[p] = x[i(p)]`` with ``i`` mirrored or clamped: the sum of ``g[v,p]`` at ``i(p)``."""
        padding = list(step.saved("padding"))
        return planes(step, blocks, dims, lambda g, x: adjoint(g, x, padding))

    @single(*names)
    def pad_forward(step: Step, t: Block) -> Block:
        """``t[v, i(p)]``."""
        return images(step, t, dims, lambda x: push(x, list(step.saved("padding"))))


_padded(1, aten.reflection_pad1d_backward, aten.reflection_pad1d, "ReflectionPad1DBackward0")
_padded(2, aten.reflection_pad2d_backward, aten.reflection_pad2d, "ReflectionPad2DBackward0")
_padded(3, aten.reflection_pad3d_backward, aten.reflection_pad3d, "ReflectionPad3DBackward0")
_padded(1, aten.replication_pad1d_backward, aten.replication_pad1d, "ReplicationPad1DBackward0")
_padded(2, aten.replication_pad2d_backward, aten.replication_pad2d, "ReplicationPad2DBackward0")
_padded(3, aten.replication_pad3d_backward, aten.replication_pad3d, "ReplicationPad3DBackward0")


def _resized(dims: int, adjoint: Any, push: Any, *names: str) -> None:
    @rule(*names, samples=but_last(dims))
    def resize(step: Step, blocks: Blocks) -> Sequence[Block | None]:
        """``y[p] = sum_i c[p,i] x[i]``: ``sum_p c[p,i] g[v,p]``, with ``c`` from the sizes."""
        output, how = list(step.saved("output_size")), _how(step, dims)
        return planes(step, blocks, dims, lambda g, x: adjoint(g, output, list(x.shape), *how))

    @single(*names)
    def resize_forward(step: Step, t: Block) -> Block:
        """``sum_i c[p,i] t[v,i]``."""
        output, how = list(step.saved("output_size")), _how(step, dims)
        return images(step, t, dims, lambda x: push(x, output, *how))


def _how(step: Step, dims: int) -> list[Any]:
    """How an image was resized: whether its corners stay, and the factor of each axis."""
    corners = [step.saved("align_corners")] if step.has("align_corners") else []
    scales = {1: ["scales"], 2: ["scales_h", "scales_w"], 3: ["scales_d", "scales_h", "scales_w"]}
    return [*corners, *map(step.saved, scales[dims])]


_resized(1, aten.upsample_nearest1d_backward, aten.upsample_nearest1d, "UpsampleNearest1DBackward0")
_resized(2, aten.upsample_nearest2d_backward, aten.upsample_nearest2d, "UpsampleNearest2DBackward0")
_resized(3, aten.upsample_nearest3d_backward, aten.upsample_nearest3d, "UpsampleNearest3DBackward0")
_resized(
    1,
    aten._upsample_nearest_exact1d_backward,
    aten._upsample_nearest_exact1d,
    "UpsampleNearestExact1DBackward0",
)
_resized(
    2,
    aten._upsample_nearest_exact2d_backward,
    aten._upsample_nearest_exact2d,
    "UpsampleNearestExact2DBackward0",
)
_resized(
    3,
    aten._upsample_nearest_exact3d_backward,
    aten._upsample_nearest_exact3d,
    "UpsampleNearestExact3DBackward0",
)
_resized(1, aten.upsample_linear1d_backward, aten.upsample_linear1d, "UpsampleLinear1DBackward0")
_resized(
    2, aten.upsample_bilinear2d_backward, aten.upsample_bilinear2d, "UpsampleBilinear2DBackward0"
)
_resized(
    3, aten.upsample_trilinear3d_backward, aten.upsample_trilinear3d, "UpsampleTrilinear3DBackward0"
)
_resized(2, aten.upsample_bicubic2d_backward, aten.upsample_bicubic2d, "UpsampleBicubic2DBackward0")
_resized(
    2,
    aten._upsample_bilinear2d_aa_backward,
    aten._upsample_bilinear2d_aa,
    "UpsampleBilinear2DAaBackward0",
)
_resized(
    2,
    aten._upsample_bicubic2d_aa_backward,
    aten._upsample_bicubic2d_aa,
    "UpsampleBicubic2DAaBackward0",
)


def _window(step: Step) -> list[list[int]]:
    return [list(step.saved(name)) for name in ("kernel_size", "dilation", "padding", "stride")]


def _flat(g: Block, count: int) -> tuple[Tensor, torch.Size]:
    """Rows and images as one batch before the last ``count`` axes, and the batch's own axes."""
    data = g.spread(*range(-count, 0))
    lead = data.shape[:-count]
    return data.reshape(lead.numel(), *data.shape[-count:]), lead


@rule("Im2ColBackward0", samples=but_last(2))
def unfold(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[(c,k), p] = x[c, p s + k d - pad]``: the sum of ``g[v, (c,k), p]`` at each place."""
    g, edge = only(step, blocks)
    flat, lead = _flat(g, 2)
    found = aten.col2im(flat, list(edge.shape[-2:]), *_window(step))
    return [Block(found.unflatten(0, lead), edge.shape)]


@rule("Col2ImBackward0", samples=but_last(3))
def fold(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[c, i] = sum over p s + k d - pad = i of x[(c,k), p]``: the windows of ``g[v]``."""
    g, edge = only(step, blocks)
    flat, lead = _flat(g, 3)
    return [Block(aten.im2col(flat, *_window(step)).unflatten(0, lead), edge.shape)]


@single("Im2ColBackward0")
def unfold_forward(step: Step, t: Block) -> Block:
    """``t[v, c, p s + k d - pad]``."""
    flat, lead = _flat(t, 3)
    return Block(aten.im2col(flat, *_window(step)).unflatten(0, lead), step.shape)


@single("Col2ImBackward0")
def fold_forward(step: Step, t: Block) -> Block:
    """The sum of ``t[v, (c,k), p]`` at each place."""
    flat, lead = _flat(t, 2)
    found = aten.col2im(flat, list(step.shape[-2:]), *_window(step))
    return Block(found.unflatten(0, lead), step.shape)
