"""Matrix products."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from batchjac.samples import SampleAxis
from tests.rules.common import BF16, C128, F32, F64, Case, laws

ALL = (F64, F32, BF16, C128)
FIRST, SECOND, THIRD = SampleAxis(0), SampleAxis(1), SampleAxis(2)
MERGED = SampleAxis(0, outer=2, inner=3)  # 2 x 2 samples x 3


def addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(c, a, b, beta=0.5, alpha=2)


def turned(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(c, a, b, beta=1 - 1j, alpha=2j)


def tied(a: Tensor) -> Tensor:
    return a @ a


def repeated(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b.expand(4, 3, 5))


def bilinear(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return F.bilinear(a, b, weight) + 0


CASES = [
    Case("MmBackward0", torch.mm, ((4, 3), (3, 5)), at=((FIRST, 4), (SECOND, 5)), dtypes=ALL),
    Case("MmBackward0", torch.mm, ((12, 3), (3, 2)), at=((MERGED, 2),)),
    Case("MmBackward0", torch.mm, ((1, 3), (3, 1)), at=((FIRST, 1),)),
    Case("MmBackward0", torch.mm, ((2, 0), (0, 3)), at=((FIRST, 2),)),
    Case("MmBackward0", torch.mm, ((2, 3), (3, 4)), wants=(False, True), at=((FIRST, 2),)),
    Case("MmBackward0", tied, ((3, 3),)),
    Case("AddmmBackward0", addmm, ((5,), (4, 3), (3, 5)), at=((FIRST, 4),), dtypes=ALL),
    Case("AddmmBackward0", torch.addmm, ((1, 2), (12, 3), (3, 2)), at=((MERGED, 2),)),
    Case("AddmmBackward0", addmm, ((4, 5), (4, 3), (3, 5)), at=((FIRST, 4), (SECOND, 5))),
    Case("AddmmBackward0", addmm, ((4, 1), (4, 3), (3, 5)), at=((FIRST, 4), (SECOND, 5))),
    Case("AddmmBackward0", turned, ((5,), (4, 3), (3, 5)), at=((FIRST, 4),), dtypes=(C128,)),
    Case(
        "BmmBackward0", torch.bmm, ((4, 2, 3), (4, 3, 5)), dtypes=ALL,
        at=((FIRST, 4), (SampleAxis(0, 2, 1), 2), (SECOND, 2), (THIRD, 5)),
    ),
    Case("BmmBackward0", torch.bmm, ((2, 12, 3), (2, 3, 2)), at=((SampleAxis(1, 2, 3), 2),)),
    Case(
        "BmmBackward0", repeated, ((4, 2, 3), (3, 5)), at=((FIRST, 4), (SECOND, 2)), dtypes=ALL,
    ),
    Case(
        "BaddbmmBackward0", partial(torch.baddbmm, beta=0.5, alpha=3), dtypes=ALL,
        shapes=((1, 5), (4, 2, 3), (4, 3, 5)), at=((FIRST, 4), (SECOND, 2), (THIRD, 5)),
    ),
    Case(
        "AddbmmBackward0", partial(torch.addbmm, beta=0.5, alpha=3),
        shapes=((2, 5), (4, 2, 3), (4, 3, 5)), at=((FIRST, 2), (SECOND, 5)),
    ),
    Case("MvBackward0", torch.mv, ((4, 3), (3,)), at=((FIRST, 4),), dtypes=ALL),
    Case("MvBackward0", torch.mv, ((12, 3), (3,)), at=((MERGED, 2),)),
    Case("AddmvBackward0", partial(torch.addmv, beta=2), ((4,), (4, 3), (3,)), at=((FIRST, 4),)),
    Case(
        "AddrBackward0", partial(torch.addr, beta=2, alpha=3), ((4, 5), (4,), (5,)),
        at=((FIRST, 4), (SECOND, 5)), dtypes=ALL,
    ),
    Case("VdotBackward0", torch.vdot, ((4,), (4,))),
    Case("VdotBackward0", torch.vdot, ((4,), (4,)), dtypes=(C128,), declines=True),
    Case(
        "TrilinearBackward0", bilinear, ((4, 2), (4, 3), (5, 2, 3)),
        at=((FIRST, 4), (SampleAxis(0, 2, 1), 2)), dtypes=(F64, F32),
    ),
    Case("TrilinearBackward0", bilinear, ((12, 2), (12, 3), (1, 2, 3)), at=((MERGED, 2),)),
    Case("DotBackward0", torch.dot, ((4,), (4,)), dtypes=ALL),
]  # fmt: skip

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)
