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
from batchjac.rules.registry import Blocks, only, rule
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


def _padded(dims: int, adjoint: Any, *names: str) -> None:
    @rule(*names, samples=but_last(dims))
    def pad(step: Step, blocks: Blocks) -> Sequence[Block | None]:
        """``y[p] = x[i(p)]`` with ``i`` mirrored or clamped: the sum of ``g[v,p]`` at ``i(p)``."""
        padding = list(step.saved("padding"))
        return planes(step, blocks, dims, lambda g, x: adjoint(g, x, padding))


_padded(1, aten.reflection_pad1d_backward, "ReflectionPad1DBackward0")
_padded(2, aten.reflection_pad2d_backward, "ReflectionPad2DBackward0")
_padded(3, aten.reflection_pad3d_backward, "ReflectionPad3DBackward0")
_padded(1, aten.replication_pad1d_backward, "ReplicationPad1DBackward0")
_padded(2, aten.replication_pad2d_backward, "ReplicationPad2DBackward0")
_padded(3, aten.replication_pad3d_backward, "ReplicationPad3DBackward0")


def _resized(dims: int, adjoint: Any, *names: str) -> None:
    @rule(*names, samples=but_last(dims))
    def resize(step: Step, blocks: Blocks) -> Sequence[Block | None]:
        """``y[p] = sum_i c[p,i] x[i]``: ``sum_p c[p,i] g[v,p]``, with ``c`` from the sizes."""
        corners = [step.saved("align_corners")] if step.has("align_corners") else []
        names = {
            1: ["scales"],
            2: ["scales_h", "scales_w"],
            3: ["scales_d", "scales_h", "scales_w"],
        }
        scales = [step.saved(name) for name in names[dims]]
        output = list(step.saved("output_size"))
        return planes(
            step, blocks, dims, lambda g, x: adjoint(g, output, list(x.shape), *corners, *scales)
        )


_resized(1, aten.upsample_nearest1d_backward, "UpsampleNearest1DBackward0")
_resized(2, aten.upsample_nearest2d_backward, "UpsampleNearest2DBackward0")
_resized(3, aten.upsample_nearest3d_backward, "UpsampleNearest3DBackward0")
_resized(1, aten._upsample_nearest_exact1d_backward, "UpsampleNearestExact1DBackward0")
_resized(2, aten._upsample_nearest_exact2d_backward, "UpsampleNearestExact2DBackward0")
_resized(3, aten._upsample_nearest_exact3d_backward, "UpsampleNearestExact3DBackward0")
_resized(1, aten.upsample_linear1d_backward, "UpsampleLinear1DBackward0")
_resized(2, aten.upsample_bilinear2d_backward, "UpsampleBilinear2DBackward0")
_resized(3, aten.upsample_trilinear3d_backward, "UpsampleTrilinear3DBackward0")
_resized(2, aten.upsample_bicubic2d_backward, "UpsampleBicubic2DBackward0")
_resized(2, aten._upsample_bilinear2d_aa_backward, "UpsampleBilinear2DAaBackward0")
_resized(2, aten._upsample_bicubic2d_aa_backward, "UpsampleBicubic2DAaBackward0")


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
