"""What a call would do, from one forward and no walk; and the same call again on other inputs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac import chosen, cost, memory
from batchjac.capture import Capture, capture
from batchjac.choose import staged
from batchjac.chosen import Pushed
from batchjac.cost import Rates
from batchjac.engines.sweep import Kernels
from batchjac.errors import MismatchError
from batchjac.graph import let_go, taken_apart
from batchjac.job import Goal, Job, jobs
from batchjac.memory import Chunk
from batchjac.plan import Plan, Prediction
from batchjac.problem import Problem, pose
from batchjac.recompute import answer
from batchjac.route import Chain, Forward, Route, Up, passes, span
from batchjac.rules import registry
from batchjac.sink import size
from batchjac.state import untouched
from batchjac.tree import Tree
from batchjac.work import need, reasons, units, width


@dataclass(frozen=True)
class Planned:
    """A question about a function, its plan, and what its inputs must look like.

    Print it, or call it with inputs of the same kind: ``planned(x)`` is ``jacobian`` of the same
    function with the same options, in the chunks that were planned.
    """

    plan: Plan
    function: Any
    options: Mapping[str, Any]
    max_memory: int | str | None
    kinds: tuple[str, ...]  # of each input

    def __call__(self, inputs: Any, *, out: Any = None) -> Any:
        """The Jacobian at these inputs.

        Raises:
            MismatchError: The inputs differ from those that were planned for; one line for each
                field. The number of samples may be smaller or larger.
        """
        problem = pose(self.function, inputs, **self.options)
        self._check(kinds(problem.tree))
        # of more samples the result is larger, so that the chunks must be found anew
        more = problem.samples > self.plan.batch or (out is None) == self.plan.mapped
        fixed = None if more else Chunk(self.plan.samples, self.plan.rows)
        return answer(problem, self.max_memory, out, fixed).jacobian

    def _check(self, came: Sequence[str]) -> None:
        planned, given = dict(map(_named, self.kinds)), dict(map(_named, came))
        lines = [
            f"  inputs{path}: planned {planned.get(path, 'nothing')}, got "
            f"{given.get(path, 'nothing')}"
            for path in {**planned, **given}
            if planned.get(path) != given.get(path)
        ]
        if lines:
            raise MismatchError(
                "the inputs do not match the plan; make one for them with batchjac.plan:\n"
                + "\n".join(lines)
            )

    def __str__(self) -> str:
        return str(self.plan)


def kinds(tree: Tree) -> tuple[str, ...]:
    """What each input is, but for the number of samples: ``path: shape of one, dtype, device``."""
    found = []
    for path, leaf in zip(tree.paths, tree.leaves, strict=True):
        kind = type(leaf).__name__
        if isinstance(leaf, Tensor):
            kind = f"[N{''.join(f', {n}' for n in leaf.shape[1:])}] {leaf.dtype} on {leaf.device}"
        found.append(f"{path}\t{kind}")
    return tuple(found)


def _named(kind: str) -> tuple[str, str]:
    path, _, said = kind.partition("\t")
    return path, said


def sketch(problem: Problem, max_memory: int | str | None, mapped: bool = False) -> Plan:
    """The plan of a question; ``mapped``: the caller brings the memory of the result."""
    tensors = [t for t in problem.tree.leaves if isinstance(t, Tensor)]
    allowed = memory.budget(max_memory, tensors[0].device)
    told, n = max_memory is not None, problem.samples
    with untouched(problem.module) as restore, taken_apart(restore):
        if problem.coupling == "error":
            n = memory.first(tensors, problem.module, n, allowed, told)
        with capture(problem, slice(0, n)) as captured:
            plan = _plan(problem, captured, allowed, mapped)
        let_go(restore)
    return plan


def _plan(problem: Problem, captured: Capture, allowed: int, mapped: bool) -> Plan:
    kernels, n = Kernels(), problem.samples
    work = jobs(problem, captured, slice(0, captured.samples), kernels)
    goals = [(job, goal) for job in work for goal in job.goals]
    results = sum(size(job.shape(goal), goal.target.dtype) for job, goal in goals)
    each, result = need(work, captured.samples), 0 if mapped else results
    whole = problem.coupling != "error"
    chunk = memory.chunk(each, n, units(work), allowed, result, whole)
    singly = all(job.singly for job in work)
    for job in work:
        if job.singly:
            continue
        for step in job.graph.steps:
            if any(step.edges):
                kernels.took(step.name, "vmap" if registry.find(step) is None else "rule")
    used = chunk.samples * (each.saved + chunk.rows * each.live)
    return Plan(
        samples=chunk.samples, batch=n, rows=chunk.rows, width=width(work),
        engine="rows" if captured.hooked or singly else "walk",
        independence=_independence(problem, work), kernels=kernels.ways,
        directions=reasons(work),
        axes=tuple(_axes(problem, job, goal, captured) for job, goal in goals),
        # hooks see one row of one sample at a time, whose time nobody knows
        prediction=None if captured.hooked
        else _prediction(problem, work, captured.samples, chunk, results, result + used),
        mapped=mapped,
        compiled=("when called, at the first inputs of a kind",) if problem.compiler else (),
        chosen=() if captured.hooked
        else chosen.lines(node for job in work for node in _nodes(job, chunk, captured.samples)),
    )  # fmt: skip


def _independence(problem: Problem, work: Sequence[Job]) -> str:
    if problem.coupling in ("sum", "full"):
        return "not asked"
    if problem.samples == 1:
        return "one sample"
    reached = [job for job in work if job.root is not None]
    if all(job.proof.holds(job.witnesses) for job in reached):
        return "proved from the graph"
    return "to be probed: a node on the way makes no claim"


def _axes(problem: Problem, job: Job, goal: Goal, captured: Capture) -> str:
    """``1797 samples x 10 outputs x 1 x 32 x 32 inputs``, and what is meant by either."""
    inner = goal.target.shape[1:] if goal.target.per_sample else goal.target.shape
    out = " x ".join(map(str, job.seeds.shape)) or "1"
    into = " x ".join(map(str, inner)) or "1"
    again = f" x {problem.samples} samples" if problem.coupling == "full" else ""
    path = captured.values.paths[goal.part[0]]
    by = f"{goal.part[1]}{goal.target.path}"
    said = f"{problem.samples} samples x {out} outputs{again} x {into} inputs"
    return f"{said}   output{path} by {by}" if path or by != "inputs" else said


def _prediction(
    problem: Problem, work: Sequence[Job], captured: int, chunk: Chunk, results: int, held: int
) -> Prediction:
    """Seconds from shapes and rates; the function's own forward is not among them."""
    n = problem.samples
    rates = cost.rates(torch.get_num_threads())
    seconds = naive = limit = cost.written(results, rates)
    operations = rows = columns = 0
    asked = math.ceil(n / chunk.samples)
    for job in work:
        if job.root is None:
            continue
        seconds += asked * cost.asked(len(job.graph.steps), rates)
        nodes = cost.work(job.graph.steps, captured)
        width = job.seeds.rows
        once = cost.seconds(nodes, 1, n, rates)
        naive += width * once
        if job.singly:
            seconds += n / captured * job.singly.engine
            operations += round(n * width * nodes.multiply_adds)
            rows += width
        elif job.plain:
            left = [c.forecast.plain for c in job.considered.values() if not c.taken]
            walked = n / captured * max(left) if left else cost.seconds(nodes, width, n, rates)
            seconds += walked
            operations += round(n * width * nodes.multiply_adds)
            rows += width
        for choice in job.choices.values():
            done = passes(choice.route, choice.chain)
            seconds += choice.route.seconds * n / captured
            operations += n * (_pushed(choice.route, choice.chain) + done.multiply_adds)
            rows, columns = rows + done.rows, columns + done.columns
    limit += operations / _peak(rates)
    return Prediction(rows, columns, operations, held, seconds, naive, min(1.0, limit / seconds))


def _pushed(route: Route, chain: Chain) -> int:
    """Multiply-adds of one sample in the rows and columns that a route pushes, joins aside."""
    total = 0.0
    for node in route:
        up = isinstance(node, Forward | Up)
        count = chain.widths[node.lower] if up else chain.height(node.upper)
        total += count * sum(chain.stages[k].work.multiply_adds for k in span(node))
    return round(total)


def _nodes(job: Job, chunk: Chunk, captured: int) -> Iterator[Pushed]:
    """Each node that something is pushed through, and how."""
    samples = min(chunk.samples, job.problem.samples)
    if job.root is not None and job.plain:
        shared = job.seeds.entries.dim() == 1  # rows that are still the same for all samples
        for step in job.graph.steps:
            images = chunk.rows * (1 if shared else samples)
            yield Pushed(step, False, images, captured)
            shared = shared and (cost.constant(step) or not any(step.edges))
    for choice in job.choices.values():
        stages = staged(job.graph, choice.cuts)
        for node in choice.route:
            up = isinstance(node, Forward | Up)
            width = choice.chain.widths[node.lower] if up else choice.chain.height(node.upper)
            images = min(chunk.rows, width) * samples
            yield from (Pushed(s, up, images, captured) for k in span(node) for s in stages[k])


def _peak(rates: Rates) -> float:
    """The most multiply-adds a second that any kernel was measured to do."""
    return max(rates.product, rates.convolution, rates.transposed, math.ulp(1.0))
