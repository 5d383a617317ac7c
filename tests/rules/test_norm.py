"""Batch, instance, layer and group normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchjac.block import Block
from batchjac.rules import registry
from batchjac.samples import SHARED, SampleAxis
from tests.rules.common import (
    BF16,
    F32,
    F64,
    Case,
    arrived,
    by_rows,
    laws,
    patterns,
    random_blocks,
    record,
    same,
)

ALL = (F64, F32, BF16)
FIRST, SECOND, THIRD = SampleAxis(0), SampleAxis(1), SampleAxis(2)
MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=F64)
VAR = torch.tensor([0.5, 1.5, 2.5], dtype=F64)
legit = torch.ops.aten._native_batch_norm_legit


def trained(x: Tensor, *affine: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, *affine, training=True)


def tracked(x: Tensor, *affine: Tensor) -> Tensor:
    """Training with running statistics, which the node saves and then the update overwrites."""
    return F.batch_norm(x, MEAN.to(x.dtype).clone(), VAR.to(x.dtype).clone(), *affine, True)


def evaluated(x: Tensor, *affine: Tensor) -> Tensor:
    return F.batch_norm(x, MEAN.to(x.dtype), VAR.to(x.dtype), *affine)


def bias_only(x: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, MEAN.to(x.dtype), VAR.to(x.dtype), None, bias)


def without_running_statistics(x: Tensor, *affine: Tensor) -> Tensor:
    return legit.no_stats(x, *affine, True, 0.1, 1e-5)[0]


def last_layout(x: Tensor, *affine: Tensor) -> Tensor:
    return trained(x.contiguous(memory_format=torch.channels_last), *affine)


def mixed_precision(x: Tensor, *affine: Tensor) -> Tensor:
    return F.layer_norm(x, (3,), *(a.float() for a in affine))


BATCH = (
    "NativeBatchNormBackward0",
    "NativeBatchNormLegitBackward0",
    "NativeBatchNormLegitBackward1",
)
INSTANCES = SampleAxis(1, 1, 3)

CASES = [
    Case(BATCH[0], trained, ((4, 3, 2), (3,), (3,)), dtypes=ALL, mixes=((FIRST, 4), (THIRD, 2)),
         at=((SECOND, 3),)),
    Case(BATCH[0], tracked, ((4, 3), (3,), (3,)), mixes=((FIRST, 4),)),
    Case(BATCH[0], trained, ((4, 3, 2, 2),), mixes=((FIRST, 4),)),
    Case(BATCH[0], trained, ((1, 12, 5),), at=((INSTANCES, 4),), note="instances"),
    Case(BATCH[0], trained, ((1, 12, 5), (12,), (12,)), at=((INSTANCES, 4),), note="instances"),
    Case(BATCH[0], last_layout, ((2, 3, 2, 2), (3,), (3,)), mixes=((FIRST, 2),)),
    Case(BATCH[0], evaluated, ((4, 3, 2), (3,), (3,)), dtypes=ALL, at=((FIRST, 4), (THIRD, 2))),
    Case(BATCH[0], evaluated, ((4, 3), (3,), (3,)), at=((FIRST, 4), (SampleAxis(0, 2, 1), 2))),
    Case(BATCH[0], evaluated, ((1, 3, 2, 2), (3,), (3,)), at=((FIRST, 1),)),
    Case(BATCH[0], evaluated, ((4, 3, 2),), at=((FIRST, 4),)),
    Case(BATCH[0], bias_only, ((4, 3, 2), (3,)), at=((FIRST, 4),), second=False),
    Case(BATCH[0], evaluated, ((4, 3, 2), (3,), (3,)), wants=(False, True, True), at=((FIRST, 4),)),
    Case(BATCH[1], lambda x, w, b: legit(x, w, b, MEAN.clone(), VAR.clone(), True, 0.1, 1e-5)[0],
         ((4, 3, 2), (3,), (3,)), dtypes=(F64,), mixes=((FIRST, 4),)),
    Case(BATCH[1], lambda x, w, b: legit(x, w, b, MEAN.clone(), VAR.clone(), False, 0.1, 1e-5)[0],
         ((4, 3, 2), (3,), (3,)), dtypes=(F64,), at=((FIRST, 4),)),
    Case(BATCH[2], without_running_statistics, ((4, 3, 2), (3,), (3,)), mixes=((FIRST, 4),)),
    Case("NativeBatchNormLegitNoTrainingBackward0",
         lambda x, w, b: torch.ops.aten._native_batch_norm_legit_no_training(
             x, w, b, MEAN, VAR, 0.1, 1e-5)[0],
         ((4, 3, 2), (3,), (3,)), dtypes=(F64,), at=((FIRST, 4),)),
    Case("NativeLayerNormBackward0", lambda x, *a: F.layer_norm(x, (3,), *a),
         ((4, 2, 3), (3,), (3,)), dtypes=ALL, at=((FIRST, 4), (SECOND, 2)), mixes=((THIRD, 3),)),
    Case("NativeLayerNormBackward0", lambda x, *a: F.layer_norm(x, (2, 3), *a),
         ((4, 2, 3), (2, 3), (2, 3)), at=((FIRST, 4), (SampleAxis(0, 2, 1), 2)),
         mixes=((SECOND, 2),)),
    Case("NativeLayerNormBackward0", partial(F.layer_norm, normalized_shape=(3,)), ((12, 3),),
         at=((SampleAxis(0, 2, 3), 2),)),
    Case("NativeLayerNormBackward0", lambda x, w: F.layer_norm(x, (3,), w, None, 1e-2),
         ((4, 3), (3,)), at=((FIRST, 4),)),
    Case("NativeLayerNormBackward0", lambda x, b: F.layer_norm(x, (3,), None, b),
         ((4, 3), (3,)), at=((FIRST, 4),), second=False),
    Case("NativeLayerNormBackward0", mixed_precision, ((4, 3), (3,), (3,)), dtypes=(BF16,),
         at=((FIRST, 4),), second=False, note="mixed"),
    Case("NativeGroupNormBackward0", lambda x, *a: F.group_norm(x, 2, *a),
         ((3, 4, 2), (4,), (4,)), dtypes=ALL, at=((FIRST, 3),), mixes=((SECOND, 4), (THIRD, 2))),
    Case("NativeGroupNormBackward0", lambda x, *a: F.group_norm(x, 2, *a),
         ((3, 4), (4,), (4,)), at=((FIRST, 3),)),
    Case("NativeGroupNormBackward0", partial(F.group_norm, num_groups=1), ((6, 2, 2, 2),),
         at=((SampleAxis(0, 3, 1), 2),)),
]  # fmt: skip

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    test_differentiable_again,
) = laws(CASES)


def frozen(shape: tuple[int, ...]) -> tuple[Case, Case]:
    """A batch norm in training, and the one in evaluation that has its statistics for ever."""
    affine = ((3,), (3,))

    def constant(x: Tensor, *affine: Tensor) -> Tensor:
        axes = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x.detach(), axes, correction=0)
        return F.batch_norm(x, mean, var, *affine)

    return Case(BATCH[0], trained, (shape, *affine)), Case(BATCH[0], constant, (shape, *affine))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("recording", [False, True])
def test_frozen_statistics_are_constants(shape: tuple[int, ...], recording: bool):
    training, constant = (record(case) for case in frozen(shape))
    step = replace(training.step, name=f"{BATCH[0]}:frozen")
    rule = registry.find(step)
    assert rule is not None
    assert rule.samples is not None
    assert rule.per_sample is not None
    assert rule.samples(step, FIRST) == [FIRST, SHARED, SHARED]
    shared = replace(step, edges=(None, *step.edges[1:]))
    assert constant.rule.per_sample is not None
    other = replace(constant.step, edges=(None, *constant.step.edges[1:]))
    with torch.set_grad_enabled(recording):
        for repeated in patterns(len(shape)):
            blocks = random_blocks(step, repeated)
            same(arrived(step, rule.reverse(step, blocks)), by_rows(constant.step, blocks), F64)
            same(
                arrived(shared, rule.per_sample(shared, blocks, FIRST)),
                arrived(other, constant.rule.per_sample(other, blocks, FIRST)),
                F64,
            )


def test_what_is_frozen_stays_so_in_second_derivatives():
    recorded = record(frozen((4, 3))[0])
    step = replace(recorded.step, name=f"{BATCH[0]}:frozen")
    rule = registry.find(step)
    assert rule is not None
    toward_x = rule.reverse(step, [Block(torch.ones(1, 4, 3, dtype=F64), (4, 3))])[0]
    x, weight, _ = recorded.inputs
    found = torch.autograd.grad(toward_x.data.sum(), (x, weight), allow_unused=True)
    assert found[0] is None
    assert found[1].ne(0).all()


@pytest.mark.parametrize("build", [trained, evaluated])
def test_cudnn_saves_the_same_under_the_same_names(build: Callable[..., Tensor]):
    """Without the device: the names exist on the node's type, and the formula reads no others."""
    kind = torch._C._functions.CudnnBatchNormBackward0
    names = (
        "input", "weight", "training", "result1", "result2", "running_mean", "running_var",
        "epsilon",
    )  # fmt: skip
    assert all(hasattr(kind, f"_saved_{name}") for name in names)
    recorded = record(Case(BATCH[0], build, ((4, 3, 2), (3,), (3,))))
    step = replace(recorded.step, name="CudnnBatchNormBackward0")
    rule = registry.find(step)
    assert rule is not None
    blocks = random_blocks(step, ())
    with torch.no_grad():
        same(arrived(step, rule.reverse(step, blocks)), by_rows(recorded.step, blocks), F64)
