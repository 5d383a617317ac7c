"""Functions of each entry: smooth ones, flat ones, and those that let through or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchjac.block import Block
from batchjac.rules.diagonal import keep
from batchjac.samples import SampleAxis
from tests.rules.common import BF16, C128, F32, F64, Case, laws, record

ALL = (F64, F32, BF16)
SHAPE = (4, 3)
AT = ((SampleAxis(0), 4), (SampleAxis(1), 3), (SampleAxis(0, 2, 1), 2))


def kinks(x: Tensor) -> Tensor:
    """Values that hit the corners of piecewise functions."""
    return (2 * x).round() / 2


def odd(x: Tensor) -> Tensor:
    """With inf, -inf, nan and zero among them."""
    x = x.clone()
    flat = x.view(-1)[:4]
    flat[:] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])[: len(flat)]
    return x


def unit(x: Tensor) -> Tensor:
    return x.sigmoid() * 0.8 + 0.1


def above(x: Tensor) -> Tensor:
    return x.abs() + 1.1


def inplace(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x + 0)


def slope(x: Tensor, g: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A derivative inside the function, as a physics residual has it."""
    inner = x.clone()
    return torch.autograd.grad(function(inner), inner, g, create_graph=True)[0] + 0


def unary(name: str, function: Callable[[Tensor], Tensor], **more: Any) -> Case:
    more = {"dtypes": ALL, **more}
    return Case(name, function, (SHAPE,), at=AT[:1], **more)


SMOOTH = [
    unary("AbsBackward0", torch.abs, dtypes=(*ALL, C128)),
    unary("AcosBackward0", torch.acos, make=unit),
    unary("AcoshBackward0", torch.acosh, make=above),
    unary("AngleBackward0", torch.angle, dtypes=(F64, C128)),
    unary("AsinBackward0", torch.asin, make=unit),
    unary("AsinhBackward0", torch.asinh),
    unary("AtanBackward0", torch.atan),
    unary("AtanhBackward0", torch.atanh, make=unit),
    unary("CeluBackward0", partial(F.celu, alpha=0.7), special=True),
    unary("CeluBackward1", inplace(torch.celu_), second=False),
    unary("CosBackward0", torch.cos, dtypes=(*ALL, C128)),
    unary("CoshBackward0", torch.cosh),
    unary("Deg2RadBackward0", torch.deg2rad),
    unary("DigammaBackward0", torch.digamma, make=above),
    unary("EluBackward0", F.elu, special=True),
    unary("EluBackward0", F.selu, note="selu"),
    unary("EluBackward1", inplace(partial(F.elu_, alpha=0.5))),
    unary("ErfBackward0", torch.erf),
    unary("ErfcBackward0", torch.erfc),
    unary("ErfinvBackward0", torch.erfinv, make=unit),
    unary("Exp2Backward0", torch.exp2),
    unary("ExpBackward0", torch.exp, dtypes=(*ALL, C128)),
    unary("Expm1Backward0", torch.expm1),
    unary("GeluBackward0", F.gelu),
    unary("GeluBackward0", partial(F.gelu, approximate="tanh"), note="tanh"),
    unary("I0Backward0", torch.i0),
    unary("LeakyReluBackward0", partial(F.leaky_relu, negative_slope=0.0), special=True),
    unary("LeakyReluBackward1", inplace(partial(F.leaky_relu_, negative_slope=0.3))),
    unary("LgammaBackward0", torch.lgamma, make=above),
    unary("Log10Backward0", torch.log10, make=above),
    unary("Log1PBackward0", torch.log1p, make=above),
    unary("Log2Backward0", torch.log2, make=above),
    unary("LogBackward0", torch.log, make=above),
    unary("LogSigmoidBackward0", F.logsigmoid),
    unary("LogitBackward0", partial(torch.logit, eps=0.2), make=unit),
    unary("MishBackward0", F.mish),
    unary("NanToNumBackward0", torch.nan_to_num, make=odd, special=True),
    unary("NativeDropoutBackward0", lambda x: torch.native_dropout(x, 0.5, True)[0], special=True),
    unary("Rad2DegBackward0", torch.rad2deg),
    unary("ReciprocalBackward0", torch.reciprocal, make=above),
    unary("RreluWithNoiseBackward0", partial(F.rrelu, training=True)),
    unary("RreluWithNoiseBackward0", F.rrelu, note="eval"),
    unary("RreluWithNoiseBackward1", inplace(partial(F.rrelu_, training=True)), second=False),
    unary("RsqrtBackward0", torch.rsqrt, make=above),
    unary("SigmoidBackward0", torch.sigmoid, dtypes=(*ALL, C128)),
    unary("SiluBackward0", F.silu),
    unary("SinBackward0", torch.sin),
    unary("SincBackward0", torch.sinc),
    unary("SinhBackward0", torch.sinh),
    unary("SoftplusBackward0", partial(F.softplus, beta=2, threshold=1.0), special=True),
    unary("SpecialEntrBackward0", torch.special.entr, make=above),
    unary("SpecialErfcxBackward0", torch.special.erfcx, dtypes=(F64,)),
    unary("SpecialI0EBackward0", torch.special.i0e),
    unary("SpecialI1Backward0", torch.special.i1, dtypes=(F64, F32)),
    unary("SpecialI1EBackward0", torch.special.i1e, dtypes=(F64, F32)),
    unary("SpecialLogNdtrBackward0", torch.special.log_ndtr, dtypes=(F64, F32)),
    unary("SpecialNdtriBackward0", torch.special.ndtri, make=unit, dtypes=(F64, F32)),
    unary("SqrtBackward0", torch.sqrt, make=above, dtypes=(*ALL, C128)),
    unary("TanBackward0", torch.tan, make=unit),
    unary("TanhBackward0", torch.tanh, dtypes=(*ALL, C128)),
]


def several(name: str, function: Callable[..., Tensor], *shapes: tuple[int, ...], **more: Any):
    more = {"dtypes": (F64, F32), "at": AT, **more}
    return Case(name, function, shapes, **more)


BROADCAST = ((4, 3), (3,))
SEVERAL = [
    several("AddcdivBackward0", partial(torch.addcdiv, value=2), (3,), (4, 3), (4, 1), dtypes=ALL),
    several("Atan2Backward0", torch.atan2, *BROADCAST),
    several("CopysignBackward0", torch.copysign, *BROADCAST),
    several("CopysignBackward1", partial(torch.copysign, other=-2.0), (4, 3)),
    several("FmodBackward1", torch.fmod, *BROADCAST, make=above),
    several("HypotBackward0", torch.hypot, *BROADCAST),
    several("LerpBackward1", torch.lerp, (4, 1), (4, 3), (3,)),
    several("Logaddexp2Backward0", torch.logaddexp2, *BROADCAST),
    several("LogaddexpBackward0", torch.logaddexp, *BROADCAST),
    several("RemainderBackward1", torch.remainder, *BROADCAST, make=above),
    several(
        "BinaryCrossEntropyBackward0", partial(F.binary_cross_entropy, reduction="none"),
        (4, 3), (4, 3), make=unit,
    ),
    several(
        "BinaryCrossEntropyWithLogitsBackward0",
        partial(F.binary_cross_entropy_with_logits, reduction="none"), (4, 3), (4, 3), make=unit,
    ),
    several("HuberLossBackward0", partial(F.huber_loss, reduction="none"), (4, 3), (4, 3)),
    several("MseLossBackward0", partial(F.mse_loss, reduction="none"), (4, 3), (4, 3)),
    several("MseLossBackward0", F.mse_loss, (4, 3), (4, 3), at=(), declines=True),
    several("SmoothL1LossBackward0", partial(F.smooth_l1_loss, reduction="none"), (4, 3), (4, 3)),
    several(
        "SoftMarginLossBackward0",
        lambda x: F.soft_margin_loss(x, x.detach().sign(), reduction="none"), (4, 3),
    ),
]  # fmt: skip

SEVERAL += [
    several(name, partial(slope, function=function), (4, 3), (4, 3))
    for name, function in (
        ("EluBackwardBackward0", F.elu),
        ("GeluBackwardBackward0", F.gelu),
        ("LeakyReluBackwardBackward0", F.leaky_relu),
        ("LogSigmoidBackwardBackward0", F.logsigmoid),
        ("SigmoidBackwardBackward0", torch.sigmoid),
        ("SoftplusBackwardBackward0", F.softplus),
        ("TanhBackwardBackward0", torch.tanh),
    )
]
SEVERAL += [
    several("XlogyBackward0", torch.xlogy, (4, 3), (3,), make=above),
    several("XlogyBackward1", partial(torch.xlogy, 2.0), (4, 3), make=above),
    several("XlogyBackward2", lambda x: torch.xlogy(x, 2.0), (4, 3)),
    several("XlogyBackward2", lambda x: torch.xlogy(x, 0.0), (4, 3), make=kinks, at=(),
            second=False),
    several(
        "TanhBackwardBackward0", partial(slope, function=torch.tanh), (4, 3), (4, 3),
        dtypes=(C128,), declines=True, at=AT[:1], alone=False,
    ),
]  # fmt: skip

FLAT = [
    unary("BernoulliBackward0", torch.bernoulli, make=unit),
    unary("CeilBackward0", torch.ceil),
    several("DivBackward2", partial(torch.div, rounding_mode="floor"), *BROADCAST),
    several("DivBackward2", partial(torch.div, rounding_mode=None), *BROADCAST, declines=True,
            alone=False),
    unary("DivBackward3", lambda x: torch.ops.aten.div.Scalar_mode(x, 2, rounding_mode="trunc")),
    unary("FloorBackward0", torch.floor),
    unary("PoissonBackward0", torch.poisson, make=above),
    unary("RoundBackward0", torch.round),
    unary("RoundBackward1", partial(torch.round, decimals=1)),
    unary("SgnBackward0", torch.sgn),
    unary("SgnBackward0", torch.sgn, dtypes=(C128,), declines=True),
    unary("SignBackward0", torch.sign),
    unary("TruncBackward0", torch.trunc),
]  # fmt: skip


def gated(name: str, function: Callable[..., Tensor], *shapes: tuple[int, ...], **more: Any):
    """At the corners, then with inf and nan in the input; inf and nan in the cotangents too."""
    more = {"special": True, "dtypes": ALL, "at": AT, **more}
    shapes = shapes or (SHAPE,)
    return [
        Case(name, function, shapes, make=kinks, **more),
        Case(name, function, shapes, make=odd, note="odd", **{**more, "second": False, "at": ()}),
    ]


def upside_down(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(x, high, low)


MASK = torch.tensor([[True], [False], [True], [False]])
CHOICE = torch.tensor([[True, False, True]])
GATED = [
    *gated("ReluBackward0", F.relu),
    *gated("ReluBackward0", inplace(torch.relu_)),
    *gated("HardshrinkBackward0", F.hardshrink),
    *gated("HardsigmoidBackward0", lambda x: F.hardsigmoid(3 * x), second=False),
    *gated("HardswishBackward0", lambda x: F.hardswish(3 * x)),
    *gated("HardtanhBackward0", F.hardtanh),
    *gated("HardtanhBackward0", inplace(F.relu6)),
    *gated("SoftshrinkBackward0", F.softshrink),
    *gated("ThresholdBackward0", partial(F.threshold, threshold=0.5, value=2.0)),
    *gated("ThresholdBackward1", inplace(partial(F.threshold_, threshold=0.5, value=2.0))),
    *gated("ClampBackward1", partial(torch.clamp, min=-0.5, max=1)),
    *gated("ClampMinBackward0", partial(torch.clamp_min, min=0.5)),
    *gated("ClampMaxBackward0", partial(torch.clamp_max, max=0.5)),
    *gated("ClampBackward1", partial(torch.clamp, min=1, max=-1)),
    *gated("ClampBackward0", torch.clamp, (4, 3), (4, 1), (3,)),
    *gated("ClampBackward0", upside_down, (4, 3), (4, 1), (3,)),
    *gated("ClampBackward0", lambda x, low: torch.clamp(x, min=low), (4, 3), (4, 1)),
    *gated("ClampBackward0", lambda x, high: torch.clamp(x, max=high), (4, 3), (4, 3)),
    *gated("ClampMinBackward1", torch.clamp_min, (4, 3), (4, 1)),
    *gated("ClampMaxBackward1", torch.clamp_max, (4, 3), (4, 1)),
    *gated("ThresholdBackwardBackward0", partial(slope, function=F.relu), (4, 3), (4, 3)),
    *gated("HardtanhBackwardBackward0", partial(slope, function=F.hardtanh), (4, 3), (4, 3)),
    *gated("XlogyBackward0", torch.xlogy, (4, 3), (4, 1), second=False, at=()),
    *gated("WhereBackward0", partial(torch.where, CHOICE), (4, 3), (4, 1)),
    *gated("WhereBackward0", lambda x: torch.where(MASK, x, 0.0)),
    *gated("MaskedFillBackward0", lambda x: x.masked_fill(MASK, 2.0)),
    *gated("MaskedFillBackward0", lambda x: x.masked_fill(CHOICE[0], 2.0)),
    *gated("MaskedFillBackward1", lambda x, y: x.masked_fill(MASK, y.sum()), (4, 3), (4,)),
    *gated("MaximumBackward0", torch.maximum, (4, 3), (4, 1)),
    *gated("MinimumBackward0", torch.minimum, (3,), (4, 3)),
    *gated("FmaxBackward0", torch.fmax, (4, 3), (4, 1)),
    *gated("FminBackward0", torch.fmin, (3,), (4, 3)),
    *gated("PreluKernelBackward0", F.prelu, (4, 3), (3,), second=False),  # torch differs at 0
    *gated("PreluKernelBackward0", torch._prelu_kernel, (4, 3), (4, 3), second=False),
    several("PreluKernelBackward0", F.prelu, (4, 3), (3,)),
]

OTHER = [
    unary("MaskedFillBackward0", lambda x: x.masked_fill(MASK, 2.0), dtypes=(C128,)),
    Case("ReluBackward0", F.relu, ((),)),
    Case("TanhBackward0", torch.tanh, ((2, 0, 3),), at=((SampleAxis(0), 2),)),
    Case(
        "ReluBackward0", lambda x: F.relu(x.contiguous(memory_format=torch.channels_last)),
        ((2, 3, 4, 5),),
    ),
    Case(
        "GluBackward0", F.glu, ((4, 2, 6),), at=((SampleAxis(0), 4),),
        mixes=((SampleAxis(2), 3),), dtypes=ALL,
    ),
    Case("GluBackward0", partial(F.glu, dim=1), ((4, 6, 2),), at=((SampleAxis(2), 2),)),
]  # fmt: skip

CASES = [*SMOOTH, *SEVERAL, *FLAT, *GATED, *OTHER]

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)


@pytest.mark.parametrize("dtype", [F64, BF16, C128])
def test_keep_lets_nothing_through_a_closed_entry(dtype: torch.dtype):
    data = torch.tensor([[float("inf"), float("nan"), 1.0, float("inf")]], dtype=dtype)
    kept = keep(Block(data, (4,)), torch.tensor([False, False, True, True]))
    assert kept.data[0, :2].eq(0).all()
    assert torch.equal(kept.data[0, 2:], data[0, 2:])


def test_rows_that_are_the_same_all_along_stay_so_where_nothing_depends_on_the_entry():
    recorded = record(Case("SignBackward0", torch.sign, ((4, 3),)))
    block = Block(torch.ones(2, 1, 1, dtype=F64), (4, 3))
    (found,) = recorded.rule.reverse(recorded.step, [block])
    assert found.data.shape == (2, 1, 1)
