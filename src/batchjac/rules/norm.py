"""Normalisation: ``y = w x̂ + b`` with ``x̂ = (x - m) s``, by layer, by group or by batch.

With mean ``m`` and scale ``s`` taken over some axes ``A`` of ``x``, and ``h = g w``,

    toward x:  s (h - mean_A h - x̂ mean_A(h x̂))      toward w:  g x̂      toward b:  g,

the last two summed over what ``w`` is broadcast to. Where ``m`` and ``s`` are constants (running
statistics, or frozen ones) only ``s h`` remains. A mean over an axis that is the same all along is
the value itself, so blocks keep their axes of size 1.

Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 3; the same chain rule for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.apart import each_sample
from batchjac.rules.diagonal import times_last
from batchjac.rules.pointwise import only
from batchjac.rules.registry import Blocks, Forward, PerSample, Reverse, first, forward, rule
from batchjac.samples import SHARED, Place, SampleAxis

FROZEN = ":frozen"
BATCH = (
    "CudnnBatchNormBackward0", "NativeBatchNormBackward0", "NativeBatchNormLegitBackward0",
    "NativeBatchNormLegitBackward1",
)  # fmt: skip
CONSTANT = "NativeBatchNormLegitNoTrainingBackward0"


@dataclass(frozen=True)
class Normalised:
    """What a node normalised, in float32 at least; all tensors broadcast to the shape of ``x``."""

    x: Tensor
    mean: Tensor
    scale: Tensor
    weight: Tensor | None
    axes: tuple[int, ...]  # over which mean and scale were taken; none when they are constants
    affine: tuple[int, ...]  # the shape of weight and bias beside ``x``

    @cached_property
    def centred(self) -> Tensor:
        """``x̂ = (x - m) s``."""
        return (self.x - self.mean) * self.scale

    @property
    def slope(self) -> Tensor:
        """``w s``, which is the derivative itself where mean and scale are constants."""
        return self.scale if self.weight is None else self.scale * self.weight

    def toward_input(self, g: Tensor) -> Tensor:
        """``s (h - mean h - x̂ mean(h x̂))`` with ``h = g w``."""
        if not self.axes:
            return g * self.slope
        first = self.axes[0]
        trailing = self.axes == tuple(range(first, self.x.dim())) and self.x.numel() > 0
        if trailing and not torch.is_grad_enabled():
            return self._fused(g, first)
        h = g if self.weight is None else g * self.weight
        dims = [d + 1 for d in self.axes]
        slope = (h * self.centred).mean(dims, keepdim=True)
        centred = torch.addcmul(h - h.mean(dims, keepdim=True), self.centred, slope, value=-1)
        return centred * self.scale

    def from_input(self, t: Tensor) -> Tensor:
        """``w s (t - mean t - x̂ mean(t x̂))``: the transpose of ``toward_input``."""
        if self.axes:
            dims = [d + 1 for d in self.axes]
            slope = (t * self.centred).mean(dims, keepdim=True)
            t = torch.addcmul(t - t.mean(dims, keepdim=True), self.centred, slope, value=-1)
        return t * self.slope

    def _fused(self, g: Tensor, first: int) -> Tensor:
        """The same by torch's kernel for the last axes, three times as fast: a row is an image."""
        lead, last = self.x.shape[:first], self.x.shape[first:]
        weight = self.weight
        if weight is not None and weight.shape != last:
            g, weight = g * weight, None
        full = (g.shape[0], *self.x.shape)
        flat, x = (t.expand(full).reshape(-1, last.numel()) for t in (g, self.x))
        mean, scale = (
            # contiguous: the kernel reads these two without looking at their strides
            t.expand(g.shape[0], *lead, *(1 for _ in last)).reshape(-1, 1).contiguous()
            for t in (self.mean, self.scale)
        )
        weight = None if weight is None else weight.reshape(-1)
        found: Tensor = torch.ops.aten.native_layer_norm_backward(
            flat, x, [last.numel()], mean, scale, weight, None, [True, False, False]
        )[0]
        return found.reshape(full)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least, as torch's kernels compute."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _statistics(
    x: Tensor, mean: Tensor, scale: Tensor, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mean and scale as they were saved; where the walk is recorded, as functions of ``x``."""
    if not torch.is_grad_enabled():
        return mean, scale
    own = x.mean(axes, keepdim=True)
    variance = (x - own).square().mean(axes, keepdim=True)
    with torch.no_grad():
        eps = scale.square().reciprocal() - variance
    return own, (variance + eps).rsqrt()


def _by_layer(step: Step) -> Normalised:
    x, weight = _wide(step.saved("input")), step.saved("weight")
    size = step.saved("normalized_shape")
    axes = tuple(range(x.dim() - len(size), x.dim()))
    mean, scale = _statistics(x, _wide(step.saved("result1")), _wide(step.saved("result2")), axes)
    return Normalised(x, mean, scale, None if weight is None else _wide(weight), axes, size)


def _by_group(step: Step) -> Normalised:
    count, channels, groups = step.saved("N"), step.saved("C"), step.saved("group")
    x, weight = step.saved("input"), step.saved("weight")
    affine = (1, groups, channels // groups, 1)
    x = _wide(x.reshape(count, groups, channels // groups, step.saved("HxW")))
    saved = [_wide(step.saved(f"result{k}")).reshape(count, groups, 1, 1) for k in (1, 2)]
    mean, scale = _statistics(x, saved[0], saved[1], (2, 3))
    weight = None if weight is None else _wide(weight).reshape(affine)
    return Normalised(x, mean, scale, weight, (2, 3), affine)


def _frozen(step: Step) -> bool:
    return step.name.endswith(FROZEN)


def _couples(step: Step) -> bool:
    """Whether mean and scale are functions of this batch."""
    return step.has("training") and step.saved("training") and not _frozen(step)


def _by_batch(step: Step) -> Normalised:
    x, weight = _wide(step.saved("input")), step.saved("weight")
    affine = (1, x.shape[1], *(1,) * (x.dim() - 2))
    if _couples(step) or _frozen(step):
        saved = [step.saved("result1"), step.saved("result2")]
    else:
        eps = step.saved("epsilon" if step.has("epsilon") else "eps")
        saved = [step.saved("running_mean"), (_wide(step.saved("running_var")) + eps).rsqrt()]
    mean, scale = (_wide(s).reshape(affine).detach() for s in saved)
    axes = (0, *range(2, x.dim())) if _couples(step) else ()
    if axes and x.shape[0] == 1 and x.dim() > 2:
        axes = axes[1:]  # instance norm: nothing to average over along the first
    if axes:
        mean, scale = _statistics(x, mean, scale, axes)
    weight = None if weight is None else _wide(weight).reshape(affine)
    return Normalised(x, mean, scale, weight, axes, affine)


def _layer_samples(step: Step, at: SampleAxis) -> list[Place]:
    """Samples before the normalised axes stay apart; weight and bias are shared."""
    lead = len(step.shape) - len(step.saved("normalized_shape"))
    return _places(step, at if at.dim < lead else None, SHARED)


def _group_samples(step: Step, at: SampleAxis) -> list[Place]:
    """Statistics are of each entry of the first axis by itself."""
    return _places(step, at if at.dim == 0 else None, SHARED)


def _batch_samples(step: Step, at: SampleAxis) -> list[Place]:
    """Channels stay apart, also when samples are merged into them, as instance norm does.

    Along the other axes a batch's own statistics mix everything, constants nothing.
    """
    if at.dim == 1:
        return _places(step, at, SampleAxis(0, at.outer, at.inner))
    return _places(step, None, None) if _couples(step) else _places(step, at, SHARED)


def _places(step: Step, x: Place, affine: Place) -> list[Place]:
    places = zip(step.edges, (x, affine, affine), strict=True)
    return [None if edge is None else place for edge, place in places]


def _rows(step: Step, blocks: Blocks, normal: Normalised) -> Block | None:
    """The block in the shape and precision in which the node computes."""
    if any(b is not None for b in blocks[1:]):  # the statistics themselves were used
        return None
    return only(blocks).reshape(normal.x.shape).to(normal.x.dtype)


def _affine(
    step: Step, normal: Normalised, g: Block, fold: Callable[[Block], Block]
) -> list[Block | None]:
    """``g x̂`` toward the weight and ``g`` toward the bias, each folded to its shape."""
    weight, bias = step.edges[1:]
    product = None if weight is None else g.with_data(g.data * normal.centred)
    return [
        None if b is None or e is None else fold(b).reshape(e.shape)
        for b, e in ((product, weight), (g, bias))
    ]


def _reverse(read: Callable[[Step], Normalised]) -> Reverse:
    def normalise(step: Step, blocks: Blocks) -> Any:
        """The three equations at the top of this file."""
        normal = read(step)
        g = _rows(step, blocks, normal)
        if g is None:
            return NotImplemented
        affine = _affine(step, normal, g, lambda b: b.sum_to(normal.affine))
        x = step.edges[0]
        if x is None:
            return [None, *affine]
        if not normal.axes and affine == [None, None]:
            return [times_last(g, normal.slope).reshape(x.shape), None, None]
        return [g.with_data(normal.toward_input(g.data)).reshape(x.shape), *affine]

    return normalise


def _per_sample(read: Callable[[Step], Normalised]) -> PerSample:
    def per_sample(step: Step, blocks: Blocks, at: SampleAxis) -> Any:
        """Toward weight and bias, summed over what is not the sample."""
        normal = read(step)
        g = _rows(step, blocks, normal)
        if g is None or step.edges[0] is not None:
            return NotImplemented
        return [None, *_affine(step, normal, g, lambda b: each_sample(b, at, normal.affine))]

    return per_sample


def _forward(read: Callable[[Step], Normalised]) -> Forward:
    def normalise(step: Step, blocks: Blocks) -> list[Block | None]:
        """``w s (t - mean t - x̂ mean(t x̂)) + x̂ t_w + t_b``."""
        normal = read(step)
        shapes = (tuple(normal.x.shape), normal.affine, normal.affine)
        total: Block | None = None
        for k, (tangent, shape) in enumerate(zip(blocks, shapes, strict=True)):
            if tangent is None:
                continue
            part = tangent.reshape(shape).broadcast_to(normal.x.shape).to(normal.x.dtype)
            if k == 0:
                part = part.with_data(normal.from_input(part.data))
            elif k == 1:
                part = part.with_data(part.data * normal.centred)
            total = part if total is None else total.plus(part)
        return first(step, total and total.reshape(step.shape))

    return normalise


rule(
    "NativeLayerNormBackward0", samples=_layer_samples, per_sample=_per_sample(_by_layer),
    fresh=True,
)(_reverse(_by_layer))  # fmt: skip
rule(
    "NativeGroupNormBackward0", samples=_group_samples, per_sample=_per_sample(_by_group),
    fresh=True,
)(_reverse(_by_group))  # fmt: skip
rule(
    *BATCH, *(name + FROZEN for name in BATCH), CONSTANT,
    samples=_batch_samples, per_sample=_per_sample(_by_batch), fresh=True,
)(_reverse(_by_batch))  # fmt: skip
forward("NativeLayerNormBackward0")(_forward(_by_layer))
forward("NativeGroupNormBackward0")(_forward(_by_group))
forward(*BATCH, *(name + FROZEN for name in BATCH), CONSTANT)(_forward(_by_batch))
