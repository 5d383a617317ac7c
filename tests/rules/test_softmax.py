"""Softmax, its logarithm, and the variant that gives 0 for a row of minus infinities."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from batchjac.samples import SampleAxis
from tests.rules.common import BF16, F32, F64, Case, laws

ALL = (F64, F32, BF16)
FIRST, SECOND, THIRD = SampleAxis(0), SampleAxis(1), SampleAxis(2)


def masked(x: Tensor) -> Tensor:
    """One row hidden in part, one altogether."""
    x = x.clone()
    x[0, 1:] = float("-inf")
    x[-1] = float("-inf")
    return x


CASES = [
    Case("SoftmaxBackward0", partial(torch.softmax, dim=-1), ((4, 3),), at=((FIRST, 4),),
         mixes=((SECOND, 3),), dtypes=ALL, special=True),
    Case("SoftmaxBackward0", partial(torch.softmax, dim=0), ((4, 3, 2),), dtypes=ALL,
         at=((SECOND, 3), (THIRD, 2)), mixes=((FIRST, 4),)),
    Case("SoftmaxBackward0", partial(torch.softmax, dim=1), ((12, 3, 2),),
         at=((SampleAxis(0, 2, 3), 2),)),
    Case("SoftmaxBackward0", partial(torch.softmax, dim=1), ((4, 3),), make=masked, second=False),
    Case("SoftmaxBackward0", partial(torch.softmax, dim=1), ((2, 0),), at=((FIRST, 2),)),
    Case("SoftmaxBackward0", partial(torch.softmax, dim=0), ((),)),
    Case("LogSoftmaxBackward0", partial(torch.log_softmax, dim=-1), ((4, 3),), at=((FIRST, 4),),
         mixes=((SECOND, 3),), dtypes=ALL),
    Case("LogSoftmaxBackward0", partial(torch.log_softmax, dim=1), ((4, 3, 2),), dtypes=ALL,
         at=((FIRST, 4), (THIRD, 2)), mixes=((SECOND, 3),)),
    Case("LogSoftmaxBackward0", partial(torch.log_softmax, dim=0), ((),)),
    Case("SafeSoftmaxBackward0", partial(torch._safe_softmax, dim=-1), ((4, 3),), dtypes=ALL,
         at=((FIRST, 4),), mixes=((SECOND, 3),)),
    Case("SafeSoftmaxBackward0", partial(torch._safe_softmax, dim=-1), ((4, 3),), make=masked),
]  # fmt: skip

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)
