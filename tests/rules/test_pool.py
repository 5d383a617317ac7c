"""Pooling and unpooling, resizing, padding by mirror and edge, windows as columns."""

import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac.samples import SampleAxis
from tests.rules.common import BF16, F32, F64, Case, laws, random_blocks, record

N, C, H = SampleAxis(0), SampleAxis(1), SampleAxis(2)
TWICE = SampleAxis(0, inner=2)


def last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def unpool(x: Tensor) -> Tensor:
    pooled, where = F.max_pool2d(x.detach(), 2, return_indices=True)
    return F.max_unpool2d(pooled + x[..., ::2, ::2], where, 2)


def unpool_3d(x: Tensor) -> Tensor:
    pooled, where = F.max_pool3d(x.detach(), 2, return_indices=True)
    return F.max_unpool3d(pooled + x[..., ::2, ::2, ::2], where, 2)


MAXIMA = [
    Case("MaxPool2DWithIndicesBackward0", lambda x: F.max_pool2d(x, 2), ((2, 3, 4, 5),),
         at=((N, 2), (C, 3)), mixes=((H, 2),), dtypes=(F64, F32, BF16), special=True),
    Case("MaxPool2DWithIndicesBackward0", lambda x: F.max_pool2d(x, 3, 2, 1), ((4, 2, 5, 4),),
         at=((N, 4), (TWICE, 2)), dtypes=(F64, F32, BF16), special=True, note="overlapping"),
    Case("MaxPool2DWithIndicesBackward0", lambda x: F.max_pool2d(x, 2, dilation=2, ceil_mode=True),
         ((2, 2, 6, 5),), at=((N, 2),)),
    Case("MaxPool2DWithIndicesBackward0", lambda x: F.max_pool2d(x.sign(), 2, (1, 2)),
         ((2, 2, 4, 5),), note="ties", second=False),
    Case("MaxPool2DWithIndicesBackward0", lambda x: F.max_pool2d(last(x), 3, 1), ((2, 3, 4, 4),),
         note="channels last"),
    Case("MaxPool2DWithIndicesBackward0", lambda x: F.max_pool2d(x, 2), ((3, 4, 4),),
         note="unbatched"),
    Case("MaxPool2DWithIndicesBackward0", lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
         ((2, 2, 5),), note="one dimension"),
    Case("MaxPool3DWithIndicesBackward0", lambda x: F.max_pool3d(x, 2), ((2, 2, 4, 2, 3),),
         at=((N, 2), (C, 2)), special=True),
    Case("MaxPool3DWithIndicesBackward0", lambda x: F.max_pool3d(x, 2, 1, 1), ((2, 1, 2, 3, 2),)),
    Case("AdaptiveMaxPool2DBackward0", lambda x: F.adaptive_max_pool2d(x, 2), ((2, 3, 4, 6),),
         at=((N, 2), (C, 3)), mixes=((H, 2),), special=True),
    Case("AdaptiveMaxPool2DBackward0", lambda x: F.adaptive_max_pool2d(x, (3, 2)),
         ((2, 2, 5, 4),), note="overlapping"),
    Case("AdaptiveMaxPool3DBackward0", lambda x: F.adaptive_max_pool3d(x, 2), ((2, 1, 4, 3, 2),),
         at=((N, 2),)),
    Case("FractionalMaxPool2DBackward0",
         lambda x: F.fractional_max_pool2d(x, 3, 3, _random_samples=torch.full((2, 2, 2), 0.3,
                                                                             dtype=x.dtype)),
         ((2, 2, 6, 5),), at=((N, 2),), second=False),
    Case("FractionalMaxPool3DBackward0",
         lambda x: F.fractional_max_pool3d(x, 2, 2, _random_samples=torch.full((2, 1, 3), 0.3,
                                                                             dtype=x.dtype)),
         ((2, 1, 4, 5, 4),), at=((N, 2),), second=False),
    Case("MaxUnpool2DBackward0", unpool, ((2, 3, 4, 4),), at=((N, 2), (C, 3)), special=True),
    Case("MaxUnpool3DBackward0", unpool_3d, ((2, 2, 2, 4, 2),), at=((N, 2),)),
]  # fmt: skip

AVERAGES = [
    Case("AvgPool2DBackward0", lambda x: F.avg_pool2d(x, 2), ((2, 3, 4, 5),),
         at=((N, 2), (C, 3)), mixes=((H, 2),), dtypes=(F64, F32, BF16)),
    Case("AvgPool2DBackward0",
         lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0), True, False), ((4, 2, 5, 4),),
         at=((TWICE, 2),), note="padded"),
    Case("AvgPool2DBackward0", lambda x: F.avg_pool2d(last(x), 2, divisor_override=3),
         ((2, 3, 4, 4),), at=((N, 2),), note="channels last"),
    Case("AvgPool2DBackward0", lambda x: F.avg_pool1d(x, 3, 2), ((2, 2, 6),), note="one dimension"),
    Case("AvgPool2DBackward0", lambda x: F.avg_pool2d(x, 2), ((3, 4, 4),), note="unbatched"),
    Case("AvgPool3DBackward0", lambda x: F.avg_pool3d(x, 2, 1, 1), ((2, 2, 3, 2, 3),),
         at=((N, 2),)),
    Case("AdaptiveAvgPool2DBackward0", lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
         ((2, 3, 5, 4),), at=((N, 2), (C, 3)), mixes=((H, 2),), dtypes=(F64, F32, BF16)),
    Case("AdaptiveAvgPool2DBackward0", lambda x: F.adaptive_avg_pool1d(x, 3), ((2, 2, 7),),
         note="one dimension"),
    Case("AdaptiveAvgPool2DBackward0", lambda x: F.adaptive_avg_pool2d(x, 2), ((3, 5, 4),),
         note="unbatched"),
    Case("AdaptiveAvgPool3DBackward0", lambda x: F.adaptive_avg_pool3d(x, 2), ((2, 1, 4, 3, 2),),
         at=((N, 2),)),
]  # fmt: skip


def resized(name: str, space: int, mode: str, note: str = "", **options: object) -> list[Case]:
    shape = (2, 3, 3, 4, 2)[: space + 2]
    larger = {"size": (5, 3, 4)[:space], **options}
    scaled = {"scale_factor": 1.7, **options}
    return [
        Case(name, lambda x, o=o: F.interpolate(x, mode=mode, **o), (shape,),
             at=((N, 2), (C, 3)), mixes=((H, 5 if o is larger else int(3 * 1.7)),),
             note="-".join(filter(None, (note, how))))
        for how, o in (("size", larger), ("scale", scaled))
    ]  # fmt: skip


RESIZED = [
    *resized("UpsampleNearest1DBackward0", 1, "nearest"),
    *resized("UpsampleNearest2DBackward0", 2, "nearest"),
    *resized("UpsampleNearest3DBackward0", 3, "nearest"),
    *resized("UpsampleNearestExact1DBackward0", 1, "nearest-exact"),
    *resized("UpsampleNearestExact2DBackward0", 2, "nearest-exact"),
    *resized("UpsampleNearestExact3DBackward0", 3, "nearest-exact"),
    *resized("UpsampleLinear1DBackward0", 1, "linear"),
    *resized("UpsampleBilinear2DBackward0", 2, "bilinear"),
    *resized("UpsampleBilinear2DBackward0", 2, "bilinear", "corners", align_corners=True),
    *resized("UpsampleTrilinear3DBackward0", 3, "trilinear"),
    *resized("UpsampleBicubic2DBackward0", 2, "bicubic"),
    *resized("UpsampleBilinear2DAaBackward0", 2, "bilinear", antialias=True),
    *resized("UpsampleBicubic2DAaBackward0", 2, "bicubic", antialias=True),
]


def padded(name: str, space: int, mode: str) -> list[Case]:
    shape = (2, 3, 3, 4, 2)[: space + 2]
    pad = (1, 0, 2, 1, 1, 1)[: 2 * space]
    return [
        Case(name, lambda x: F.pad(x, pad, mode=mode), (shape,), at=((N, 2), (C, 3)),
             mixes=((H, 3 + sum(pad[-2:])),)),
        Case(name, lambda x: F.pad(x, pad, mode=mode), (shape[1:],), note="unbatched"),
    ]  # fmt: skip


PADDED = [
    *padded("ReflectionPad1DBackward0", 1, "reflect"),
    *padded("ReflectionPad2DBackward0", 2, "reflect"),
    *padded("ReflectionPad3DBackward0", 3, "reflect"),
    *padded("ReplicationPad1DBackward0", 1, "replicate"),
    *padded("ReplicationPad2DBackward0", 2, "replicate"),
    *padded("ReplicationPad3DBackward0", 3, "replicate"),
]

COLUMNS = [
    Case("Im2ColBackward0", lambda x: F.unfold(x, (2, 3), (1, 2), (1, 0), (2, 1)),
         ((2, 3, 5, 6),), at=((N, 2),), mixes=((C, 18), (H, 18))),
    Case("Im2ColBackward0", lambda x: F.unfold(x, 2), ((3, 4, 3),), note="unbatched"),
    Case("Col2ImBackward0", lambda x: F.fold(x, (4, 5), (2, 3), (1, 1), (1, 0), (2, 1)),
         ((2, 12, 9),), at=((N, 2),), mixes=((C, 2),)),
    Case("Col2ImBackward0", lambda x: F.fold(x, (4, 4), 2, stride=2), ((8, 4),), note="unbatched"),
]  # fmt: skip

CASES = MAXIMA + AVERAGES + RESIZED + PADDED + COLUMNS

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)


def test_an_average_of_what_all_samples_share_is_taken_once():
    recorded = record(Case("AvgPool2DBackward0", lambda x: F.avg_pool2d(x, 2), ((5, 3, 4, 4),)))
    (found,) = recorded.rule.reverse(recorded.step, random_blocks(recorded.step, (0, 1)))
    assert found.data.shape == (3, 1, 1, 4, 4)
