"""Normalised exponentials along one axis."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.diagonal import wide
from batchjac.rules.pointwise import only
from batchjac.rules.registry import Blocks, rule, single
from batchjac.samples import Place, SampleAxis


def _samples(step: Step, at: SampleAxis) -> list[Place]:
    """The axis that is normalised mixes its entries; the others stay."""
    return [at if at.dim != step.saved("dim") % len(step.shape) else None]


def _along(step: Step, g: Block) -> tuple[int, Tensor]:
    """The normalised axis of the rows and the saved result beside them."""
    size = max(len(g.shape), 1)
    return step.saved("dim") % size + 1, wide(step.saved("result"), len(g.shape))


@rule("SoftmaxBackward0", "SafeSoftmaxBackward0", samples=_samples)
def softmax(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[n,k] = exp x[n,k] / sum_j exp x[n,j]``: ``y[n,k] (g[v n k] - sum_j g[v n j] y[n,j])``."""
    g = only(blocks)
    dim, y = _along(step, g)
    if not g.shape:
        return [g.with_data(y * (g.data - g.data * y))]
    weighted = g.data * y
    # one pass instead of two; written over ``weighted`` unless the walk is recorded
    fold = torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_
    return [g.with_data(fold(weighted, y, weighted.sum(dim, keepdim=True), value=-1))]


@rule("LogSoftmaxBackward0", samples=_samples)
def log_softmax(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[n,k] = log softmax``: ``g[v n k] - exp(y)[n,k] sum_j g[v n j]``."""
    g = only(blocks)
    dim, y = _along(step, g)
    if not g.shape:
        return [g.with_data(g.data - y.exp() * g.data)]
    repeated = g.shape[dim - 1] if g.data.shape[dim] == 1 else 1
    total = g.data.sum(dim, keepdim=True) * repeated
    return [g.with_data(g.data - y.exp() * total)]


@single("SoftmaxBackward0", "SafeSoftmaxBackward0")
def softmax_forward(step: Step, t: Block) -> Any:
    """The derivative ``diag y - y y^T`` is symmetric."""
    return softmax(step, [t])[0]


@single("LogSoftmaxBackward0")
def log_softmax_forward(step: Step, t: Block) -> Block:
    """``t[v n k] - sum_j exp(y)[n,j] t[v n j]``."""
    dim, y = _along(step, t)
    share = y.exp()
    if not t.shape:
        return t.with_data(t.data - share * t.data)
    return t.with_data(t.data - (share * t.data).sum(dim, keepdim=True))
