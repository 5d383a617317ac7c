"""Writing at indices through the operator that compiled graphs call, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from batchjac.samples import SampleAxis
from tests.rules.common import Case, laws

COLUMNS = torch.tensor([2, 0])


def put(x: Tensor, values: Tensor) -> Tensor:
    return torch.ops.aten._index_put_impl_(x + 0, [None, COLUMNS], values)


CASES = [
    Case("IndexPutImplBackward0", put, ((4, 3), (4, 2)), at=((SampleAxis(0), 4),)),
]

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)
