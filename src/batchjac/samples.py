"""Where the samples of a batch sit in a tensor of the graph.

Usually axis 0, whole. Inside a recurrent layer it is axis 1, in attention it is merged with the
heads. A rule says how its node moves it; where it cannot tell, it answers ``None`` and the
independence of the samples is probed instead of proved.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SampleAxis:
    """Axis ``dim`` has ``outer * N * inner`` entries, in this order, the middle one the samples."""

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def whole(self) -> bool:
        """The axis holds the samples and nothing else."""
        return self.outer == self.inner == 1


@dataclass(frozen=True)
class Shared:
    """The tensor has no sample axis: a parameter, a constant, something broadcast over samples."""


SHARED = Shared()
Place = SampleAxis | Shared | None


def reshaped(at: SampleAxis, old: Sequence[int], new: Sequence[int]) -> Place:
    """The sample axis after ``old`` is viewed as ``new``, in row-major order."""
    before = math.prod(old[: at.dim]) * at.outer
    after = math.prod(old[at.dim + 1 :]) * at.inner
    if before * after == 0:
        return None
    size = math.prod(old) // (before * after)
    for dim, length in enumerate(new):
        left, right = math.prod(new[:dim]), math.prod(new[dim + 1 :])
        if left == 0 or right == 0 or before % left or after % right:
            continue
        outer, inner = before // left, after // right
        if length == outer * size * inner:
            return SampleAxis(dim, outer, inner)
    return None


def broadcast(at: SampleAxis, result: Sequence[int], operand: Sequence[int]) -> Place:
    """The sample axis of an operand that was broadcast to ``result``."""
    dim = at.dim - (len(result) - len(operand))
    if dim < 0 or (operand[dim] == 1 and result[at.dim] != 1):
        return SHARED
    return moved(at, dim)


def moved(at: SampleAxis, dim: int) -> SampleAxis:
    """The same axis at another position."""
    return at if dim == at.dim else SampleAxis(dim, at.outer, at.inner)
