"""Views, permutations, repetition, mirror images; taking apart and putting together."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac.samples import SampleAxis
from tests.rules.common import BF16, C128, F32, F64, Case, laws, random_blocks, record

REAL = (F64, F32, BF16)
ALL = (*REAL, C128)
FIRST, SECOND, THIRD = SampleAxis(0), SampleAxis(1), SampleAxis(2)

VIEWS = [
    Case("ViewBackward0", lambda x: x.view(2, 12), ((2, 3, 4),), at=((FIRST, 2),), dtypes=ALL),
    Case("ViewBackward0", lambda x: x.view(6, 4), ((2, 3, 4),),
         at=((SampleAxis(0, inner=3), 2), (SampleAxis(0, outer=2), 3), (SECOND, 4))),
    Case("ViewBackward0", lambda x: x.view(4, 6), ((2, 3, 4),), mixes=((FIRST, 4), (SECOND, 6))),
    Case("ViewBackward0", lambda x: x.view(2, 3, 1, 2), ((2, 3, 2),), at=((FIRST, 2), (SECOND, 3))),
    Case("ViewBackward0", lambda x: x.view(()), ((1, 1),)),
    Case("ViewBackward0", lambda x: x.view(0, 6), ((2, 0, 3),)),
    Case("UnsafeViewBackward0", lambda x: x.mT.reshape(8, 3), ((2, 3, 4),),
         at=((SampleAxis(0, inner=4), 2),)),
    Case("ReshapeAliasBackward0", lambda x: torch.ops.aten._reshape_alias(x, (2, 6), (6, 1)),
         ((2, 3, 2),), at=((FIRST, 2),)),
    Case("SqueezeBackward0", lambda x: x.squeeze(), ((3, 1, 2, 1),), at=((FIRST, 3),)),
    Case("SqueezeBackward1", lambda x: x.squeeze(1), ((3, 1, 2),), at=((FIRST, 3), (SECOND, 2))),
    Case("SqueezeBackward1", lambda x: x.squeeze(-2), ((2, 3, 1, 2),), at=((THIRD, 2),)),
    Case("SqueezeBackward1", lambda x: x.squeeze(0), ((2, 3),), note="nothing"),
    Case("SqueezeBackward2", lambda x: x.squeeze((0, -1)), ((1, 3, 2, 1),), at=((FIRST, 3),)),
    Case("SqueezeBackward3", lambda x: x.clone().squeeze_(), ((3, 1, 2),), at=((FIRST, 3),)),
    Case("SqueezeBackward4", lambda x: x.clone().squeeze_(1), ((3, 1, 2),), at=((FIRST, 3),)),
    Case("SqueezeBackward5", lambda x: x.clone().squeeze_((1,)), ((3, 1),), at=((FIRST, 3),)),
    Case("UnsqueezeBackward0", lambda x: x.unsqueeze(1), ((3, 2),), at=((FIRST, 3),), dtypes=ALL),
    Case("UnsqueezeBackward0", lambda x: x.unsqueeze(-1), ((3, 2),), at=((FIRST, 3),)),
    Case("UnsqueezeBackward0", lambda x: x.unsqueeze(0), ((),)),
    Case("UnsqueezeBackward1", lambda x: x.clone().unsqueeze_(0), ((3, 2),), at=((SECOND, 3),)),
]  # fmt: skip

PERMUTATIONS = [
    Case("PermuteBackward0", lambda x: x.permute(2, 0, -2), ((3, 2, 4),), dtypes=ALL,
         at=((SECOND, 3), (SampleAxis(0, outer=2), 2))),
    Case("PermuteBackward0", lambda x: x.movedim(1, -1), ((3, 2, 4, 2),), at=((FIRST, 3),)),
    Case("TransposeBackward0", lambda x: x.transpose(0, -1), ((3, 2, 4),), dtypes=ALL,
         at=((THIRD, 3), (SECOND, 2))),
    Case("TransposeBackward0", lambda x: x.mT, ((3, 2, 4),), at=((FIRST, 3), (THIRD, 2))),
    Case("TransposeBackward0", lambda x: x.transpose(0, 0), ((),)),
    Case("TransposeBackward1", lambda x: x.clone().transpose_(0, 1), ((3, 2),), at=((SECOND, 3),)),
    Case("TBackward0", lambda x: x.t(), ((3, 2),), at=((SECOND, 3), (FIRST, 2))),
    Case("TBackward0", lambda x: x.t(), ((3,),), at=((FIRST, 3),)),
    Case("TBackward1", lambda x: x.clone().t_(), ((3, 2),), at=((SECOND, 3),)),
]  # fmt: skip

REPETITIONS = [
    Case("ExpandBackward0", lambda x: x.expand(3, 2, 4), ((3, 1, 4),), dtypes=ALL,
         at=((FIRST, 3), (SECOND, 2), (THIRD, 4))),
    Case("ExpandBackward0", lambda x: x.expand(3, 2, 4), ((4,),),
         at=((FIRST, 3), (SECOND, 2), (SampleAxis(0, inner=3), 1))),
    Case("ExpandBackward0", lambda x: x.expand(6, 4), ((1, 4),),
         at=((SampleAxis(0, inner=2), 3), (SampleAxis(0, 2, 1), 3))),
    Case("ExpandBackward0", lambda x: x.expand(3, -1), ((1, 2),), at=((FIRST, 3),), special=True),
    Case("ExpandBackward0", lambda x: x.expand(3), ((),), at=((FIRST, 3),)),
    Case("RepeatBackward0", lambda x: x.repeat(2, 1, 3), ((3, 2),), dtypes=ALL,
         at=((SECOND, 3), (FIRST, 2), (SampleAxis(2, outer=3), 2))),
    Case("RepeatBackward0", lambda x: x.repeat(3, 1), ((2, 2),), mixes=((FIRST, 6),),
         at=((SampleAxis(0, outer=3), 2),)),
    Case("RepeatBackward0", lambda x: x.repeat(6, 1), ((1, 2),),
         at=((FIRST, 6), (SampleAxis(0, 2, 1), 3), (SampleAxis(0, 1, 3), 2))),
    Case("RepeatBackward0", lambda x: x.repeat(0, 2), ((3, 2),), declines=True),
    Case("FlipBackward0", lambda x: x.flip(1, -1), ((3, 2, 4),), dtypes=ALL,
         at=((FIRST, 3),), mixes=((SECOND, 2), (THIRD, 4))),
    Case("Rot90Backward0", lambda x: x.rot90(1, (1, -1)), ((3, 2, 4),), dtypes=ALL,
         at=((FIRST, 3),), mixes=((SECOND, 4), (THIRD, 2))),
    Case("Rot90Backward0", lambda x: x.rot90(-2, (2, 0)), ((3, 2, 4),), at=((SECOND, 2),)),
    Case("RollBackward0", lambda x: x.roll((1, 2), (1, -1)), ((3, 2, 4),), dtypes=ALL,
         at=((FIRST, 3),), mixes=((SECOND, 2), (THIRD, 4))),
    Case("RollBackward0", lambda x: x.roll(2), ((3, 2),), mixes=((FIRST, 3), (SECOND, 2))),
    Case("PixelShuffleBackward0", lambda x: F.pixel_shuffle(x, 2), ((2, 8, 2, 3),),
         at=((FIRST, 2),), mixes=((SECOND, 2),)),
    Case("PixelUnshuffleBackward0", lambda x: F.pixel_unshuffle(x, 2), ((2, 2, 4, 2),),
         at=((FIRST, 2),), mixes=((SECOND, 8),)),
    Case("PixelUnshuffleBackward0", lambda x: F.pixel_unshuffle(x, 2), ((2, 4, 2),)),
    Case("ChannelShuffleBackward0", lambda x: F.channel_shuffle(x, 2), ((2, 6, 2, 1),),
         at=((FIRST, 2), (THIRD, 2)), mixes=((SECOND, 6),)),
    Case("TrilBackward0", lambda x: x.tril(-1), ((2, 3, 4),), dtypes=ALL, special=True,
         at=((FIRST, 2),), mixes=((SECOND, 3),)),
    Case("TriuBackward0", lambda x: x.triu(1), ((2, 3, 4),), at=((FIRST, 2),), special=True),
    Case("ViewAsComplexBackward0", torch.view_as_complex, ((3, 4, 2),), at=((FIRST, 3),)),
    Case("ViewAsRealBackward0", lambda x: torch.view_as_real(torch.complex(x, x)), ((3, 4),),
         at=((FIRST, 3),), mixes=((THIRD, 2),)),
]  # fmt: skip

SELECTIONS = [
    Case("SelectBackward0", lambda x: x[:, 1], ((3, 2, 4),), dtypes=ALL,
         at=((FIRST, 3), (SECOND, 4))),
    Case("SelectBackward0", lambda x: x.select(-1, -2), ((3, 2, 4),), at=((FIRST, 3), (SECOND, 2))),
    Case("SelectBackward0", lambda x: x[0], ((3, 2),), at=((FIRST, 2),)),
    Case("SelectBackward0", lambda x: x[2], ((3,),)),
    Case("SliceBackward0", lambda x: x[:, 1:5:2], ((3, 6, 2),), dtypes=ALL,
         at=((FIRST, 3), (THIRD, 2)), mixes=((SECOND, 2),)),
    Case("SliceBackward0", lambda x: x[..., -3:-1], ((3, 4),), at=((FIRST, 3),)),
    Case("SliceBackward0", lambda x: x[:, 9:], ((3, 4),), at=((FIRST, 3),), note="empty"),
    Case("SliceBackward0", lambda x: torch.ops.aten.slice(x, 1), ((3, 4),), note="whole",
         at=((FIRST, 3), (SECOND, 4))),
    Case("NarrowCopyBackward0", lambda x: torch.narrow_copy(x, -1, 1, 2), ((3, 4),),
         at=((FIRST, 3),), mixes=((SECOND, 2),)),
    Case("DiagonalBackward0", lambda x: x.diagonal(1, 1, 2), ((3, 2, 4),), dtypes=ALL,
         at=((FIRST, 3),), mixes=((SECOND, 2),)),
    Case("DiagonalBackward0", lambda x: x.diagonal(-1, -1, 0), ((3, 2, 4, 2),),
         at=((FIRST, 2), (SECOND, 4))),
    Case("DiagEmbedBackward0", lambda x: x.diag_embed(1), ((3, 2),), dtypes=ALL,
         at=((FIRST, 3),), mixes=((SECOND, 3), (THIRD, 3))),
    Case("DiagEmbedBackward0", lambda x: x.diag_embed(0, 2, 0), ((3, 2),), at=((SECOND, 3),)),
    Case("UnfoldBackward0", lambda x: x.unfold(1, 3, 2), ((2, 7, 2),), dtypes=ALL,
         at=((FIRST, 2), (THIRD, 2)), mixes=((SECOND, 3), (SampleAxis(3), 3))),
    Case("UnfoldBackward0", lambda x: x.unfold(-1, 2, 1), ((2, 4),), at=((FIRST, 2),)),
    Case("UnfoldBackward0", lambda x: x.unfold(0, 1, 1), ((),), declines=True),
]  # fmt: skip

JOINS = [
    Case("CatBackward0", lambda x, y: torch.cat([x, y], 1), ((3, 2), (3, 4)), dtypes=ALL,
         at=((FIRST, 3),), mixes=((SECOND, 6),)),
    Case("CatBackward0", lambda x, y: torch.cat([x, y.detach(), y, y.detach(), x], -1),
         ((3, 2, 2), (3, 2, 4)), at=((FIRST, 3), (SECOND, 2)), note="constants between"),
    Case("CatBackward0", lambda x, y, z: torch.cat([x, y, z], 1), ((3, 2), (0,), (3, 0)),
         note="empty"),
    Case("StackBackward0", lambda x, y: torch.stack([x, y, x], 1), ((3, 2), (3, 2)), dtypes=ALL,
         at=((FIRST, 3), (THIRD, 2)), mixes=((SECOND, 3),)),
    Case("StackBackward0", lambda x, y: torch.stack([x, y], -1), ((3, 2), (3, 2)),
         at=((FIRST, 3), (SECOND, 2)), mixes=((THIRD, 2),)),
    Case("StackBackward0", lambda x, y: torch.stack([x, y]), ((), ())),
]  # fmt: skip

WRITTEN = [
    Case("SelectScatterBackward0", lambda x, y: x.select_scatter(y, 1, -1),
         ((3, 2, 4), (3, 4)), dtypes=REAL, special=True,
         at=((FIRST, 3), (THIRD, 4)), mixes=((SECOND, 2),)),
    Case("SliceScatterBackward0", lambda x, y: x.slice_scatter(y, -2, 1, 9, 2),
         ((3, 5, 2), (3, 2, 2)), dtypes=REAL, special=True,
         at=((FIRST, 3), (THIRD, 2)), mixes=((SECOND, 5),)),
]  # fmt: skip

SPLITS = [
    Case(name, build, shapes, at=((FIRST, 3),), mixes=((SECOND, 1),), outputs=k, note=f"{k} of 3",
         dtypes=ALL if k == 2 else (F64,))
    for k in (1, 2, 3)
    for name, build, shapes in (
        ("SplitBackward0", lambda x: x.split(2, 1)[0], ((3, 5, 2),)),
        ("SplitWithSizesBackward0", lambda x: x.split([1, 0, 4], -2)[0], ((3, 5, 2),)),
        ("UnsafeSplitBackward0", lambda x: torch.unsafe_split(x, 2, 1)[0], ((3, 5),)),
        ("UnsafeSplitWithSizesBackward0",
         lambda x: torch.unsafe_split_with_sizes(x, [2, 1, 2], 1)[0], ((3, 5),)),
    )
] + [
    Case("SplitBackward0", lambda x: x.chunk(1, 1)[0], ((3, 5),), at=((SECOND, 5),), note="one"),
    Case("UnbindBackward0", lambda x: x.unbind(0)[0], ((3, 4, 2),), outputs=2, dtypes=ALL,
         at=((FIRST, 4), (SECOND, 2))),
    Case("UnbindBackward0", lambda x: x.unbind(-1)[0], ((3, 2),), outputs=2, at=((FIRST, 3),)),
    Case("UnbindBackward0", lambda x: x.unbind(0)[0], ((3,),), outputs=3),
]  # fmt: skip

PADS = [
    Case("ConstantPadNdBackward0", lambda x: F.pad(x, (1, 2)), ((3, 2, 4),), dtypes=ALL,
         special=True, at=((FIRST, 3), (SECOND, 2)), mixes=((THIRD, 7),)),
    Case("ConstantPadNdBackward0", lambda x: F.pad(x, (-1, 2, 1, -1), value=3.0), ((3, 2, 4),),
         at=((FIRST, 3),), mixes=((SECOND, 2),)),
    Case("ConstantPadNdBackward0", lambda x: F.pad(x, (-1, -1, 0, 0)), ((3, 2, 4),)),
]  # fmt: skip

CASES = [*VIEWS, *PERMUTATIONS, *REPETITIONS, *SELECTIONS, *JOINS, *WRITTEN, *SPLITS, *PADS]

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)


@pytest.mark.parametrize(
    ("name", "build", "sizes"),
    [
        ("ViewBackward0", lambda x: x.view(2, 3, 2, 2), (1, 1, 1)),
        ("PermuteBackward0", lambda x: x.permute(2, 0, 1), (1, 1, 1)),
        ("ConstantPadNdBackward0", lambda x: F.pad(x, (1, 1)), (1, 1, 1)),
        ("CatBackward0", lambda x: torch.cat([x, x], 1), (1, 1, 1)),
        ("RepeatBackward0", lambda x: x.repeat(2, 1, 1), (1, 1, 1)),
        ("SelectBackward0", lambda x: x[:, 0], (1, 3, 1)),
        ("SliceBackward0", lambda x: x[:, 1:], (1, 3, 1)),
        ("SplitBackward0", lambda x: x.split(2, 1)[0], (1, 3, 1)),
        ("UnbindBackward0", lambda x: x.unbind(1)[0], (1, 3, 1)),
        ("DiagonalBackward0", lambda x: x.diagonal(0, 1, 2), (1, 3, 4)),
    ],
)
def test_an_axis_that_is_the_same_all_along_stays_of_size_one(
    name: str, build: Callable[[Tensor], Tensor], sizes: tuple[int, ...]
):
    recorded = record(Case(name, build, ((2, 3, 4),)))
    blocks = random_blocks(recorded.step, range(len(recorded.step.shape)))
    found, *_ = recorded.rule.reverse(recorded.step, blocks)
    assert tuple(found.data.shape[1:]) == sizes
