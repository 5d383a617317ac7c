"""A node without a rule, called itself: under ``torch.vmap`` over the rows, else row by row.

Law: equal to the node called once per row. Assumes that the node's backward is a pure function of
its cotangents, as every engine does.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from batchjac.block import Block, dense
from batchjac.graph import Step

Way = Literal["vmap", "rows"]

# vmap runs these and answers wrongly: its rule for the backward of cdist takes the rows for a batch
# of point sets (torch 2.13).
WRONG_UNDER_VMAP = frozenset({"CdistBackward0"})


def call(step: Step, blocks: Sequence[Block | None], way: Way) -> list[Block | None]:
    """All rows through the node itself, in the given way."""
    rows = next(b.rows for b in blocks if b is not None)
    present = [b.full() for b in blocks if b is not None]
    return (_vmapped if way == "vmap" else _looped)(step, blocks, present, rows)


def _vmapped(
    step: Step, blocks: Sequence[Block | None], present: list[Tensor], rows: int
) -> list[Block | None]:
    slots: list[int] = []

    def row(*cotangents: Tensor) -> tuple[Tensor, ...]:
        found = apply(step, _fill(blocks, cotangents))
        given = {k: g for k, g in enumerate(found) if g is not None}
        slots[:] = given
        # vmap wants at least one output
        return (*given.values(), cotangents[0].new_zeros(()))

    with warnings.catch_warnings():  # vmap warns where it loops inside; that is known here
        warnings.simplefilter("ignore")
        *results, _ = torch.vmap(row, randomness="same")(*present)
    return _blocks(step, dict(zip(slots, results, strict=True)))


def _looped(
    step: Step, blocks: Sequence[Block | None], present: list[Tensor], rows: int
) -> list[Block | None]:
    found = [apply(step, _fill(blocks, [p[v] for p in present])) for v in range(rows)]
    stacked = {}
    for k in range(len(step.edges)):
        column = [row[k] for row in found]
        like = next((g for g in column if g is not None), None)
        if like is not None:
            stacked[k] = torch.stack([torch.zeros_like(like) if g is None else g for g in column])
    return _blocks(step, stacked)


def _fill(blocks: Sequence[Block | None], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    rest = iter(cotangents)
    return [None if b is None else next(rest) for b in blocks]


def _blocks(step: Step, found: dict[int, Tensor]) -> list[Block | None]:
    return [
        Block(found[k], tuple(found[k].shape[1:])) if k in found else None
        for k in range(len(step.edges))
    ]


def apply(step: Step, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The node's own backward on one row: one dense gradient per wanted edge."""
    if isinstance(step.node, BackwardCFunction):
        found = _python(step, cotangents)
    else:
        result = step.node(*cotangents)
        found = list(result) if isinstance(result, tuple) else [result]
    return [
        None if g is None or e is None else dense(g) for g, e in zip(found, step.edges, strict=True)
    ]


def _python(step: Step, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A ``torch.autograd.Function``: the engine fills in zeros and drops non-tensor arguments."""
    node: Any = step.node
    # zeros also after set_materialize_grads(False): whether None or zero arrives must not matter
    given = [
        torch.zeros(m.shape, dtype=m.dtype, device=m.device) if c is None else c
        for c, m in zip(cotangents, step.outputs, strict=True)
    ]
    result = node.apply(*given)
    results = list(result) if isinstance(result, tuple | list) else [result]
    # next_functions lists the tensor arguments only; needs_input_grad lists all arguments. The
    # arguments that need a gradient are the same, in the same order, in both.
    needed = [g for g, needs in zip(results, node.needs_input_grad, strict=False) if needs]
    rest = iter(needed)
    return [next(rest, None) if child is not None else None for child, _ in node.next_functions]
