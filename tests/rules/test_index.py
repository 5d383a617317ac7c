"""Select, gather, scatter, sort, advanced indexing, embedding."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac.rules import advanced
from batchjac.samples import SampleAxis
from tests.rules.common import BF16, C128, F32, F64, Case, laws

ALL = (F64, F32, BF16, C128)
FIRST, SECOND, THIRD = SampleAxis(0), SampleAxis(1), SampleAxis(2)
TWICE = torch.tensor([2, 0, 2])
WHERE = torch.tensor([[[1, 0], [2, 2]], [[0, 0], [1, 2]], [[2, 1], [0, 0]]])
ONCE = torch.tensor([[[1, 0], [2, 2]], [[0, 1], [1, 2]], [[2, 1], [0, 0]]])


def gather(x: Tensor) -> Tensor:
    return x.gather(1, WHERE)


GATHERED = [
    Case("IndexSelectBackward0", lambda x: x.index_select(1, TWICE), ((2, 3, 4),), dtypes=ALL,
         at=((FIRST, 2), (THIRD, 4)), mixes=((SECOND, 3),), special=True),
    Case("IndexSelectBackward0", lambda x: x.index_select(-1, torch.tensor(1)), ((2, 3),)),
    Case("IndexSelectBackward0", lambda x: x.index_select(0, torch.tensor([0])), ((),),
         declines=True),
    Case("GatherBackward0", gather, ((3, 3, 2),), dtypes=ALL, special=True,
         at=((FIRST, 3), (THIRD, 2)), mixes=((SECOND, 2),)),
    Case("GatherBackward0", lambda x: x.gather(-2, WHERE[:2]), ((3, 3, 4),), note="smaller",
         mixes=((FIRST, 2),)),
    Case("GatherBackward0", lambda x: x.gather(0, torch.tensor(0)), ((),), declines=True),
    Case("GatherBackward0", lambda x: x.gather(1, WHERE, sparse_grad=True), ((3, 3, 2),),
         declines=True, note="sparse"),
    Case("GatherBackward0", lambda x: x.take_along_dim(WHERE[:, :1], 1), ((3, 3, 2),)),
    Case("SortBackward0", lambda x: x.sort(1)[0], ((2, 3, 2),), dtypes=(F64, F32, BF16),
         at=((FIRST, 2), (THIRD, 2)), mixes=((SECOND, 3),), special=True),
    Case("SortBackward1", lambda x: x.sort(dim=-1, descending=True, stable=True)[0], ((2, 3),),
         at=((FIRST, 2),)),
    Case("SortBackward0", lambda x: x.sort()[0], ((),), declines=True),
    Case("TopkBackward0", lambda x: x.topk(2, 1)[0], ((2, 4, 2),), dtypes=(F64, F32, BF16),
         at=((FIRST, 2), (THIRD, 2)), mixes=((SECOND, 2),), special=True),
    Case("MaskedSelectBackward0", lambda x: x.masked_select(WHERE > 0), ((3, 2, 2),), dtypes=ALL,
         mixes=((FIRST, 8),)),
    Case("MaskedSelectBackward0", lambda x: x.masked_select(WHERE > 0), ((2, 2),),
         note="broadcast"),
    Case("TakeBackward0", lambda x: x.take(torch.tensor([[1, -2], [5, 1]])), ((2, 3),), dtypes=ALL,
         mixes=((FIRST, 2),)),
    Case("TakeBackward0", lambda x: x.take(torch.tensor(0)), ((),)),
]  # fmt: skip

SCATTERED = [
    Case("ScatterBackward0", lambda x, y: x.scatter(1, ONCE, y), ((3, 3, 2), (3, 2, 2)),
         dtypes=ALL, at=((FIRST, 3), (THIRD, 2)), mixes=((SECOND, 3),), special=True),
    Case("ScatterBackward0", lambda x, y: x.scatter(-1, ONCE[:2], y), ((3, 3, 3), (2, 2, 2)),
         mixes=((FIRST, 3),), note="smaller"),
    Case("ScatterBackward0", lambda x, y: x.scatter(1, ONCE, y), ((3, 3, 2), (3, 3, 2)),
         declines=True, note="larger source", wants=(False, True)),
    Case("ScatterBackward1", lambda x: x.scatter(1, ONCE, 2.0), ((3, 3, 2),), special=True,
         at=((FIRST, 3),), mixes=((SECOND, 3),)),
    Case("ScatterBackward1", lambda x: x.scatter(0, torch.tensor(0), 2.0), ((),), declines=True),
    Case("ScatterAddBackward0", lambda x, y: x.scatter_add(1, WHERE, y), ((3, 3, 2), (3, 2, 2)),
         dtypes=ALL, at=((FIRST, 3),), mixes=((SECOND, 3),)),
    Case("IndexAddBackward0", lambda x, y: x.index_add(1, TWICE, y, alpha=2),
         ((2, 4, 2), (2, 3, 2)), dtypes=ALL, at=((FIRST, 2), (THIRD, 2)), mixes=((SECOND, 4),)),
    Case("IndexAddBackward0", lambda x, y: x.index_add(0, torch.tensor([0]), y), ((), ()),
         declines=True),
    Case("IndexCopyBackward0", lambda x, y: x.index_copy(1, TWICE[:2], y),
         ((2, 4, 2), (2, 2, 2)), dtypes=ALL, at=((FIRST, 2),), mixes=((SECOND, 4),),
         special=True),
    Case("IndexFillBackward0", lambda x: x.index_fill(-1, TWICE, 1.0), ((2, 3),), dtypes=ALL,
         at=((FIRST, 2),), mixes=((SECOND, 3),), special=True),
]  # fmt: skip

COUNT = torch.arange(3)
HALF = torch.tensor([[True, False], [True, True], [False, True]])


def write(indices: tuple[Tensor | None, ...], accumulate: bool = False) -> Any:
    return lambda x, y: torch.ops.aten.index_put(x, indices, y, accumulate)


ADVANCED = [
    Case("IndexBackward0", lambda x: x[:, TWICE], ((2, 3, 4),), dtypes=ALL, special=True,
         at=((FIRST, 2), (THIRD, 4)), mixes=((SECOND, 3),)),
    Case("IndexBackward0", lambda x: x[:, WHERE, TWICE[:2]], ((2, 3, 3, 2),),
         at=((FIRST, 2), (SampleAxis(4), 2)), mixes=((SECOND, 3), (SampleAxis(3), 2))),
    Case("IndexBackward0", lambda x: x[TWICE, :, WHERE[:, 0, :1]], ((3, 2, 3),), note="apart",
         at=((THIRD, 2),), mixes=((FIRST, 3), (SECOND, 3))),
    Case("IndexBackward0", lambda x: x[:, TWICE, :, TWICE], ((2, 3, 2, 3),), note="apart",
         at=((SECOND, 2), (THIRD, 2))),
    Case("IndexBackward0", lambda x: x[COUNT, TWICE], ((3, 3, 2),), note="one of each sample",
         at=((FIRST, 3), (SECOND, 2), (SampleAxis(0, inner=3), 1))),
    Case("IndexBackward0", lambda x: x[COUNT[:, None], WHERE[:, 0]], ((3, 3, 2),),
         note="two of each sample", at=((FIRST, 3), (THIRD, 2)), mixes=((SECOND, 2),)),
    Case("IndexBackward0", lambda x: x[COUNT, :, TWICE], ((3, 2, 3),), note="counted, apart",
         at=((FIRST, 3), (SECOND, 2))),
    Case("IndexBackward0", lambda x: x[COUNT[:2], TWICE[:2]], ((3, 3),), note="not all samples",
         mixes=((FIRST, 2),)),
    Case("IndexBackward0", lambda x: x[HALF], ((3, 2, 2),), note="mask",
         at=((SECOND, 2),), mixes=((FIRST, 4),)),
    Case("IndexBackward0", lambda x: x[:, HALF.T[0]], ((2, 3),), at=((FIRST, 2),), note="mask"),
    Case("IndexBackward0", lambda x: x[torch.tensor(-1)][..., torch.tensor([-1, 0])], ((2, 3, 2),),
         at=((FIRST, 3),), note="negative"),
    Case("IndexBackward0", lambda x: x[torch.zeros(0, dtype=torch.long)], ((2, 3),), note="none"),
    Case("IndexPutBackward0", write((TWICE[:2],)), ((3, 2), (2, 2)),
         dtypes=ALL, at=((SECOND, 2),), mixes=((FIRST, 3),), special=True),
    Case("IndexPutBackward0", write((None, TWICE), accumulate=True),
         ((2, 3, 4), (2, 3, 4)), at=((FIRST, 2), (THIRD, 4))),
    Case("IndexPutBackward0", write((TWICE, None, TWICE)),
         ((3, 2, 3), (3, 2)), at=((SECOND, 2),), note="apart"),
    Case("IndexPutBackward0", write((HALF,)), ((3, 2, 2), ()),
         note="one value", mixes=((THIRD, 2),)),
    Case("IndexPutBackward0", write((None, TWICE)), ((2, 3), (3,)),
         note="broadcast", mixes=((FIRST, 2),)),
]  # fmt: skip

WORDS = torch.tensor([[1, 0, 4], [1, 1, 3]])


def embed(words: Tensor, **options: Any) -> Any:
    return lambda w: F.embedding(words, w, **options)


EMBEDDED = [
    Case("EmbeddingBackward0", embed(WORDS), ((5, 2),), dtypes=(F64, F32, BF16), special=True,
         at=((FIRST, 2), (SECOND, 3), (THIRD, 2))),
    Case("EmbeddingBackward0", embed(WORDS, padding_idx=1), ((5, 2),), special=True,
         at=((FIRST, 2), (SECOND, 3)), note="padding"),
    Case("EmbeddingBackward0", embed(WORDS.flatten()), ((5, 3),),
         at=((SampleAxis(0, inner=3), 2), (SampleAxis(0, outer=2), 3))),
    # torch's own second derivative of an embedding refuses an empty index
    Case("EmbeddingBackward0", embed(WORDS[:, :0]), ((5, 3),), at=((FIRST, 2),), note="empty",
         second=False),
    Case("EmbeddingBackward0", embed(torch.tensor(2)), ((5, 3),)),
    Case("EmbeddingBackward0", embed(WORDS, scale_grad_by_freq=True), ((5, 2),), declines=True,
         at=((FIRST, 2),), alone=False, note="by frequency"),
]  # fmt: skip

CASES = GATHERED + SCATTERED + ADVANCED + EMBEDDED

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)


@pytest.mark.parametrize(
    ("indices", "shape"),
    [
        ((TWICE,), (3, 2, 4)),
        ((None, TWICE), (2, 3, 4)),
        ((TWICE, None, WHERE[..., :1]), (3, 2, 3, 4)),
        ((None, TWICE, WHERE[:, :1, :1]), (2, 3, 3)),
        ((HALF,), (3, 2, 4)),
        ((None, HALF), (4, 3, 2)),
    ],
)
def test_the_axes_of_a_result_lie_as_torch_lays_them(
    indices: tuple[Tensor | None, ...], shape: tuple[int, ...]
):
    x = torch.randn(shape)
    layout = advanced._layout(indices, x.dim())
    expected = [x.shape[d] for d in layout.rest]
    expected[layout.first : layout.first] = layout.shape
    assert tuple(torch.ops.aten.index(x, indices).shape) == tuple(expected)
