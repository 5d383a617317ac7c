"""Matrix products."""

import torch

from batchjac.samples import SampleAxis
from tests.rules.common import BF16, C128, F32, F64, Case, laws

ALL = (F64, F32, BF16, C128)
ROWS, COLUMNS = SampleAxis(0), SampleAxis(1)

CASES = [
    Case("MmBackward0", torch.mm, ((4, 3), (3, 5)), at=((ROWS, 4), (COLUMNS, 5)), dtypes=ALL),
    Case("MmBackward0", torch.mm, ((1, 3), (3, 1)), at=((ROWS, 1),)),
]

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)
