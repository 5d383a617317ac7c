"""The laws of forward rules, over the cases of the reverse rules."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.engines import forward
from batchjac.graph import Step
from batchjac.rules import registry
from tests.rules import common
from tests.rules.common import ROWS, Case, Recorded, record

HERE = Path(__file__)
MODULES = [
    importlib.import_module(f"tests.rules.{path.stem}")
    for path in sorted(HERE.parent.glob("test_*.py"))
    if path.stem not in ("test_every_rule", HERE.stem)
]
CASES: list[Case] = []  # none beside those of the other files

# Reverse rules of nodes that have no forward rule.
WITHOUT = {
    "CumprodBackward0",
    "LogcumsumexpBackward0",
    "ViewAsComplexBackward0",
    "ViewAsRealBackward0",
}
EVERY = [case for module in MODULES for case in module.CASES]
REAL = [
    case
    for case in EVERY
    if case.name not in WITHOUT and any(not d.is_complex for d in case.dtypes)
]
Blocks = Sequence[Block | None]


def real(case: Case) -> torch.dtype:
    """The first of the case's dtypes, which is float64 unless it is about another."""
    return next(d for d in case.dtypes if not d.is_complex)


def jacobians(recorded: Recorded, step: Step, outputs: int) -> list[list[Tensor | None]]:
    """For each output and each edge ``[entries of the output, *edge]``, by the node itself."""
    found: list[list[Tensor | None]] = []
    for k, meta in enumerate(step.outputs[:outputs]):
        count = math.prod(meta.shape)
        seed = torch.eye(count, dtype=meta.dtype).reshape(count, *meta.shape)
        blocks: list[Block | None] = [None] * len(step.outputs)
        blocks[k] = Block(seed, meta.shape)
        if not count:
            found.append([e and seed.new_zeros(0, *e.shape) for e in step.edges])
        elif step.name.endswith(":frozen"):  # the node itself knows nothing of that
            found.append(common.arrived(step, recorded.rule.reverse(step, blocks)))
        else:
            found.append(common.by_rows(step, blocks))
    return found


def pushed(step: Step, jacobians: list[list[Tensor | None]], blocks: Blocks) -> list[Tensor]:
    """The specification: ``sum_k J_k t_k`` for each output, ``[V, *output]``."""
    rows = next(b.rows for b in blocks if b is not None)
    found = []
    for meta, edges in zip(step.outputs, jacobians, strict=False):
        total = torch.zeros(rows, math.prod(meta.shape), dtype=meta.dtype)
        for j, t in zip(edges, blocks, strict=True):
            if j is not None and t is not None:
                size = math.prod(t.shape)
                flat = t.full().reshape(rows, size).to(meta.dtype)
                total = total + flat @ j.to(meta.dtype).reshape(len(j), size).mT
        found.append(total.reshape(rows, *meta.shape))
    return found


def tangents(step: Step, repeated: Sequence[int], rows: int = ROWS) -> list[Block | None]:
    """Random rows for every wanted edge, its axes ``repeated`` of size 1."""
    return [
        e and Block(
            torch.randn(
                rows, *(1 if d in repeated else s for d, s in enumerate(e.shape)),
                dtype=e.meta.dtype,
            ),
            e.shape,
        )
        for e in step.edges
    ]  # fmt: skip


def questions(step: Step) -> Iterator[list[Block | None]]:
    """Tangents with axes repeated in every way, in several rows and in one, at some edges only."""
    widest = max(len(e.shape) for e in step.edges if e is not None)
    for repeated in common.patterns(widest):
        yield tangents(step, repeated)
    yield tangents(step, (), rows=1)
    every = tangents(step, ())
    wanted = [k for k, e in enumerate(step.edges) if e is not None]
    for k in wanted if len(wanted) > 1 else []:
        yield [b if j == k else None for j, b in enumerate(every)]


def check(case: Case, recorded: Recorded) -> None:
    """Law: the rule is ``sum_k J_k t_k`` with the Jacobians of the node called once per row."""
    for step in common.subsets(recorded.step):
        expected = jacobians(recorded, step, case.outputs)
        numbers = [*recorded.inputs, *(j for edges in expected for j in edges if j is not None)]
        finite = all(x.isfinite().all() for x in numbers)
        for blocks in questions(step):
            before = [b and b.data.clone() for b in blocks]
            found = [b and b.full() for b in forward.through(step, blocks)]
            if finite:
                common.same(found[: case.outputs], pushed(step, expected, blocks), real(case))
            else:
                check_symmetric(step, blocks, found, real(case))
            for old, block in zip(before, blocks, strict=True):
                assert block is None or torch.equal(old, block.data), "its argument has changed"


def check_symmetric(
    step: Step, blocks: Blocks, found: list[Tensor | None], dtype: torch.dtype
) -> None:
    """Law: a derivative that is its own transpose takes tangents to what cotangents go to.

    A product with inf or nan in the matrix would spread them over the sum, and at a nan some of
    torch's kernels give another slope to an expanded cotangent than to a whole one. What has them
    among these cases are functions of entries, and softmax.
    """
    (k, block), *more = [(k, b) for k, b in enumerate(blocks) if b is not None]
    if more or block.shape != step.shape:  # no product of one matrix, or not a square one
        return
    same_way = common.by_rows(step, [block])[k]
    common.same(found, [same_way], dtype)


def complex_numbers(step: Step) -> bool:
    """Whether something beside the node is complex: forward rules are for real tensors."""
    metas = [*step.outputs, *(e.meta for e in step.edges if e is not None)]
    return any(meta.dtype.is_complex for meta in metas)


@pytest.mark.parametrize("case", [c for c in REAL if not c.declines], ids=str)
@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recording"])
def test_equals_the_node_transposed(case: Case, recording: bool):
    recorded = record(case, real(case))
    if complex_numbers(recorded.step):
        assert registry.find_forward(recorded.step) is None
        return
    with torch.set_grad_enabled(recording):
        check(case, recorded)


@pytest.mark.parametrize("case", [c for c in REAL if c.declines], ids=str)
def test_declines_what_the_reverse_rule_declines(case: Case):
    step = record(case, real(case)).step
    with pytest.raises(forward.NoForwardRule, match=step.name):
        forward.through(step, tangents(step, ()))


@pytest.mark.parametrize("case", [c for c in REAL if c.second and not c.declines], ids=str)
def test_differentiable_again(case: Case):
    """Law: recorded, the tangents have the derivatives that the node's own Jacobian gives them."""
    recorded = record(case, real(case))
    if complex_numbers(recorded.step):
        return
    step = recorded.step
    for repeated in [(), (0,)]:
        blocks = tangents(step, repeated)
        leaves = [x for x in recorded.inputs if x.requires_grad]
        leaves += [b.data.requires_grad_() for b in blocks if b is not None]
        found = [b and b.full() for b in forward.through(step, blocks)][: case.outputs]
        want = pushed(step, jacobians(recorded, step, case.outputs), blocks)
        weights = [torch.randn_like(w) for w in want]
        first, second = (common._derivatives(rows, weights, leaves) for rows in (found, want))
        common.same(first, second, real(case), least=1.0)
