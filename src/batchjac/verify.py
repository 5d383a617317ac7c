"""One row of autograd's own engine against the rows just computed, the first time a graph is seen.

The walk stands on semi-private ground (what nodes save, calling a node) and skips hooks. A random
cotangent through the real engine costs one backward and sees all of that.
"""

import contextlib
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from batchjac.capture import Capture, capture
from batchjac.engines.rows import pull
from batchjac.graph import Graph
from batchjac.job import Goal, Job
from batchjac.plain import unrounded
from batchjac.problem import Problem
from batchjac.sink import Sink

# A wrong rule is wrong by the size of the result; rounding is far below the square root of eps.
_ROOT_EPS = {
    torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2,
}  # fmt: skip

_FEW = 4  # samples: torch.roll of a scalar is right under vmap for one and two
_VMAP = -1  # beside the signatures of graphs: vmap was compared
_trusted: "weakref.WeakKeyDictionary[Any, set[int]]" = weakref.WeakKeyDictionary()


def _owner(problem: Problem) -> Any:
    return problem.function if problem.module is None else problem.module


def signature(job: Job, way: str = "") -> int:
    """What a graph is made of and how it is walked, whatever the number of samples.

    A ``way`` other than the plain walk has the same answer before it was gone and after. The ways
    of nodes are those of this graph alone: a later chunk knows those of other outputs too. What
    samples share is computed by other rules with one sample, or with each sample by itself.
    """
    ways = {} if way else job.kernels.ways
    steps = job.graph.form.fact(
        ("signature", *sorted(ways.items())), lambda: _steps(job.graph, ways)
    )
    goals = tuple((*g.part, g.target.per_sample) for g in job.goals)
    apart = job.count > 1 and not all(g.target.per_sample for g in job.goals)
    routes = tuple((part, choice.route) for part, choice in job.choices.items())
    how = (routes, job.singly is not None, apart, job.problem.coupling, job.problem.create_graph)
    return hash((steps, goals, how, way))


def _steps(graph: Graph, ways: Mapping[str, str]) -> int:
    """The part of a signature that the nodes, their wiring and their ways make up."""
    index = {step.node: k for k, step in enumerate(graph.steps)}
    steps: list[Any] = []
    for s in graph.steps:
        steps += (s.name, s.outputs[0].dtype, len(s.shape), ways.get(s.name), len(s.edges))
        for e in s.edges:
            steps += (None, None) if e is None else (index[e.node], e.slot)
    return hash(tuple(steps))


def vmap_agrees(problem: Problem) -> bool:
    """Whether a function of one sample is the same under ``torch.vmap`` as called on each sample.

    Some of torch's batching rules are wrong. A few samples, their values and one cotangent that
    differs between them tell, the first time a function is seen.
    """
    owner, key = _owner(problem), hash((_VMAP, getattr(problem.function, "__name__", None)))
    with contextlib.suppress(TypeError):
        if key in _trusted.get(owner, set()):
            return True
    found = []
    with torch.random.fork_rng([]):
        state = torch.get_rng_state()
        for vmapped in (True, False):
            with capture(replace(problem, vmapped=vmapped), slice(0, _FEW)) as captured:
                try:
                    found.append(_looked_at(captured))
                except RuntimeError:  # an operation without a derivative under vmap
                    return False
        if not torch.equal(state, torch.get_rng_state()):
            return False  # random numbers are drawn sample by sample, as a loop draws them
    fast, plain = found
    same = len(fast) == len(plain) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in zip(fast, plain, strict=True)
    )
    if same:
        with contextlib.suppress(TypeError):
            _trusted.setdefault(owner, set()).add(key)
    return same


def _looked_at(captured: Capture) -> list[Tensor]:
    """Values, and gradients of a cotangent that differs from sample to sample."""
    edges = list(captured.inputs)
    found = []
    for y in captured.outputs.values():
        found.append(y.detach())
        if y.requires_grad and edges:
            weights = torch.linspace(0, 1, y.numel(), dtype=y.dtype, device=y.device)
            cotangent = weights.cos().reshape(y.shape)
            grads = pull(y, edges, cotangent)
            found += [torch.zeros(()) if g is None else g for g in grads]
    return found


def trusted(job: Job, way: str = "") -> bool:
    """Whether this function's graph has been compared before, gone through in this way."""
    try:
        return signature(job, way) in _trusted.get(_owner(job.problem), set())
    except TypeError:  # the function cannot be referred to weakly
        return False


def trust(job: Job, way: str = "") -> None:
    """Remember that this function's graph was compared, or found to need the engine."""
    with contextlib.suppress(TypeError):
        _trusted.setdefault(_owner(job.problem), set()).add(signature(job, way))


@unrounded()
def agrees(job: Job, sinks: dict[Any, Sink]) -> bool | None:
    """Whether a random combination of the rows equals one ``autograd.grad``; None if unknowable."""
    goals = [g for g in job.goals if g not in job.unreached]
    if (
        not goals
        or not job.seeds.width
        or job.problem.coupling == "frozen"
        or not job.y.requires_grad
    ):
        return None
    weights = _weights(job)
    cotangent = job.seeds.combined(weights)
    expected = pull(job.y, [g.edge for g in goals], cotangent)
    pairs = [
        (_contracted(job, g, sinks[g.part], weights), e)
        for g, e in zip(goals, expected, strict=True)
        if e is not None
    ]
    most = tolerance(job)
    if any(_differ_in_kind(ours, theirs) for ours, theirs in pairs):
        return _first_row_agrees(job, goals, sinks, most)
    if all(_off(ours, theirs) <= most * _size(theirs) for ours, theirs in pairs):
        return True
    rest = noise(job, cotangent)
    return all(_off(ours, theirs) <= most * _size(theirs) + rest for ours, theirs in pairs)


def noise(job: Job, cotangent: Tensor) -> float:
    """What gradients that cancel (a sum over a normalised axis) may hold of what was cancelled."""
    return 0.01 * tolerance(job) * _largest(job, cotangent.detach())


def _differ_in_kind(ours: Tensor, theirs: Tensor) -> bool:
    """Whether one is a number where the other is infinite or NaN."""
    return not torch.equal(ours.isfinite(), theirs.isfinite())


def _first_row_agrees(
    job: Job, goals: list[Goal], sinks: dict[Any, Sink], tolerance: float
) -> bool:
    """The first row itself: a combination of rows may be NaN where no row is, and the reverse."""
    if job.seeds.across or any(not g.target.per_sample for g in goals):
        return True
    cotangent = job.seeds.block(0, 1).full()[0]
    expected = pull(job.y, [g.edge for g in goals], cotangent)
    rows = [sinks[g.part].chunk(job.samples)[:, 0].detach() for g in goals]
    return all(
        not _differ_in_kind(ours, theirs) and _off(ours, theirs) <= tolerance * _size(theirs)
        for ours, theirs in zip(rows, expected, strict=True)
        if theirs is not None
    )


def _largest(job: Job, cotangent: Tensor) -> float:
    """The largest entry of any gradient on the way from ``y`` to the goals."""
    edges = [
        GradientEdge(step.node, k) for step in job.graph.steps for k in range(len(step.outputs))
    ]
    grads = pull(job.y, edges, cotangent)
    return max((_size(g) for g in grads if g is not None), default=0.0)


def _weights(job: Job) -> Tensor:
    """One random number per sample and row; the same for all samples where they are summed."""
    generator = torch.Generator().manual_seed(0)
    n = 1 if job.problem.coupling == "sum" else job.count
    w = torch.randn(n, job.seeds.width, generator=generator, dtype=torch.float64)
    return w.expand(job.count, -1).to(job.y.device, job.y.dtype)


def _contracted(job: Job, goal: Goal, sink: Sink, weights: Tensor) -> Tensor:
    """``sum_v w[n,v] J[n,v,...]``, over samples too where all of them share what is derived by."""
    j = sink.chunk(job.samples).detach()
    w = weights.to(j.dtype)
    if goal.target.per_sample and not job.seeds.across:
        return torch.einsum("nv,nv...->n...", w, j)
    return torch.einsum("nv,nv...->...", w, j)


def tolerance(job: Job) -> float:
    """The error, as a share of the largest entry, that rounding in this graph explains."""
    dtypes = {m.dtype for step in job.graph.steps for m in step.outputs}
    return max((_ROOT_EPS.get(d, 1e-3) for d in dtypes), default=1e-3)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two values of one function differ by rounding alone."""
    return near(ours, theirs, _ROOT_EPS.get(ours.dtype, 1e-3))


def near(ours: Tensor, theirs: Tensor, most: float, beside: float = 0.0) -> bool:
    """Whether two tensors differ by at most this share of the largest entry, and this beside it."""
    if _differ_in_kind(ours, theirs):
        return False
    return _off(ours, theirs) <= most * _size(theirs) + beside


@torch.no_grad()  # a script's own backward returns gradients with a history
def _off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference where both are finite."""
    finite = ours.isfinite() & theirs.isfinite()
    return float((ours - theirs)[finite].abs().max()) if finite.any() else 0.0


@torch.no_grad()
def _size(tensor: Tensor) -> float:
    """The largest finite entry."""
    return float(tensor.nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0
