"""Convolution in every dimension and flavour."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac.samples import SampleAxis
from tests.rules.common import BF16, F32, F64, Case, laws, random_blocks, record

NAME = "ConvolutionBackward0"
IMAGES = SampleAxis(0)


def plain(dims: int, **options: Any) -> Callable[..., Tensor]:
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    return lambda *tensors: function(*tensors, **options)


def transposed(dims: int, **options: Any) -> Callable[..., Tensor]:
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    return lambda *tensors: function(*tensors, **options)


def last(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x.to(memory_format=torch.channels_last), w)


def traced(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The operator that traced and scripted models call."""
    how = ([2], [1], [1], False, [0], 1, False, False, True, True)
    return torch._convolution(x, w, b, *how)


PLAIN = [
    Case(NAME, plain(1), ((4, 2, 7), (3, 2, 3), (3,)), dtypes=(F64, F32, BF16),
         at=((IMAGES, 4), (SampleAxis(0, inner=2), 2), (SampleAxis(0, outer=2), 2)),
         mixes=((SampleAxis(1), 3), (SampleAxis(2), 5))),
    Case(NAME, plain(2), ((2, 1, 5, 6), (3, 1, 3, 2), (3,)), dtypes=(F64, F32, BF16),
         at=((IMAGES, 2),), note="few channels"),
    Case(NAME, plain(2), ((2, 4, 5, 5), (3, 4, 3, 2), (3,)), dtypes=(F64, F32, BF16),
         at=((IMAGES, 2),)),
    Case(NAME, plain(2, stride=(2, 1), padding=(1, 2)), ((2, 2, 6, 5), (3, 2, 3, 3)),
         at=((IMAGES, 2),), note="few channels, strided"),
    Case(NAME, plain(2, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
         ((2, 4, 6, 5), (6, 2, 3, 2), (6,)), at=((IMAGES, 2), (SampleAxis(1, inner=3), 2))),
    Case(NAME, plain(2, groups=4), ((2, 4, 4, 4), (8, 1, 2, 2)), note="depthwise",
         at=((IMAGES, 2), (SampleAxis(1, inner=2), 4), (SampleAxis(1, 2, 2), 2)),
         mixes=((SampleAxis(1), 8),)),
    Case(NAME, plain(2), ((2, 5, 4, 3), (3, 5, 1, 1), (3,)), at=((IMAGES, 2),)),
    Case(NAME, plain(2, stride=(1, 2)), ((2, 5, 4, 3), (3, 5, 1, 1)), at=((IMAGES, 2),),
         note="pointwise, strided"),
    Case(NAME, plain(2, padding=(1, 0)), ((2, 5, 4, 3), (3, 5, 1, 1)), at=((IMAGES, 2),),
         note="pointwise, padded"),
    Case(NAME, plain(2, stride=3), ((1, 4, 4, 4), (2, 4, 2, 2)), at=((IMAGES, 1),)),
    Case(NAME, plain(1, padding="same"), ((2, 2, 6), (2, 2, 3)), at=((IMAGES, 2),)),
    Case(NAME, plain(1), ((2, 5), (3, 2, 2)), note="unbatched"),
    Case(NAME, plain(3, stride=(1, 2, 1), padding=(0, 1, 0), dilation=(1, 1, 2)),
         ((2, 2, 3, 4, 5), (3, 2, 2, 2, 2), (3,)), at=((IMAGES, 2),)),
    Case(NAME, last, ((2, 4, 5, 4), (3, 4, 2, 2)), at=((IMAGES, 2),), note="channels last"),
    Case(NAME, plain(2), ((2, 4, 5, 5), (3, 4, 2, 2), (3,)), wants=(True, False, False)),
    Case(NAME, plain(2), ((2, 4, 5, 5), (3, 4, 2, 2), (3,)), wants=(False, False, True),
         at=((IMAGES, 2),)),
]  # fmt: skip

TRANSPOSED = [
    Case(NAME, transposed(1, stride=2), ((3, 2, 4), (2, 3, 3), (3,)), dtypes=(F64, F32, BF16),
         at=((IMAGES, 3),)),
    Case(NAME, transposed(1, stride=1, dilation=3, output_padding=2), ((2, 2, 3), (2, 1, 2)),
         at=((IMAGES, 2),)),
    Case(NAME, transposed(2, stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2),
         ((4, 4, 3, 2), (4, 3, 3, 2), (6,)),
         at=((SampleAxis(0, inner=2), 2), (SampleAxis(1, inner=3), 2))),
    Case(NAME, transposed(2), ((2, 3, 2, 3), (3, 2, 1, 1)), at=((IMAGES, 2),)),
    Case(NAME, transposed(3, padding=1), ((2, 1, 3, 3, 2), (1, 2, 2, 2, 2)), at=((IMAGES, 2),)),
]  # fmt: skip

TRACED = [
    Case("ConvolutionBackward1", traced, ((4, 2, 7), (3, 2, 3), (3,)), at=((IMAGES, 4),)),
]

CASES = PLAIN + TRANSPOSED + TRACED

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)


def test_what_all_samples_share_is_pushed_once():
    recorded = record(Case(NAME, plain(2), ((5, 2, 4, 4), (3, 2, 2, 2))))
    blocks = random_blocks(recorded.step, (0,))
    found, *_ = recorded.rule.reverse(recorded.step, blocks)
    assert found.data.shape == (3, 1, 2, 4, 4)


def test_a_kernel_of_one_entry_keeps_an_axis_of_size_one():
    recorded = record(Case(NAME, plain(2), ((5, 2, 4, 4), (3, 2, 1, 1))))
    blocks = random_blocks(recorded.step, (2, 3))
    found, *_ = recorded.rule.reverse(recorded.step, blocks)
    assert found.data.shape == (3, 5, 2, 1, 1)
