"""The laws of a rule, for any node.

A `Case` builds one node. `laws(CASES)` gives four tests: the rule equals the node called once per
row, whatever axes of the block are repeated; what it claims of the samples is true; its gradients
per sample are those of each sample alone; and its result can be differentiated again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.engines import fallback
from batchjac.graph import Step, prune
from batchjac.rules import registry
from batchjac.samples import SHARED, SampleAxis

ROWS = 3
F64, F32, BF16, C128 = torch.float64, torch.float32, torch.bfloat16, torch.complex128
TOLERANCE = {F64: 1e-11, F32: 2e-5, BF16: 6e-2, C128: 1e-11, torch.complex64: 2e-5}

Blocks = Sequence[Block | None]


@dataclass(frozen=True)
class Case:
    """One node: what it is called, how to record it, and where its samples are.

    ``build`` gets one random tensor per entry of ``shapes`` and returns a tensor whose graph holds
    the node. ``at`` lists sample axes of the node's output, with the number of samples, that the
    rule must understand; ``mixes`` those along which it must admit that it cannot tell.
    """

    name: str
    build: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    at: tuple[tuple[SampleAxis, int], ...] = ()
    mixes: tuple[tuple[SampleAxis, int], ...] = ()
    dtypes: tuple[torch.dtype, ...] = (F64, F32)
    make: Callable[[Tensor], Tensor] = lambda x: x  # into the domain of the function
    wants: tuple[bool, ...] | None = None  # which inputs require a gradient; all unless told
    declines: bool = False  # the rule leaves this configuration to the node
    special: bool = False  # also with inf and nan among the cotangents
    second: bool = True  # the node has a second derivative
    alone: bool = True  # shared edges have a gradient per sample
    outputs: int = 1  # how many of the node's outputs have cotangents
    note: str = ""

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, s)) or "scalar" for s in self.shapes)
        return "-".join(filter(None, (self.name, self.note, shapes)))


@dataclass(frozen=True)
class Recorded:
    """The node of a case, and the inputs it came from."""

    step: Step
    rule: registry.Rule
    inputs: tuple[Tensor, ...]
    output: Tensor  # keeps the graph alive


@torch.enable_grad()
def record(case: Case, dtype: torch.dtype | None = None) -> Recorded:
    """Run the case and find its node."""
    torch.manual_seed(1)
    wants = case.wants or (True,) * len(case.shapes)
    inputs = tuple(
        case.make(torch.randn(shape, dtype=dtype or case.dtypes[0])).detach().requires_grad_(want)
        for shape, want in zip(case.shapes, wants, strict=True)
    )
    output = case.build(*inputs)
    sources = [torch.autograd.graph.get_gradient_edge(x) for x in inputs if x.requires_grad]
    assert output.grad_fn is not None
    graph = prune([output.grad_fn], [(e.node, e.output_nr) for e in sources])
    found = [step for step in graph.steps if step.name == case.name.removesuffix(":frozen")]
    assert found, f"no {case.name} among {[step.name for step in graph.steps]}"
    step = replace(found[0], name=case.name)
    rule = registry.find(step)
    assert rule is not None, f"no rule for {case.name}"
    return Recorded(step, rule, inputs, output)


def patterns(dims: int) -> list[tuple[int, ...]]:
    """Sets of repeated axes: all of them up to three axes, else none, each, each but one, all."""
    every = [c for k in range(dims + 1) for c in itertools.combinations(range(dims), k)]
    return every if dims <= 3 else [c for c in every if len(c) in (0, 1, dims - 1, dims)]


def random_blocks(
    step: Step, repeated: Sequence[int], rows: int = ROWS, outputs: int = 1
) -> list[Block | None]:
    """Rows for the first outputs, the axes ``repeated`` of size 1; nothing for the others."""
    blocks: list[Block | None] = []
    for meta in step.outputs[:outputs]:
        size = [1 if d in repeated else s for d, s in enumerate(meta.shape)]
        data = torch.randn(rows, *size, dtype=meta.dtype, device=meta.device)
        blocks.append(Block(data, meta.shape))
    return blocks + [None] * (len(step.outputs) - len(blocks))


def arrived(step: Step, blocks: Blocks) -> list[Tensor | None]:
    """What reaches each wanted edge: summed to its shape, cast, expanded."""
    assert len(blocks) == len(step.edges)
    out: list[Tensor | None] = []
    for block, edge in zip(blocks, step.edges, strict=True):
        if edge is None or block is None:
            assert edge is not None or block is None, "a block for an edge that nobody wants"
            out.append(None)
        else:
            found = block.sum_to(edge.shape).to(edge.meta.dtype).full()
            assert found.shape[1:] == edge.shape
            out.append(found)
    return out


def by_rows(step: Step, blocks: Blocks) -> list[Tensor | None]:
    """The specification: the node itself, called once per row."""
    bare = replace(step, name=step.name.removesuffix(":frozen"))
    return arrived(step, fallback.call(bare, blocks, "rows"))


def same(
    got: Sequence[Tensor | None],
    want: Sequence[Tensor | None],
    dtype: torch.dtype,
    least: float = 0.5,  # cotangents are of order one, and a sum of them may cancel to rounding
) -> None:
    """Equal to rounding of the largest entry, nan where nan is; ``None`` counts as zero."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if a is None or b is None:
            rest = b if a is None else a
            assert rest is None or not rest.any(), f"edge {k}: nothing against {rest}"
            continue
        finite = b.detach()[b.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * max(scale, least), equal_nan=True,
            msg=lambda m, k=k: f"edge {k}: {m}",
        )  # fmt: skip


def reverse(recorded: Recorded, step: Step, blocks: Blocks) -> Any:
    """The rule's blocks; what it was given must stay as it was."""
    before = [b and b.data.clone() for b in blocks]
    found = recorded.rule.reverse(step, blocks)
    for old, block in zip(before, blocks, strict=True):
        assert block is None or torch.equal(old.nan_to_num(), block.data.nan_to_num())
    return found


def subsets(step: Step) -> Iterator[Step]:
    """The step with all its edges wanted, then with each alone."""
    yield step
    wanted = [k for k, e in enumerate(step.edges) if e is not None]
    for k in wanted if len(wanted) > 1 else []:
        yield replace(step, edges=tuple(e if j == k else None for j, e in enumerate(step.edges)))


@torch.no_grad()
def check_reverse(case: Case, dtype: torch.dtype) -> None:
    """Law: the rule equals the node called once per row."""
    recorded = record(case, dtype)
    for step in subsets(recorded.step):
        for repeated in patterns(len(step.shape)):
            for rows in (ROWS, 1) if not repeated else (ROWS,):
                blocks = random_blocks(step, repeated, rows, case.outputs)
                found = reverse(recorded, step, blocks)
                assert (found is NotImplemented) == case.declines
                if not case.declines:
                    want = by_rows(step, blocks)
                    same(arrived(step, found), want, dtype)
                    check_owned(recorded, step, blocks, found, want, dtype)
    if case.special:
        check_special(recorded, dtype)


def check_owned(
    recorded: Recorded,
    step: Step,
    blocks: Blocks,
    found: Blocks,
    want: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> None:
    """Laws: ``fresh`` memory is nobody else's; rows that the walk owns give the same answer.

    What the rule overwrites are those rows alone.
    """
    held = [*recorded.inputs, recorded.output, *_saved(step)]
    made = [b for b in found if b is not None]
    if recorded.rule.fresh and len(made) == 1:
        came = [b.data for b in blocks if b is not None]
        if not any(made[0].data is data for data in came):
            others = {t.untyped_storage().data_ptr() for t in [*held, *came] if t.numel()}
            assert made[0].data.untyped_storage().data_ptr() not in others
    before = [t.clone() for t in held]
    own = [b and Block(b.data.clone(), b.shape, owned=True) for b in blocks]
    same(arrived(step, recorded.rule.reverse(step, own)), want, dtype)
    for old, now in zip(before, held, strict=True):
        assert torch.equal(old.nan_to_num(), now.nan_to_num())


def _saved(step: Step) -> list[Tensor]:
    """All tensors that the forward saved for this node."""
    names = [name for name in dir(step.node) if name.startswith("_saved_")]
    values = [getattr(step.node, name) for name in names]
    return [v for v in values if isinstance(v, Tensor) and v.layout == torch.strided]


def check_special(recorded: Recorded, dtype: torch.dtype) -> None:
    """Law: inf and nan among the cotangents come out as the node lets them."""
    blocks = random_blocks(recorded.step, ())
    block = blocks[0]
    assert block is not None
    flat = block.data.view(-1)
    flat[::3] = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=F64)[
        torch.arange(flat[::3].numel()) % 3
    ].to(flat.dtype)
    found = arrived(recorded.step, reverse(recorded, recorded.step, blocks))
    same(found, by_rows(recorded.step, blocks), dtype)


def only_sample(block: Block, at: SampleAxis, count: int, n: int) -> Block:
    """The block with the cotangents of all other samples set to zero."""
    full = block.full().clone()
    size = [full.shape[0], *block.shape]
    apart = full.view(*size[: at.dim + 1], at.outer, count, at.inner, *size[at.dim + 2 :])
    keep = torch.zeros(count, dtype=torch.bool)
    keep[n] = True
    apart.movedim(at.dim + 2, 0)[~keep] = 0
    return Block(full, block.shape)


@torch.no_grad()
def check_samples(case: Case) -> None:
    """Law: cotangents of one sample alone give gradients of that sample alone."""
    recorded = record(case)
    step = recorded.step
    assert recorded.rule.samples is not None
    for at, count in case.at:
        places = recorded.rule.samples(step, at)
        for edge, place in zip(step.edges, places, strict=True):
            assert edge is None or place is not None, f"{at}: does not know {places}"
        for n in range(count):
            blocks = [
                b and only_sample(b, at, count, n)
                for b in random_blocks(step, (), outputs=case.outputs)
            ]
            for found, place in zip(by_rows(step, blocks), places, strict=True):
                if found is None or not isinstance(place, SampleAxis):
                    continue
                others = found.clone()
                assert others.shape[place.dim + 1] == place.outer * count * place.inner
                others -= only_sample(Block(found, tuple(found.shape[1:])), place, count, n).data
                assert not others.any(), f"{at}: sample {n} reaches others by {place}"
    for at, _ in case.mixes:
        places = recorded.rule.samples(step, at)
        wanted = [p for e, p in zip(step.edges, places, strict=True) if e is not None]
        assert None in wanted, f"{at}: claims to know {places}"


@torch.no_grad()
def check_per_sample(case: Case) -> None:
    """Law: what all samples share gets each sample's own gradient, rows ``[V*N, *p]``."""
    recorded = record(case)
    for at, count in case.at:
        assert recorded.rule.samples is not None
        places = recorded.rule.samples(recorded.step, at)
        if all(p is not SHARED for p in places):
            continue
        assert recorded.rule.per_sample is not None, "shared edges, but nothing per sample"
        edges = recorded.step.edges
        shared = [e if p is SHARED else None for e, p in zip(edges, places, strict=True)]
        step = replace(recorded.step, edges=tuple(shared))
        for repeated in patterns(len(step.shape)):
            blocks = random_blocks(step, repeated, outputs=case.outputs)
            found = recorded.rule.per_sample(step, blocks, at)
            assert (found is not NotImplemented) == case.alone
            if found is NotImplemented:
                continue
            single = [
                by_rows(step, [b and only_sample(b, at, count, n) for b in blocks])
                for n in range(count)
            ]
            want = [
                None if column[0] is None else torch.stack(column, 1).flatten(0, 1)
                for column in zip(*single, strict=True)
            ]
            same(arrived(step, found), want, case.dtypes[0])


def check_second(case: Case) -> None:
    """Law: recorded under autograd, the rule has the derivatives that the node's backward has."""
    recorded = record(case)
    step = recorded.step
    for repeated in [(), tuple(range(len(step.shape)))]:
        blocks = random_blocks(step, repeated, outputs=case.outputs)
        leaves = [x for x in recorded.inputs if x.requires_grad]
        for block in blocks:
            if block is not None:
                leaves.append(block.data.requires_grad_())
        found = arrived(step, recorded.rule.reverse(step, blocks))
        want = by_rows(step, blocks)
        same(found, want, case.dtypes[0])
        weights = [None if w is None else torch.randn_like(w) for w in want]
        first, second = (_derivatives(results, weights, leaves) for results in (found, want))
        same(first, second, case.dtypes[0], least=1.0)


def _derivatives(
    results: Sequence[Tensor | None], weights: Sequence[Tensor | None], leaves: list[Tensor]
) -> tuple[Tensor | None, ...]:
    pairs = [
        (r, w)
        for r, w in zip(results, weights, strict=True)
        if r is not None and w is not None and r.requires_grad
    ]
    if not pairs:
        return (None,) * len(leaves)
    some, given = zip(*pairs, strict=True)
    return torch.autograd.grad(some, leaves, given, allow_unused=True, retain_graph=True)


def laws(cases: Sequence[Case]) -> tuple[Any, Any, Any, Any]:
    """The four tests of these cases."""

    @pytest.mark.parametrize(
        ("case", "dtype"),
        [pytest.param(c, d, id=f"{c}-{str(d)[6:]}") for c in cases for d in c.dtypes],
    )
    def test_equals_the_node_row_by_row(case: Case, dtype: torch.dtype) -> None:
        check_reverse(case, dtype)

    @pytest.mark.parametrize("case", [c for c in cases if c.at or c.mixes], ids=str)
    def test_claims_about_samples_are_true(case: Case) -> None:
        check_samples(case)

    @pytest.mark.parametrize("case", [c for c in cases if c.at], ids=str)
    def test_each_sample_alone(case: Case) -> None:
        check_per_sample(case)

    @pytest.mark.parametrize("case", [c for c in cases if c.second and not c.declines], ids=str)
    def test_differentiable_again(case: Case) -> None:
        check_second(case)

    return (
        test_equals_the_node_row_by_row,
        test_claims_about_samples_are_true,
        test_each_sample_alone,
        test_differentiable_again,
    )
