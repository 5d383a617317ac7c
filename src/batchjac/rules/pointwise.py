"""Nodes that act on each entry by itself: the block times the derivative, which has no rows.

For ``y = f(x)`` entry by entry the cotangent is ``g f'(x)``. The node called once on ones *is*
``f'(x)``, in autograd's own formula, with its own history when the walk is differentiable. So one
rule serves every such function; a function that *selects* (ReLU, clamp) must give 0, not
``inf * 0``, where it lets nothing through.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.registry import Blocks, elementwise, rule

SMOOTH = (
    "TanhBackward0", "SigmoidBackward0", "ExpBackward0", "Expm1Backward0", "LogBackward0",
    "Log1PBackward0", "Log2Backward0", "Log10Backward0", "SinBackward0", "CosBackward0",
    "TanBackward0", "AsinBackward0", "AcosBackward0", "AtanBackward0", "SinhBackward0",
    "CoshBackward0", "AsinhBackward0", "AcoshBackward0", "AtanhBackward0", "SqrtBackward0",
    "RsqrtBackward0", "ReciprocalBackward0", "ErfBackward0", "ErfcBackward0", "ErfinvBackward0",
    "GeluBackward0", "SiluBackward0", "MishBackward0", "SoftplusBackward0",
    "LogSigmoidBackward0", "PowBackward0", "LgammaBackward0", "DigammaBackward0", "SincBackward0",
    "AbsBackward0", "SgnBackward0", "Exp2Backward0", "SpecialNdtriBackward0", "LogitBackward0",
    "LogitBackward1",
)  # fmt: skip


def derivative(step: Step) -> list[Tensor | None]:
    """The node on a cotangent of ones: the derivative toward each edge, without rows."""
    meta = step.outputs[0]
    result = step.node(torch.ones(meta.shape, dtype=meta.dtype, device=meta.device))
    return list(result) if isinstance(result, tuple) else [result]


def times(block: Block, factor: Tensor) -> Block:
    """``g[v, ...] * factor[...]``, the factor broadcast to the block's shape."""
    lead = (1,) * (len(block.shape) - factor.dim())
    return Block(block.data * factor.reshape(1, *lead, *factor.shape), block.shape)


@rule(*SMOOTH, samples=elementwise)
def smooth(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g f'(x)`` for a function of one argument."""
    (g,) = blocks
    assert g is not None
    (d,) = derivative(step)
    return [None if d is None else times(g, d)]
