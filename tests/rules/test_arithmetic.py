"""Sums, products, quotients and powers; complex parts; what only hands a cotangent on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.samples import SHARED, SampleAxis
from tests.rules.common import BF16, C128, F32, F64, Case, laws, record

ALL = (F64, F32, BF16, C128)
REAL = (F64, F32, BF16)
AT = ((SampleAxis(0), 4), (SampleAxis(1), 3), (SampleAxis(0, 2, 1), 2), (SampleAxis(0, 1, 2), 2))


def positive(x: Tensor) -> Tensor:
    return x.abs() + 0.5


def several(
    name: str, function: Callable[..., Tensor], *shapes: tuple[int, ...], **more: Any
) -> Case:
    more = {"dtypes": ALL, "at": AT, **more}
    return Case(name, function, shapes, **more)


def no_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 0.3, 0.3, x)


def overwritten(x: Tensor) -> Tensor:
    return torch.zeros(4, 3, dtype=x.dtype).copy_(x)


def negative_view(z: Tensor) -> Tensor:
    return torch._neg_view(z) + 0


HOLES = torch.tensor([[0.0], [2.0], [0.0], [3.0]])

CASES = [
    several("AddBackward0", torch.add, (4, 3), (3,)),
    several("AddBackward0", partial(torch.add, alpha=2), (4, 1), (4, 3)),
    several("AddBackward0", partial(torch.add, alpha=1 - 2j), (4, 1), (4, 3), dtypes=(C128,)),
    several("AddBackward0", lambda x: x + x, (4, 3)),
    several("AddBackward1", lambda x: torch.ops.aten.add.Scalar(x, 2), (4, 3)),
    several("SubBackward0", partial(torch.sub, alpha=3), (4, 3), (3,)),
    several("SubBackward1", lambda x: torch.ops.aten.sub.Scalar(x, 2), (4, 3)),
    several("RsubBackward0", partial(torch.rsub, alpha=3), (4, 3), (1, 3)),
    several("RsubBackward1", lambda x: 1 - x, (4, 3)),
    several("RsubBackward1", partial(torch.rsub, other=1, alpha=2j), (4, 3), dtypes=(C128,)),
    several("NegBackward0", torch.neg, (4, 3)),
    several("NegViewBackward0", negative_view, (4, 3), dtypes=REAL),
    several("MulBackward0", torch.mul, (4, 3), (3,)),
    several("MulBackward0", torch.mul, (4, 3), ()),
    several("MulBackward0", torch.mul, (4, 1), (1, 3)),
    several("MulBackward0", torch.mul, (), (), at=()),
    several("MulBackward0", torch.mul, (2, 0), (2, 1), at=((SampleAxis(0), 2),)),
    several("MulBackward0", lambda x: x * x, (4, 3)),
    several("MulBackward0", lambda x: x * (HOLES > 0), (4, 3)),
    several("MulBackward0", lambda x: x * torch.tensor(2.5, dtype=F64), (4, 3), dtypes=(F32, BF16)),
    several("MulBackward0", lambda x: x * torch.tensor(1 + 2j), (4, 3), dtypes=(F64,)),
    several("MulBackward1", lambda x: torch.ops.aten.mul.Scalar(x, 3), (4, 3)),
    several("MulBackward1", lambda x: torch.ops.aten.mul.Scalar(x, 3j), (4, 3), dtypes=(C128,)),
    several("DivBackward0", torch.div, (4, 3), (3,), make=no_zero, dtypes=REAL),
    several("DivBackward0", torch.div, (4, 1), (4, 3), dtypes=(C128,)),
    several("DivBackward0", lambda x: x / 3, (4, 3)),
    several("DivBackward0", torch.div, (3,), (), make=positive, at=(), dtypes=REAL),
    several("DivBackward1", lambda x: torch.ops.aten.div.Scalar(x, 3), (4, 3)),
    several("DivBackward1", lambda x: torch.ops.aten.div.Scalar(x, 2j), (4, 3), dtypes=(C128,)),
    several("PowBackward0", lambda x: x**3, (4, 3)),
    several("PowBackward0", lambda x: x**0, (4, 3), special=True),
    several("PowBackward0", lambda x: x**0.5, (4, 3), make=positive),
    several("PowBackward1", torch.pow, (4, 3), (3,), make=positive, dtypes=REAL),
    several("PowBackward1", torch.pow, (4, 3), (4, 1), dtypes=(C128,)),
    several("PowBackward1", lambda x: x**HOLES, (4, 3), special=True, dtypes=REAL),
    several("PowBackward1", lambda y: HOLES.to(y.dtype) ** y, (4, 3), make=positive, dtypes=REAL),
    several("PowBackward2", lambda y: 2**y, (4, 3), dtypes=REAL),
    several("AddcmulBackward0", partial(torch.addcmul, value=2), (3,), (4, 3), (4, 1)),
    several("LerpBackward0", partial(torch.lerp, weight=0.3), (4, 3), (3,), dtypes=REAL),
    several("LerpBackward0", partial(torch.lerp, weight=0.3j), (4, 3), (4, 3), dtypes=(C128,)),
    several("CloneBackward0", torch.clone, (4, 3)),
    several("CloneBackward0", lambda x: x.mT.contiguous(), (3, 4)),
    several("LazyCloneBackward0", torch._lazy_clone, (4, 3), dtypes=REAL),
    several("AliasBackward0", torch.ops.aten.alias, (4, 3)),
    several("LiftBackward0", lambda x: torch.ops.aten.lift(x * 1), (4, 3), dtypes=REAL),
    several("LiftFreshBackward0", lambda x: torch.ops.aten.lift_fresh(x * 1), (4, 3), dtypes=REAL),
    several("ToCopyBackward0", lambda x: x.to(F64), (4, 3), dtypes=(F32, BF16)),
    several("ToCopyBackward0", lambda x: x.to(F32), (4, 3), dtypes=(F64,), second=False),
    several("ToCopyBackward0", lambda x: x.to(C128), (4, 3), dtypes=(F64, F32)),
    several("torch::autograd::CopyBackwards", overwritten, (4, 3)),
    several("torch::autograd::CopyBackwards", overwritten, (3,), wants=(True,)),
    several("FracBackward0", torch.frac, (4, 3), dtypes=REAL),
    several("FmodBackward0", lambda x: torch.fmod(x, 2), (4, 3), dtypes=REAL),
    several("RemainderBackward0", lambda x: x % 2, (4, 3), dtypes=REAL),
    several("ConjBackward0", lambda z: z.conj() + 0, (4, 3), dtypes=(C128,)),
    several("ConjPhysicalBackward0", torch.conj_physical, (4, 3), dtypes=(C128,)),
    several("ConjPhysicalBackward1", lambda z: (z + 0).conj_physical_(), (4, 3), dtypes=(C128,)),
    several("ComplexBackward0", torch.complex, (4, 3), (3,), dtypes=(F64, F32)),
    several("PolarBackward0", torch.polar, (4, 3), (4, 1), dtypes=(F64, F32), make=positive),
]  # fmt: skip

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)


def test_a_real_factor_of_complex_rows_gets_the_real_part():
    case = Case("MulBackward0", lambda x: x * torch.tensor([1 + 2j, 3 - 1j, 2j]), ((4, 3),))
    recorded = record(case)
    rows = torch.randn(2, 4, 3, dtype=recorded.step.outputs[0].dtype)
    (found, _) = recorded.rule.reverse(recorded.step, [Block(rows, (4, 3))])
    factor = torch.tensor([1 + 2j, 3 - 1j, 2j])
    assert torch.allclose(found.to(F64).data, (rows * factor.conj()).real.to(F64))


@pytest.mark.parametrize(("shape", "shared"), [((3,), True), ((1, 3), True), ((4, 1), False)])
def test_an_operand_without_the_sample_axis_is_shared(shape: tuple[int, ...], shared: bool):
    recorded = record(Case("MulBackward0", torch.mul, ((4, 3), shape)))
    assert recorded.rule.samples is not None
    first, second = recorded.rule.samples(recorded.step, SampleAxis(0))
    assert first == SampleAxis(0)
    assert (second is SHARED) == shared
