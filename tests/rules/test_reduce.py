"""Sums, means, norms, extrema, along some axes or all, with the axes kept or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchjac.block import Block
from batchjac.samples import SampleAxis
from tests.rules.common import BF16, C128, F32, F64, Case, laws, record

ALL = (F64, F32, BF16)
FIRST, SECOND, THIRD = SampleAxis(0), SampleAxis(1), SampleAxis(2)
CUBE = ((4, 3, 2),)


def ties(x: Tensor) -> Tensor:
    """Whole numbers, so that many entries are equal."""
    return x.round()


def gaps(x: Tensor) -> Tensor:
    """With nan among the entries."""
    x = x.clone()
    x.view(-1)[::5] = float("nan")
    return x


def same_row(x: Tensor) -> Tensor:
    """Nothing varies in the first sample; all its entries are zero."""
    x = x.clone()
    x[:1] = 0
    return x


def along(
    name: str, function: Callable[..., Tensor], dims: tuple[int, ...] = (1,), **more: Any
) -> list[Case]:
    """Over some axes of three, kept and not; the samples are the first axis that remains."""
    more = {"dtypes": ALL, **more}
    rest = [d for d in range(3) if d not in dims]
    at = tuple((SampleAxis(k), CUBE[0][d]) for k, d in enumerate(rest))
    mixed = ((SampleAxis(dims[0]), CUBE[0][dims[0]]),)
    dim = dims if len(dims) > 1 else dims[0]
    return [
        Case(name, partial(function, dim=dim), CUBE, at=at, note=f"over{dims}", **more),
        Case(
            name, partial(function, dim=dim, keepdim=True), CUBE, mixes=mixed,
            at=tuple((SampleAxis(d), CUBE[0][d]) for d in rest), note=f"over{dims}kept", **more,
        ),
    ]  # fmt: skip


def whole(name: str, function: Callable[..., Tensor], **more: Any) -> Case:
    return Case(name, function, ((4, 3),), **{"dtypes": ALL, **more})


def first(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda *a, **k: function(*a, **k)[0]


def both(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    def total(*a: object, **k: object) -> Tensor:
        one, two = function(*a, **k)
        return one + two

    return total


def legacy_norm(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return torch.ops.aten.norm.ScalarOpt_dim(x, 3, [dim], keepdim)


def legacy_norm_wide(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return torch.ops.aten.norm.ScalarOpt_dim_dtype(x, 2, [dim], keepdim, dtype=F64)


CASES = [
    whole("SumBackward0", torch.sum, dtypes=(*ALL, C128)),
    Case("SumBackward0", torch.sum, ((),)),
    *along("SumBackward1", torch.sum, dtypes=(*ALL, C128)),
    *along("SumBackward1", torch.sum, (0, 2)),
    *along("SumBackward1", torch.sum, (0,), dtypes=(F64,)),
    Case("SumBackward1", partial(torch.sum, dim=()), ((4, 3),)),
    Case("SumBackward1", partial(torch.sum, dim=-1), ((12, 3),), at=((SampleAxis(0, 2, 3), 2),)),
    Case("SumBackward1", partial(torch.sum, dim=1, dtype=F64), ((4, 3),), dtypes=(F32,),
         at=((FIRST, 4),)),
    whole("MeanBackward0", torch.mean),
    *along("MeanBackward1", torch.mean, dtypes=(*ALL, C128)),
    *along("MeanBackward1", torch.mean, (1, 2)),
    Case("MeanBackward1", partial(torch.mean, dim=-1), ((4, 3),), at=((FIRST, 4),)),
    Case("MeanBackward1", partial(torch.mean, dim=1), ((4, 0),), declines=True),
    *along("NansumBackward0", torch.nansum, make=gaps),
    *along("ProdBackward1", torch.prod),
    *along("ProdBackward1", torch.prod, make=ties, second=False),
    whole("ProdBackward0", torch.prod),
    *along("VarBackward0", torch.var),
    *along("VarBackward0", partial(torch.var, correction=0), (0, 2), dtypes=(F64, C128)),
    whole("VarBackward0", torch.var),
    *along("StdBackward0", torch.std),
    *along("StdBackward0", torch.std, make=same_row, special=True, second=False),
    *along("VarMeanBackward0", both(torch.var_mean), outputs=2),
    *along("VarMeanBackward0", first(torch.var_mean)),
    *along("StdMeanBackward0", both(torch.std_mean), outputs=2),
    *along("LogsumexpBackward0", torch.logsumexp),
    *along("LogsumexpBackward0", torch.logsumexp, (0, 2)),
    *along("AmaxBackward0", torch.amax, make=ties, special=True, second=False),
    *along("AmaxBackward0", torch.amax, (0, 2)),
    *along("AminBackward0", torch.amin, make=ties),
    whole("AminBackward0", torch.amin),
    *along("AminmaxBackward0", both(torch.aminmax), make=ties, outputs=2),
    whole("AminmaxBackward0", both(torch.aminmax), outputs=2),
    *along("LinalgVectorNormBackward0", torch.linalg.vector_norm, dtypes=(*ALL, C128)),
    *along("LinalgVectorNormBackward0", torch.linalg.vector_norm, make=same_row, second=False),
    *[
        case
        for p in (0, 0.5, 1, 1.5, 3, float("inf"), float("-inf"))
        for case in along(
            "LinalgVectorNormBackward0", partial(torch.linalg.vector_norm, ord=p), dtypes=(F64,)
        )
    ],
    whole("LinalgVectorNormBackward0", torch.linalg.vector_norm),
    whole("NormBackward0", lambda x: torch.ops.aten.norm.Scalar(x, 3)),
    *along("NormBackward1", legacy_norm),
    whole("NormBackward2", lambda x: torch.ops.aten.norm.ScalarOpt_dtype(x, 2, dtype=F64),
          dtypes=(F64, F32)),
    *along("NormBackward3", legacy_norm_wide, dtypes=(F64, F32)),
    whole("MaxBackward1", torch.max, make=ties, special=True),
    whole("MinBackward1", torch.min),
    whole("MedianBackward0", torch.median, make=ties),
    whole("NanmedianBackward0", torch.nanmedian, make=gaps),
    *along("MaxBackward0", first(torch.max), make=ties, special=True),
    *along("MinBackward0", first(torch.min)),
    *along("MedianBackward1", first(torch.median), (0,)),
    *along("NanmedianBackward1", first(torch.nanmedian), make=gaps),
    *along("ModeBackward0", first(torch.mode), make=ties),
    *along("KthvalueBackward0", first(partial(torch.kthvalue, k=2)), special=True),
    Case("MaxBackward0", first(partial(torch.max, dim=0)), ((),)),
]  # fmt: skip


def running(name: str, function: Callable[..., Tensor], **more: Any) -> list[Case]:
    at, mixes = ((FIRST, 4), (THIRD, 2)), ((SECOND, 3),)
    return [
        Case(name, partial(function, dim=1), CUBE, at=at, mixes=mixes, **{"dtypes": ALL, **more}),
        Case(name, partial(function, dim=0), ((),), **{"dtypes": (F64,), **more}),
    ]


TARGET = torch.tensor([0, 2, 1, 2])
CASES += [
    Case("NllLossBackward0", partial(F.nll_loss, target=TARGET, reduction="none"), ((4, 3),),
         at=((FIRST, 4), (SampleAxis(0, 2, 1), 2)), dtypes=ALL, special=True),
    Case("NllLossBackward0",
         lambda x: F.nll_loss(x, TARGET, x.new_tensor([1, 2, 0]), ignore_index=1, reduction="none"),
         ((4, 3),), at=((FIRST, 4),)),
    Case("NllLossBackward0", partial(F.nll_loss, target=TARGET), ((4, 3),), declines=True),
    Case("NllLossBackward0", partial(F.nll_loss, target=TARGET[1], reduction="none"), ((3,),)),
    Case("NllLoss2DBackward0",
         partial(F.nll_loss, target=TARGET.view(2, 1, 2), reduction="none"), ((2, 3, 1, 2),),
         at=((FIRST, 2), (THIRD, 2))),
    *running("CumsumBackward0", torch.cumsum),
    *running("CumsumBackward0", partial(torch.cumsum, dtype=F64), dtypes=(F32,)),
    *running("CummaxBackward0", first(torch.cummax), make=ties),
    *running("CumminBackward0", first(torch.cummin)),
    *running("CumprodBackward0", torch.cumprod, declines=True),
    *running("LogcumsumexpBackward0", torch.logcumsumexp, declines=True),
]  # fmt: skip

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)


@pytest.mark.parametrize("function", [torch.sum, torch.mean])
def test_a_folded_axis_comes_back_with_size_one(function: Callable[..., Tensor]):
    name = f"{function.__name__.title()}Backward1"
    recorded = record(Case(name, partial(function, dim=(1, 2)), CUBE))
    (found,) = recorded.rule.reverse(recorded.step, [Block(torch.ones(5, 4, dtype=F64), (4,))])
    assert found.data.shape == (5, 4, 1, 1)
