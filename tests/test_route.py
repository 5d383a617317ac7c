"""The planner: cuts that every path passes, and the fastest directions, found by brute force."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchjac import cost
from batchjac.cost import NOMINAL, Work
from batchjac.cuts import between, covered, cuts, slots
from batchjac.graph import Graph, Slot, edge_of, prune
from batchjac.independence import prove
from batchjac.route import (
    SIMPLER,
    Chain,
    Down,
    Forward,
    Join,
    Passes,
    Reverse,
    Route,
    Stage,
    Up,
    Weight,
    cheapest,
    held,
    passes,
    span,
)
from benchmarks.cases import CASES
from tests.routes import planned

F64 = torch.float64


# Cuts.


def recorded(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Graph, Slot, Slot, Tensor]:
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    edge = edge_of(leaf)
    assert y.grad_fn is not None
    target = (edge.node, edge.output_nr)
    return prune([y.grad_fn], [target]), (y.grad_fn, y.output_nr), target, y


def found(f: Callable[[Tensor], Tensor], x: Tensor) -> list[str]:
    graph, root, target, y = recorded(f, x)
    return [
        node.name().split("::")[-1] for node, _ in cuts(graph, root, target, prove(graph, y).places)
    ]


X = torch.randn(3, 4, dtype=F64)


def residual(x: Tensor) -> Tensor:
    h = x.sin()
    return (h.cos().exp() + h).tanh()


def test_a_residual_branch_has_no_cut_inside() -> None:
    assert found(residual, X) == ["TanhBackward0", "AddBackward0", "SinBackward0", "AccumulateGrad"]


def test_a_skip_around_everything_leaves_no_cut_but_the_sum() -> None:
    names = found(lambda x: x.sin().exp() + x, X)
    assert names == ["AddBackward0", "AccumulateGrad"]


def test_two_pieces_of_one_tensor_are_no_cut() -> None:
    def f(x: Tensor) -> Tensor:
        a, b = x.sin().chunk(2, 1)
        return (a * b).exp()

    assert found(f, X) == ["ExpBackward0", "MulBackward0", "SinBackward0", "AccumulateGrad"]


def test_one_piece_of_several_is_a_cut() -> None:
    names = found(lambda x: x.sin().chunk(2, 1)[1].exp(), X)
    assert names == ["ExpBackward0", "SplitBackward0", "SinBackward0", "AccumulateGrad"]


def test_a_tensor_that_is_not_by_sample_is_no_cut() -> None:
    names = found(lambda x: x.sin().t().exp().t().cos(), X)
    assert names == ["CosBackward0", "TBackward0", "SinBackward0", "AccumulateGrad"]


def test_complex_numbers_are_no_cut() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.view_as_real((x.sin() * 1j).exp()).flatten(1).sin()

    assert not any("Exp" in name or "Mul" in name for name in found(f, X))


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Each tensor the product of two earlier ones, or the sine of one."""
    steps = draw(st.integers(1, 9))
    return [(draw(st.integers(0, k)), draw(st.integers(0, k))) for k in range(steps)]


def run(program: list[tuple[int, int]], x: Tensor) -> Tensor:
    values = [x.sin()]
    for a, b in program:
        values.append(values[a].sin() if a == b else values[a] * values[b])
    return values[-1]


@given(program=programs())
@settings(max_examples=80, deadline=None)
def test_cuts_are_what_every_path_passes(program: list[tuple[int, int]]) -> None:
    graph, root, target, y = recorded(functools.partial(run, program), X)
    places = prove(graph, y).places
    every = {slot for step in graph.steps for slot in slots(step)}
    by_hand = {slot for slot in every if covered(graph, root, slot, target)}
    assert set(cuts(graph, root, target, places)) == by_hand
    for upper, lower in itertools.pairwise(cuts(graph, root, target, places)):
        part = between(graph, upper, lower)
        assert part.steps[0].node is upper[0]
        assert part.steps[-1].node is lower[0]
        inside = {slot for step in part.steps for slot in slots(step)}
        assert all((e.node, e.slot) in inside for step in part.steps for e in step.edges if e)


def test_between_two_cuts_nothing_leads_away() -> None:
    """Toward one of two inputs, edges to the other are gone."""
    x, other = (torch.randn(3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    y = (x.sin() * other.cos()).exp()
    ends = [edge_of(t) for t in (x, other)]
    assert y.grad_fn is not None
    graph = prune([y.grad_fn], [(e.node, e.output_nr) for e in ends])
    root = (y.grad_fn, 0)
    part = between(graph, root, (ends[0].node, 0))
    assert [len([e for e in step.edges if e]) for step in part.steps] == [1, 1, 1, 0]
    assert not any("Cos" in step.name for step in part.steps)


# The dynamic programme.

RATES = NOMINAL


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    count = draw(st.integers(1, 5))
    widths = tuple(draw(st.sampled_from([1, 3, 10, 64, 300, 1000])) for _ in range(count + 1))
    stages = []
    for a, b in itertools.pairwise(widths):
        weight = draw(st.booleans())
        some = st.sampled_from([0.0, 1.0 * a * b])
        work = Work(
            products=a * b, bytes=4.0 * (a + b), calls=draw(st.integers(1, 3)),
            heads=draw(some), filled=draw(some), copied=draw(some), scattered=draw(some),
        )  # fmt: skip
        stages.append(
            Stage(
                work,
                live=8 * (a + b),
                constant=weight or draw(st.booleans()),
                weight=weight,
                forward=draw(st.booleans()),
                reverse=draw(st.integers(0, 5)) > 0,
            )
        )
    rows = draw(st.sampled_from([1, widths[0]]))
    return Chain(widths, tuple(stages), draw(st.sampled_from([1, 16])), rows, draw(st.booleans()))


def step_price(chain: Chain, rows: int, stages: range, shared: bool, up: bool) -> float:
    """Rows or columns through stages one after the other, shared until a sample comes in."""
    total = 0.0
    for k in stages:
        shared = shared and chain.stages[k].constant
        samples = 1 if shared else chain.samples
        total += cost.seconds(chain.stages[k].work, rows, samples, RATES, up)
    return total


def trees(chain: Chain, a: int, b: int) -> Iterator[tuple[float, bool]]:
    """Seconds of every way from cut ``a`` to cut ``b``, by its definition; whether it joins."""
    rows = chain.rows if a == 0 else chain.widths[a]
    fresh = not (chain.own and a == 0)

    def constant(first: int, last: int) -> bool:
        return all(s.constant for s in chain.stages[first:last])

    if all(s.reverse for s in chain.stages[a:b]):
        yield step_price(chain, rows, range(a, b), fresh, False), False
    if all(s.forward for s in chain.stages[a:b]):
        yield step_price(chain, chain.widths[b], range(b - 1, a - 1, -1), True, True), False
    if b == a + 1 and chain.stages[a].weight:
        yield cost.read(RATES), False
    for k in range(a + 1, b):
        for above, joins in trees(chain, a, k):
            if all(s.reverse for s in chain.stages[k:b]):
                shared = fresh and constant(a, k)
                yield above + step_price(chain, rows, range(k, b), shared, False), joins
        for below, joins in trees(chain, k, b):
            if all(s.forward for s in chain.stages[a:k]):
                columns = range(k - 1, a - 1, -1)
                shared = constant(k, b)
                yield below + step_price(chain, chain.widths[b], columns, shared, True), joins
        for above, _ in trees(chain, a, k):
            for below, _ in trees(chain, k, b):
                shared = (fresh and constant(a, k)) + constant(k, b)
                sizes = (rows, chain.widths[k], chain.widths[b])
                yield above + below + cost.joined(*sizes, chain.samples, shared, 4, RATES), True


@given(chain=chains())
@settings(max_examples=150, deadline=None)
def test_no_tree_is_faster(chain: Chain) -> None:
    every = list(trees(chain, 0, len(chain.stages)))
    best, mixed = cheapest(chain, RATES, "auto"), cheapest(chain, RATES, "mixed")
    if not every:
        assert best is None
        return
    assert best is not None
    least = min(t for t, _ in every)
    allowed = SIMPLER if isinstance(best, Reverse | Forward) else 1
    assert least * (1 - 1e-9) <= best.seconds <= allowed * least * (1 + 1e-9)
    joins = [t for t, joined in every if joined]
    assert (mixed is None) == (not joins)
    if mixed is not None:
        assert mixed.seconds == pytest.approx(min(joins))
        assert any(isinstance(node, Join) for node in mixed)


@given(chain=chains())
@settings(max_examples=50, deadline=None)
def test_a_route_covers_its_stages_once(chain: Chain) -> None:
    for mode in ("auto", "mixed", "forward", "reverse"):
        route = cheapest(chain, RATES, mode)
        if route is not None:
            assert sorted(pushed(route)) == list(range(len(chain.stages)))
            assert held(route, chain).units >= 1


def pushed(route: Route) -> Iterator[int]:
    match route:
        case Down():
            yield from (*pushed(route.above), *range(route.above.lower, route.lower))
        case Up():
            yield from (*range(route.upper, route.below.upper), *pushed(route.below))
        case Join():
            assert route.above.lower == route.below.upper
            yield from (*pushed(route.above), *pushed(route.below))
        case Reverse() | Forward() | Weight():
            yield from range(route.upper, route.lower)


def test_passes_of_a_route() -> None:
    stage = Stage(Work(1, 0, 1, 1))
    chain = Chain((7, 5, 3, 2), (stage,) * 3, 4, rows=6)
    top, low = Reverse(0, 1, 0.0), Forward(2, 3, 0.0)
    assert passes(Down(0, 3, 0.0, top), chain) == Passes(6 + 12, 0, 0)
    assert passes(Up(0, 3, 0.0, low), chain) == Passes(0, 2 + 4, 0)
    assert passes(Join(0, 3, 0.0, Down(0, 2, 0.0, top), low), chain) == Passes(12, 2, 6 * 3 * 2)


def test_a_step_spans_what_it_alone_pushes_through() -> None:
    top, low = Reverse(0, 1, 0.0), Forward(2, 3, 0.0)
    assert [span(r) for r in (top, low)] == [range(1), range(2, 3)]
    assert span(Down(0, 3, 0.0, top)) == range(1, 3)
    assert span(Up(0, 3, 0.0, low)) == range(2)
    assert len(span(Join(0, 3, 0.0, Down(0, 2, 0.0, top), low))) == len(span(Weight(0, 1, 0))) == 0


# What it comes to on the cases of the design.


def test_the_choices_of_the_design() -> None:
    rates = RATES  # the machine's own may change what is near, and these are not
    by_name = {case.name: case for case in CASES}

    def route(name: str) -> Route:
        model, x = by_name[name].make()
        found = planned(model, x[:8], rates)
        assert found is not None
        return found.route

    assert type(route("decoder")) is Forward
    autoencoder = route("autoencoder")
    assert isinstance(autoencoder, Join)
    assert autoencoder.above.lower == 3  # 784 | 256 | 256 | 16, counted from the output
    assert type(route("LeNet5")) is Reverse
