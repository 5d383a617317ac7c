"""Sums, products, quotients and powers of tensors, and what only hands a cotangent on.

A rule gives each edge a block of the output's shape; the walk sums it over what was broadcast and
keeps the real part where the edge is real. Complex factors are conjugated, as autograd does.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Edge, Step
from batchjac.rules.apart import entrywise
from batchjac.rules.diagonal import keep, scaled, times, wide, zero
from batchjac.rules.pointwise import only, smooth
from batchjac.rules.registry import Blocks

PASSING = (
    "AddBackward1", "AliasBackward0", "CloneBackward0", "FmodBackward0", "FracBackward0",
    "LazyCloneBackward0", "LiftBackward0", "LiftFreshBackward0", "RemainderBackward0",
    "SubBackward1", "ToCopyBackward0",
)  # fmt: skip


def _handed(g: Block, edge: Edge | None) -> Block | None:
    """The block as it is, on the device of the edge."""
    return None if edge is None else g.with_data(g.data.to(edge.meta.device))


@entrywise(*PASSING)
def passed(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``g[v n]``; the walk casts it to the dtype of the edge."""
    g = only(blocks)
    return [_handed(g, edge) for edge in step.edges]


@entrywise("torch::autograd::CopyBackwards")
def copied(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y`` overwritten by ``x``: ``g[v n]`` toward ``x``, 0 toward what was there."""
    g = only(blocks)
    old, new = step.edges
    return [None if old is None else zero(g), _handed(g, new)]


@entrywise("NegBackward0", "NegViewBackward0")
def negated(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``-g[v n]``."""
    g = only(blocks)
    return [g.with_data(-g.data)]


@entrywise("AddBackward0", "SubBackward0", "RsubBackward0", "RsubBackward1")
def added(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``a + alpha b``, ``a - alpha b``, ``b - alpha a``: ``g`` and ``± conj(alpha) g``."""
    g = only(blocks)
    alpha = step.saved("alpha")
    factors = (1, alpha) if step.name == "AddBackward0" else (1, -alpha)
    if step.name.startswith("Rsub"):
        factors = (-alpha, 1)
    return [None if e is None else scaled(g, f) for e, f in zip(step.edges, factors, strict=False)]


@entrywise("MulBackward0", fresh=True)
def multiplied(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``a b``: ``g[v n] conj(b)[n]`` and ``g[v n] conj(a)[n]``."""
    g = only(blocks)
    a, b = step.edges
    return [
        None if a is None else times(g, step.saved("other").conj()),
        None if b is None else times(g, step.saved("self").conj()),
    ]


@entrywise("MulBackward1")
def multiplied_by_number(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``c a`` with a number ``c``: ``conj(c) g[v n]``."""
    return [scaled(only(blocks), step.saved("other"))]


@entrywise("DivBackward0")
def divided(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``a / b``: ``g[v n] / conj(b)[n]`` and ``-g[v n] conj(a / b / b)[n]``."""
    g = only(blocks)
    a, b = step.edges
    other = step.saved("other")
    toward_b = None
    if b is not None:
        quotient = (step.saved("self") / other) / other
        toward_b = times(g, -quotient.conj())
    return [None if a is None else over(g, other.conj()), toward_b]


def over(block: Block, divisor: Tensor) -> Block:
    """``g[v n] / d[n]``, the divisor broadcast to the block's shape."""
    return block.with_data(block.data / wide(divisor, len(block.shape)))


@entrywise("DivBackward1")
def divided_by_number(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``a / c`` with a number ``c``: ``g[v n] / conj(c)``."""
    g = only(blocks)
    return [g.with_data(g.data / step.saved("other").conjugate())]


@entrywise("PowBackward0")
def power(step: Step, blocks: Blocks) -> Any:
    """``x^p`` with a number ``p``: ``g[v n] conj(p x^(p-1))[n]``; nothing for ``p = 0``."""
    if step.saved("exponent") == 0:
        return [zero(only(blocks))]
    return smooth(step, blocks)


@entrywise("PowBackward1", "PowBackward2")
def power_of_tensor(step: Step, blocks: Blocks) -> Any:
    """``x^p``: ``g conj(p x^(p-1))``, nothing where ``p = 0``, and ``g conj(y log x)``."""
    found = smooth(step, blocks)
    if found is NotImplemented or len(found) == 1 or found[0] is None:
        return found
    return [keep(found[0], step.saved("exponent") != 0), found[1]]


@entrywise("AddcmulBackward0")
def added_product(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``c + s a b``: ``g``, ``g conj(s b)``, ``g conj(s a)``."""
    g = only(blocks)
    c, a, b = step.edges
    value = step.saved("value")
    return [
        None if c is None else g,
        None if a is None else times(g, (step.saved("tensor2") * value).conj()),
        None if b is None else times(g, (step.saved("tensor1") * value).conj()),
    ]


@entrywise("LerpBackward0")
def between(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``(1 - w) a + w b`` with a number ``w``: ``conj(1 - w) g`` and ``conj(w) g``."""
    g = only(blocks)
    w = step.saved("weight")
    a, b = step.edges
    return [None if a is None else scaled(g, 1 - w), None if b is None else scaled(g, w)]


@entrywise("ConjBackward0", "ConjPhysicalBackward0", "ConjPhysicalBackward1")
def conjugated(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``conj(g[v n])``."""
    g = only(blocks)
    return [g.with_data(g.data.conj())]


@entrywise("ComplexBackward0")
def composed(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``a + i b``: the real and the imaginary part of ``g[v n]``."""
    g = only(blocks)
    a, b = step.edges
    return [
        None if a is None else g.with_data(g.data.real),
        None if b is None else g.with_data(g.data.imag),
    ]


@entrywise("PolarBackward0")
def polar(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = r exp(i t)``: ``Re(conj(g) sgn(y))`` and ``Re(conj(g) i y)``."""
    g = only(blocks)
    y = step.saved("result")
    conjugate = g.with_data(g.data.conj())
    radius, angle = (times(conjugate, f) for f in (y.sgn(), y * 1j))
    a, b = step.edges
    return [
        None if a is None else g.with_data(radius.data.real),
        None if b is None else g.with_data(angle.data.real),
    ]
