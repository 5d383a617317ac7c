"""Matrix products: the other factor, applied to all rows at once."""

from collections.abc import Sequence

import torch

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.registry import Blocks, rule
from batchjac.samples import SHARED, Place, SampleAxis


def _mm_samples(step: Step, at: SampleAxis) -> list[Place]:
    """``A[n,k] B[k,o]``: samples in the rows stay in A and B is shared; in the columns likewise."""
    *first, a, b = step.edges
    rows, columns = (at, SHARED) if at.dim == 0 else (SHARED, at)
    return [*(None for _ in first), a and rows, b and columns]


@rule("MmBackward0", samples=_mm_samples)
def mm(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y[n,o] = sum_k a[n,k] b[k,o]``: ``g[v,n,o] b[k,o]`` and ``a[n,k] g[v,n,o]``."""
    (g,) = blocks
    assert g is not None
    toward_a, toward_b = step.edges
    a = b = None
    if toward_a is not None:
        other = step.saved("mat2").conj()
        data = torch.matmul(g.spread(1), other.T)
        a = Block(data, toward_a.shape)
    if toward_b is not None:
        other = step.saved("self").conj()
        b = Block(torch.matmul(other.T, g.full()), toward_b.shape)
    return [a, b]
