"""Rows one at a time by autograd's engine: equal to the reference, chosen where that is faster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import jacobian, pace
from batchjac.capture import capture
from batchjac.cost import NOMINAL
from batchjac.engines import reference
from batchjac.engines.rows import in_engine_order
from batchjac.engines.sweep import Kernels
from batchjac.errors import CouplingError
from batchjac.graph import edge_of, prune
from batchjac.job import Job, jobs
from batchjac.pace import USUAL, Pace
from batchjac.problem import pose
from batchjac.seeds import seeds
from batchjac.testing import jacobian_in_chunks
from batchjac.work import need
from benchmarks.cases import named
from tests.common import N, batch, close, full_truth, mlp
from tests.routes import DEFAULTS, one_row_at_a_time, walk_by
from tests.zoo import CASES
from tests.zoo.verdict import judge

pytestmark = [
    # tracers, forward mode and inductor load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every row by itself, where that is possible; the row of each pass is noted."""
    one_row_at_a_time(monkeypatch)
    came: list[int] = []
    one_by_one = Job._one_by_one

    def counted(job: Job, sinks: Any) -> None:
        came.extend(range(job.seeds.rows))
        one_by_one(job, sinks)

    monkeypatch.setattr(Job, "_one_by_one", counted)
    return came


def refuse(*_: Any, **__: Any) -> Any:
    pytest.fail("this went through the walk")


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    walk_by(monkeypatch, refuse)


# The zoo, whose documented errors stay the same, and after which nothing is left changed.


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_zoo_is_right(case: Any, forced: list[int]) -> None:
    verdict = judge(case)
    assert verdict.outcome != "wrong", verdict.detail
    assert (verdict.outcome == "documented error") == (case.expects is not None)


# What can be asked, on small networks in double precision.

QUESTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "one output": {"outputs": 2},
    "some outputs": {"outputs": [3, 0]},
    "a slice": {"outputs": slice(1, 3)},
    "each sample's own": {"outputs": torch.tensor([3, 0, 1, 1, 2])},
    "the largest": {"outputs": "argmax"},
    "a layer": {"wrt": "1"},
    "several layers": {"wrt": ["inputs", "0", "3"]},
    "of a layer": {"of": "2", "wrt": "0"},
}


@pytest.mark.usefixtures("float64", "no_walk")
@pytest.mark.parametrize("options", QUESTIONS.values(), ids=QUESTIONS)
def test_equal_to_the_reference(options: dict[str, Any], forced: list[int]) -> None:
    model, x = mlp(), batch()
    close(jacobian(model, x, **options), reference.jacobian(model, x, **options))
    assert forced


@pytest.mark.usefixtures("float64", "no_walk")
@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_chunks_change_nothing(samples: int, rows: int, forced: list[int]) -> None:
    model, x = mlp(), batch()
    close(jacobian_in_chunks(model, x, samples, rows), reference.jacobian(model, x))
    assert len(forced) == 4 * -(-N // samples)


@pytest.mark.usefixtures("float64", "no_walk", "forced")
def test_it_writes_into_the_callers_memory() -> None:
    model, x = mlp(), batch()
    out = torch.full((N, 2, 4, 3), torch.nan)[:, 0]  # with strides of its own
    assert jacobian(model, x, out=out) is out
    close(out, reference.jacobian(model, x))


@pytest.mark.usefixtures("float64", "no_walk", "forced")
def test_several_outputs_and_inputs_and_those_that_do_not_meet() -> None:
    def f(a: Tensor, i: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"y": a.sin() * i, "other": (a * b).sum(1), "alone": b.exp()}

    inputs = (batch(), torch.arange(N).unsqueeze(1), batch())
    found = jacobian(f, inputs)
    close(found, reference.jacobian(f, inputs))
    assert found["y"][1] is None  # integers have no derivative
    assert not found["y"][2].any()
    assert not found["alone"][0].any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("coupling", ["sum", "full"])
def test_coupled_samples(coupling: str, forced: list[int], no_walk: None) -> None:
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        batch(),
    )
    truth = full_truth(model, x)  # [N, out, N, in]
    found = jacobian(model, x, coupling=coupling)
    close(found, truth if coupling == "full" else truth.sum(0).movedim(1, 0))
    assert len(forced) == (2 * N if coupling == "full" else 2)


def test_coupled_samples_are_refused(forced: list[int]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(CouplingError):
        jacobian(model, batch())
    assert not forced


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [{"wrt": "parameters"}, {"coupling": "frozen"}, {"create_graph": True}, {"mode": "reverse"}],
    ids=str,
)
def test_what_the_walk_keeps(options: dict[str, Any], forced: list[int]) -> None:
    model, x = mlp(), batch()
    plain = {k: v for k, v in options.items() if k in ("wrt", "create_graph")}
    close(jacobian(model, x, **options), reference.jacobian(model, x, **plain))
    assert not forced


# What could make all samples at once another thing than each by itself.


class Unit(torch.autograd.Function):
    """A gradient of length one, over the whole batch, which is no linear map of the cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / g.norm()


def unit(x: Tensor) -> Tensor:
    y: Tensor = Unit.apply(x * 2.0)  # type: ignore[no-untyped-call]
    return y.sin()


def hidden_hook(x: Tensor) -> Tensor:
    y = x * 2.0
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda grads: tuple(g / g.norm() for g in grads))
    return y.sin()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("f", [unit, hidden_hook], ids=["function", "hook"])
def test_what_looks_at_the_whole_gradient_sees_one_sample_at_a_time(
    f: Callable[[Tensor], Tensor], forced: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    x = batch()
    close(jacobian(f, x), reference.jacobian(f, x))
    assert forced
    assert "one at a time" in caplog.text


@pytest.mark.usefixtures("float64", "forced")
def test_where_the_engine_fails_the_walk_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr("batchjac.job.pull", broken)
    model, x = mlp(), batch()
    close(jacobian(model, x), reference.jacobian(model, x))
    assert "autograd's engine failed (RuntimeError: broken): rows now go in reverse" in caplog.text


@pytest.mark.usefixtures("float64")
def test_memory_that_runs_out_halves_the_samples(
    monkeypatch: pytest.MonkeyPatch, forced: list[int]
) -> None:
    pull = batchjac.job.pull

    def limited(y: Tensor, *rest: Any) -> Any:
        if len(y) > 2:
            raise MemoryError
        return pull(y, *rest)

    monkeypatch.setattr("batchjac.job.pull", limited)
    model, x = mlp(), batch()
    close(jacobian(model, x), reference.jacobian(model, x))
    assert len(forced) > 4


# The plan.


@pytest.mark.usefixtures("float64")
def test_the_plan_says_so_and_counts_the_passes(
    forced: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    passes = []
    pull = batchjac.job.pull
    monkeypatch.setattr("batchjac.job.pull", lambda *a: passes.append(0) or pull(*a))
    planned = batchjac.plan(mlp(), batch())
    assert planned.plan.engine == "rows"
    assert planned.plan.directions == (Pace(2.0, 1.0).line(),)
    assert (planned.plan.rows, planned.plan.width, planned.plan.kernels) == (1, 4, {})
    assert planned.plan.prediction is not None
    assert planned.plan.prediction.seconds >= 1.0
    with caplog.at_level(logging.DEBUG, logger="batchjac"):
        planned(batch())
    assert planned.plan.prediction.rows == len(passes) == 4
    assert planned.plan.prediction.columns == 0
    assert "engine        rows" in caplog.text
    assert "autograd's engine: predicted 1e+03 ms, 2e+03 ms all at once" in caplog.text


# The choice, at the usual rates: no clock is read here.


def paced(name: str, outputs: Any = None) -> Pace | None:
    model, x = named(name).make()
    x = x[:4].requires_grad_()
    y = model(x)
    edge = edge_of(x)
    assert y.grad_fn is not None
    graph = prune([y.grad_fn], [(edge.node, edge.output_nr)])
    return pace.singly(graph, seeds(y, outputs, "error", slice(0, len(x))))


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_known", {})
    monkeypatch.setattr(pace, "clock", lambda threads: USUAL)
    monkeypatch.setattr(pace.cost, "rates", lambda *_: NOMINAL)


@pytest.mark.usefixtures("usual")
def test_one_output_of_many_small_nodes_goes_by_itself() -> None:
    found = paced("GRU", [0])
    assert found is not None
    assert found.engine * 2 < found.walked
    assert paced("LeNet5") is None
    assert paced("LeNet5", [0]) is None  # few nodes, much to do in each
    assert paced("square block", [0]) is None


@pytest.mark.usefixtures("usual")
def test_more_rows_than_a_few_go_together() -> None:
    assert paced("deep MLP, batch 1") is None
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(200)], nn.Linear(2, 40))
    x = torch.zeros(3, 2, requires_grad=True)
    y, edge = model(x), edge_of(x)
    graph = prune([y.grad_fn], [(edge.node, edge.output_nr)])
    taken = [
        pace.singly(graph, seeds(y, list(range(rows)), "error", slice(0, 3))) is not None
        for rows in range(1, 41)
    ]
    assert taken[0]
    assert not taken[-1]
    assert taken == sorted(taken, reverse=True)
    assert sum(taken) < 6  # a node costs the walk some four times as much


@pytest.mark.usefixtures("usual")
def test_a_faster_route_is_not_left_for_it() -> None:
    model, x = named("GRU").make()
    x = x[:4].requires_grad_()
    y, edge = model(x), edge_of(x)
    graph = prune([y.grad_fn], [(edge.node, edge.output_nr)])
    rows = seeds(y, [0], "error", slice(0, 4))
    slow = pace.singly(graph, rows)
    assert slow is not None
    assert pace.singly(graph, rows, slow.engine) is None


def test_the_clock_is_measured() -> None:
    clock = pace.clock(torch.get_num_threads())
    assert 0 < clock.engine < clock.walked < clock.called < 0.1


@pytest.mark.usefixtures("usual")
def test_auto_takes_it_for_one_output_of_a_gru_and_not_for_lenet() -> None:
    for name, engine in (("GRU", "rows"), ("LeNet5, batch 12", "walk")):
        model, x = named(name).make()
        assert batchjac.plan(model, x[:4], outputs=0).plan.engine == engine
        assert batchjac.plan(model, x[:4], outputs=0, mode="reverse").plan.engine == "walk"
        found = jacobian(model, x[:4], outputs=0)
        torch.testing.assert_close(found, jacobian(model, x[:4], outputs=0, mode="reverse"))


# Memory.


def test_the_engines_order_is_a_topological_one_newest_first() -> None:
    x = torch.randn(3, requires_grad=True)
    old = x.sin()
    new = [x.cos() for _ in range(3)]
    y = old * sum(new)  # type: ignore[operator]
    edge = edge_of(x)
    assert y.grad_fn is not None
    graph = prune([y.grad_fn], [(edge.node, edge.output_nr)])
    steps = in_engine_order(graph).steps
    assert {s.node for s in steps} == {s.node for s in graph.steps}
    done: set[Any] = set()
    for step in reversed(steps):
        assert all(e is None or e.node in done for e in step.edges)
        done.add(step.node)
    numbers = [s.node._sequence_nr() for s in steps[:-1]]
    assert numbers == sorted(numbers, reverse=True)


def test_one_row_is_what_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples fit than with all rows."""
    model, x = mlp(), torch.randn(64, 3)
    problem = pose(model, x, **DEFAULTS)
    with capture(problem, slice(0, 64)) as captured:
        (job,) = jobs(problem, captured, slice(0, 64), Kernels())
        together = batchjac.work.units([job])
        assert together == 4
        before = need([job], 64)
    one_row_at_a_time(monkeypatch)
    with capture(problem, slice(0, 64)) as captured:
        (job,) = jobs(problem, captured, slice(0, 64), Kernels())
        assert batchjac.work.units([job]) == 1
        assert batchjac.work.width([job]) == 4
        assert need([job], 64) == before  # of a chain, whose order is one
