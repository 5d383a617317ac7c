"""Nodes that act on each entry by itself: the block times the derivative, which has no rows.

For ``y = f(x)`` entry by entry the cotangent is ``g f'(x)``. The node called once on ones *is*
``f'(x)``, in autograd's own formula, with its own history when the walk is differentiable. So one
rule serves every such function. A function that *selects* (ReLU, clamp, where) gives 0, not
``inf * 0``, where it lets nothing through; those are further down.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block, Scattered
from batchjac.graph import Step
from batchjac.rules.apart import diagonal, entrywise
from batchjac.rules.diagonal import (
    beside,
    keep,
    opened,
    passed,
    times,
    times_last,
    wide,
    zero,
)
from batchjac.rules.registry import Blocks, elementwise, forward, rule, single
from batchjac.samples import Place, SampleAxis

SMOOTH = (
    # one argument
    "AbsBackward0", "AcosBackward0", "AcoshBackward0", "AngleBackward0", "AsinBackward0",
    "AsinhBackward0", "AtanBackward0", "AtanhBackward0", "CeluBackward0", "CeluBackward1",
    "CosBackward0", "CoshBackward0", "Deg2RadBackward0", "DigammaBackward0", "EluBackward0",
    "EluBackward1", "ErfBackward0", "ErfcBackward0", "ErfinvBackward0", "Exp2Backward0",
    "ExpBackward0", "Expm1Backward0", "GeluBackward0", "I0Backward0", "LeakyReluBackward0",
    "LeakyReluBackward1", "LgammaBackward0", "Log10Backward0", "Log1PBackward0", "Log2Backward0",
    "LogBackward0", "LogSigmoidBackward0", "LogitBackward0", "MishBackward0",
    "NanToNumBackward0", "NativeDropoutBackward0", "Rad2DegBackward0",
    "ReciprocalBackward0", "RreluWithNoiseBackward0", "RreluWithNoiseBackward1", "RsqrtBackward0",
    "SiluBackward0", "SinBackward0", "SincBackward0", "SinhBackward0",
    "SoftplusBackward0", "SpecialEntrBackward0", "SpecialErfcxBackward0", "SpecialI0EBackward0",
    "SpecialI1Backward0", "SpecialI1EBackward0", "SpecialLogNdtrBackward0",
    "SpecialNdtriBackward0", "SqrtBackward0", "TanBackward0",
    # two or three
    "AddcdivBackward0", "Atan2Backward0", "CopysignBackward0", "CopysignBackward1",
    "FmodBackward1", "HypotBackward0", "LerpBackward1", "Logaddexp2Backward0",
    "LogaddexpBackward0", "RemainderBackward1",
    # derivatives within a function: physics residuals, energies and forces
    "EluBackwardBackward0", "GeluBackwardBackward0", "LeakyReluBackwardBackward0",
    "LogSigmoidBackwardBackward0", "SigmoidBackwardBackward0", "SoftplusBackwardBackward0",
    "TanhBackwardBackward0",
    # losses that keep their entries
    "BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0", "HuberLossBackward0",
    "MseLossBackward0", "SmoothL1LossBackward0", "SoftMarginLossBackward0",
)  # fmt: skip

# These conjugate the cotangent itself, so the cotangent of ones does not say all.
ANTILINEAR = ("SigmoidBackwardBackward0", "TanhBackwardBackward0")

FLAT = (
    "BernoulliBackward0", "CeilBackward0", "DivBackward2", "DivBackward3", "FloorBackward0",
    "PoissonBackward0", "RoundBackward0", "RoundBackward1", "SgnBackward0", "SignBackward0",
    "TruncBackward0",
)  # fmt: skip


def derivative(step: Step, output: int = 0) -> list[Tensor | None]:
    """The node on ones for one of its outputs: the derivative toward each edge, without rows."""
    found: list[Tensor | None] = step.called(f"on ones {output}", partial(_on_ones, output=output))
    return found


def _on_ones(step: Step, output: int) -> list[Tensor | None]:
    meta = step.outputs[output]
    ones = torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)
    result = step.node(*(ones if k == output else None for k in range(len(step.outputs))))
    return list(result) if isinstance(result, tuple) else [result]


def only(blocks: Blocks) -> Block:
    """The block of a node's first output, the only one that can have cotangents."""
    block = blocks[0]
    assert block is not None
    return block


def real_within_complex(step: Step) -> bool:
    """Whether a real edge meets complex rows: the node then drops what multiplies the imaginary."""
    real = any(e is not None and not e.meta.dtype.is_complex for e in step.edges)
    return step.outputs[0].dtype.is_complex and real


@entrywise(*SMOOTH, fresh=True)
def smooth(step: Step, blocks: Blocks) -> Any:
    """``g[v n] f_k'(x)[n]`` toward each argument ``k`` of a function of entries."""
    g = only(blocks)
    if real_within_complex(step) or (step.name in ANTILINEAR and g.data.is_complex()):
        return NotImplemented
    if step.has("reduction") and step.saved("reduction") != 0:
        return NotImplemented
    product = times_last if sum(e is not None for e in step.edges) == 1 else times
    return [
        None if e is None or d is None else product(g, d)
        for e, d in zip(step.edges, derivative(step), strict=True)
    ]


@entrywise(*FLAT)
def flat(step: Step, blocks: Blocks) -> Any:
    """``y`` is constant in pieces: 0. (The sign of a complex number is not.)"""
    g = only(blocks)
    rounds = not step.has("rounding_mode") or step.saved("rounding_mode") is not None
    if g.data.is_complex() or not rounds:
        return NotImplemented
    return [None if e is None else zero(g) for e in step.edges]


aten = torch.ops.aten

# Each takes the cotangent, the input or result, and the saved scalars named after it.
GATES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "HardshrinkBackward0": (aten.hardshrink_backward, ("self", "lambd")),
    "HardswishBackward0": (aten.hardswish_backward, ("self",)),
    "HardtanhBackward0": (aten.hardtanh_backward, ("self", "min_val", "max_val")),
    "HardtanhBackwardBackward0": (aten.hardtanh_backward, ("self", "min_val", "max_val")),
    "SoftshrinkBackward0": (aten.softshrink_backward, ("self", "lambd")),
    "ThresholdBackward0": (aten.threshold_backward, ("self", "threshold")),
    "ThresholdBackward1": (aten.threshold_backward, ("self", "threshold")),
    "ThresholdBackwardBackward0": (aten.threshold_backward, ("self", "threshold")),
}


@rule("ReluBackward0", samples=elementwise, fresh=True)
def relu(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n]`` where ``y[n] > 0``, else 0."""
    g = only(blocks)
    if isinstance(g, Scattered):
        few = aten.threshold_backward(g.few, g.there(step.saved("result")).unsqueeze(0), 0)
        return [Scattered(few, g.index, g.shape)]
    y = beside(g, step.saved("result"))
    if g.writable:
        aten.threshold_backward.grad_input(g.data, y, 0, grad_input=g.data)
        return [g]

    def through(data: Tensor) -> Tensor:
        gradient: Tensor = aten.threshold_backward(opened(data, g.shape), y, 0)
        return gradient

    return [passed(g, y, through, selects=True)]


# The derivative in one operation, from the result: a recurrent network is made of these.
OF_RESULT: dict[str, tuple[Any, Any]] = {
    "SigmoidBackward0": (aten.sigmoid_backward, aten.sigmoid_backward.grad_input),
    "TanhBackward0": (aten.tanh_backward, aten.tanh_backward.grad_input),
}


@entrywise(*OF_RESULT, fresh=True)
def of_result(step: Step, blocks: Blocks) -> Any:
    """``g[v n] f'(x)[n]`` with ``f' = y (1 - y)`` or ``1 - y^2``."""
    g = only(blocks)
    complex_ = step.outputs[0].dtype.is_complex
    if torch.is_grad_enabled() or complex_ or real_within_complex(step):
        return smooth(step, blocks)
    backward, into = OF_RESULT[step.name]
    y = beside(g, step.saved("result"))
    if g.writable and y.dtype == g.data.dtype:
        into(g.data, y, grad_input=g.data)
        return [g]

    def through(data: Tensor) -> Tensor:
        gradient: Tensor = backward(opened(data, g.shape), y)
        return gradient

    return [passed(g, y, through)]


@rule(*GATES, samples=elementwise, fresh=True)
def gate(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n] f'(x)[n]`` inside the open region, 0 outside it; a derivative's own slope is 0."""
    g = only(blocks)
    backward, (name, *scalars) = GATES[step.name]
    through, *others = step.edges
    toward = None
    if through is not None:
        x = wide(step.saved(name), len(g.shape))
        toward = g.with_data(backward(g.data, x, *map(step.saved, scalars)))
    return [toward, *(None if e is None else zero(g) for e in others)]


@rule("HardsigmoidBackward0", samples=elementwise)
def hardsigmoid(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n] / 6`` where ``-3 < x[n] < 3``, else 0; torch's own kernel has no derivative."""
    g = only(blocks)
    with torch.no_grad():
        (slope,) = derivative(step)  # torch rounds its sixth to float32
    assert slope is not None
    return [keep(times(g, slope), slope != 0)]


def _clamped(step: Step) -> list[Tensor | None]:
    """Where the cotangent goes: to the input, to the lower bound, to the upper."""
    x = step.saved("self")
    low = step.saved("min") if step.has("min") else None
    high = step.saved("max") if step.has("max") else None
    if low is None:
        return [x <= high, None, x > high]
    if high is None:
        return [x >= low, x < low, None]
    crossed = torch.as_tensor(high < low)
    return [(x >= low) & (x <= high), (x < low) & (low < high), (x > high) | crossed]


@entrywise(
    "ClampBackward0",
    "ClampBackward1",
    "ClampMaxBackward0",
    "ClampMaxBackward1",
    "ClampMinBackward0",
    "ClampMinBackward1",
)
def clamp(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n]`` toward the input within its bounds, ends included, else toward the bound."""
    g = only(blocks)
    masks = _clamped(step)
    if step.name == "ClampMaxBackward1":
        masks = [masks[0], masks[2]]
    return [
        None if e is None or m is None else keep(g, m)
        for e, m in zip(step.edges, masks, strict=False)
    ]


@entrywise("WhereBackward0")
def where(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n]`` toward the argument that was taken, 0 toward the other."""
    g = only(blocks)
    a, b = step.edges
    taken = step.saved("condition")
    return [None if a is None else keep(g, taken), None if b is None else keep(g, ~taken)]


@entrywise("MaskedFillBackward0", "MaskedFillBackward1")
def masked_fill(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n]`` toward the input outside the mask, toward the value inside it."""
    g = only(blocks)
    mask = step.saved("mask")
    return [None if e is None else keep(g, mask if k else ~mask) for k, e in enumerate(step.edges)]


@entrywise("MaximumBackward0", "MinimumBackward0")
def extremum(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n]`` toward the winner, ``g/2`` toward each at a tie; a nan loses to nobody."""
    g = only(blocks)
    a, b = step.saved("self"), step.saved("other")
    halved = times(g, torch.where(a == b, 0.5, 1.0).to(g.data.dtype))
    lost = (a < b, a > b) if step.name == "MaximumBackward0" else (a > b, a < b)
    return [None if e is None else keep(halved, ~m) for e, m in zip(step.edges, lost, strict=True)]


@entrywise("FmaxBackward0", "FminBackward0")
def first_extremum(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n]`` toward the winner, the first at a tie; a nan loses to any number."""
    g = only(blocks)
    a, b = step.saved("self"), step.saved("other")
    first = ((a >= b) if step.name == "FmaxBackward0" else (a <= b)) | b.isnan()
    return [
        None if e is None else keep(g, m) for e, m in zip(step.edges, (first, ~first), strict=True)
    ]


@entrywise("XlogyBackward0", "XlogyBackward1", "XlogyBackward2")
def x_log_y(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g log y``, nothing where ``x`` is 0 and ``y`` is not positive; and ``g x / y``."""
    g = only(blocks)
    dtype, device = g.data.dtype, g.data.device
    x, y = (
        torch.as_tensor(step.saved(name), dtype=dtype, device=device) for name in ("self", "other")
    )
    kinds = {"XlogyBackward1": "y", "XlogyBackward2": "x"}.get(step.name, "xy")
    found: list[Block | None] = []
    for kind, edge in zip(kinds, step.edges, strict=True):
        if edge is None:
            found.append(None)
        elif kind == "x":
            rows = g.with_data(torch.xlogy(g.data, wide(y, len(g.shape))))
            found.append(keep(rows, ~((x == 0) & (y <= 0))))
        else:
            found.append(times(g, x / y))
    return found


@entrywise("PreluKernelBackward0")
def prelu(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n] (1 or w)`` toward the input; toward ``w``, ``g[v n] x[n]`` where ``x <= 0``."""
    g = only(blocks)
    x, w = step.saved("self"), step.saved("weight")
    toward_x, toward_w = step.edges
    open_ = x > 0
    return [
        None if toward_x is None else times(g, torch.where(open_, torch.ones_like(w), w)),
        None if toward_w is None else keep(times(g, x), ~open_),
    ]


def _glu_samples(step: Step, at: SampleAxis) -> list[Place]:
    """The halved axis mixes entries; the others stay."""
    return [None if at.dim == step.saved("dim") % len(step.shape) else at]


@rule("GluBackward0", samples=_glu_samples)
def glu(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = a s(b)``, halves of one tensor: ``g s(b)`` and ``g a s'(b)`` side by side."""
    g = only(blocks)
    (edge,) = step.edges
    assert edge is not None
    dim = step.saved("dim") % len(step.shape)
    (d,) = derivative(step)
    assert d is not None
    data = torch.cat([g.data * half for half in d.unsqueeze(0).chunk(2, dim + 1)], dim + 1)
    return [Block(data, edge.shape)]


forward("ReluBackward0")(diagonal(relu))
forward(*GATES)(diagonal(gate))
forward("HardsigmoidBackward0")(diagonal(hardsigmoid))


@single("GluBackward0")
def glu_forward(step: Step, t: Block) -> Block:
    """``t_a s(b) + t_b a s'(b)``, the halves of one tangent."""
    dim = step.saved("dim") % len(step.shape)
    (d,) = derivative(step)
    assert d is not None
    a, b = times(t, d).data.chunk(2, dim + 1)
    return Block(a + b, step.shape)
