"""One output of one recorded forward: its graph, its proof, its rows, into the sinks."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from batchjac import choose, pace
from batchjac.answer import Part, parts
from batchjac.block import Block
from batchjac.capture import Capture, Target
from batchjac.choose import Choice, choices, decline
from batchjac.engines.forward import NoForwardRule, NotFinite
from batchjac.engines.mixed import NoRoute, Way
from batchjac.engines.rows import pull
from batchjac.engines.rows import rows as engine_rows
from batchjac.engines.sweep import Kernels, NotPerSample, Walk, per_sample_ready, walk
from batchjac.errors import UnsupportedError, is_out_of_memory
from batchjac.graph import DEEP, Graph, Slot, hold, prune
from batchjac.independence import Proof, frozen, probe, prove
from batchjac.pace import Pace
from batchjac.plain import unrounded
from batchjac.problem import Problem
from batchjac.route import held
from batchjac.samples import SHARED
from batchjac.seeds import Seeds, seeds
from batchjac.sink import Sink
from batchjac.stand_in import Seen, not_finite, unseen


@dataclass(frozen=True)
class Goal:
    """A Jacobian of this output: its place in the answer and what it is differentiated by."""

    part: Part
    target: Target

    @property
    def edge(self) -> GradientEdge:
        """Where its rows arrive."""
        assert self.target.edge is not None
        return self.target.edge

    @property
    def slot(self) -> Slot:
        """The same, as the walk names it."""
        return (self.edge.node, self.edge.output_nr)


@dataclass(frozen=True)
class Job:
    """All rows of one output ``y``, toward every goal, for the samples of one capture.

    Rows are pushed *together*, the same for every sample, which needs independent samples. A
    parameter is shared by the samples, so its rows are kept per sample by the rules on the way;
    where one cannot, every sample is seeded *apart*, with as many times the rows.
    """

    problem: Problem
    index: int  # of y among the leaves of what f gave
    path: str  # of the same, for messages
    y: Tensor
    samples: slice
    goals: tuple[Goal, ...]
    inputs: tuple[Slot, ...]
    kernels: Kernels
    walk: Walk = walk  # of the rows of the answer

    @cached_property
    def seeds(self) -> Seeds:
        """The rows that are asked for."""
        problem = self.problem
        return seeds(self.y, problem.outputs, problem.coupling, self.samples, self.path)

    @cached_property
    def graph(self) -> Graph:
        """From ``y`` to all goals; batch statistics frozen when that was asked for."""
        return self.pruned(self.goals)

    @cached_property
    def proof(self) -> Proof:
        """Where the samples are along the way."""
        return prove(self.graph, self.y)

    @property
    def count(self) -> int:
        """Samples in this capture."""
        return int(self.y.shape[0])

    @property
    def root(self) -> Slot | None:
        """Where rows start; None when nothing was recorded."""
        return None if self.y.grad_fn is None else (self.y.grad_fn, self.y.output_nr)

    def pruned(self, goals: tuple[Goal, ...]) -> Graph:
        """The graph from ``y`` to these goals."""
        return self.towards([g.slot for g in goals])

    def towards(self, slots: list[Slot]) -> Graph:
        """The graph from ``y`` to these slots."""
        graph = prune([self.root[0]] if self.root else [], slots)
        if self.problem.coupling == "frozen" and graph.steps:
            # decided where the samples show, which parameters alone may not
            roots = [step.node for step in graph.steps[:1]]
            whole = frozen(prune(roots, [*slots, *self.witnesses]), self.y, self.mixes)
            names = {step.node: step.name for step in whole.steps}
            steps = tuple(replace(step, name=names[step.node]) for step in graph.steps)
            return replace(graph, steps=steps)
        return graph

    @property
    def witnesses(self) -> list[Slot]:
        """Where other samples would show: what has samples among the goals, else the inputs."""
        return [g.slot for g in self.goals if g.target.per_sample] or list(self.inputs)

    def mixes(self, graph: Graph) -> bool:
        """Whether samples reach each other along this graph, as far as NaN in them shows it."""
        seen = self.probe(graph)
        if seen.leaks or not seen.wholly.any():
            return seen.leaks
        return bool((seen.wholly & ~not_finite(self.problem, self.samples)).any())

    def probe(self, graph: Graph | None) -> Seen:
        """What reaches other samples along this graph; without one, by autograd's engine."""
        if not self.witnesses:
            return unseen(self.count)
        edges = [GradientEdge(node, slot) for node, slot in self.witnesses]

        def push(block: Block) -> dict[Slot, Block]:
            if graph is None:
                return engine_rows(self.y, edges, block)
            assert self.root is not None
            return walk(graph, {self.root: block}, self.kernels)

        return probe(self.y, self.witnesses, push)

    def shape(self, goal: Goal) -> tuple[int, ...]:
        """``[N, *out, *in]`` for all samples; with the full coupling ``[N, *out, N, *in]``."""
        inner = goal.target.shape
        if goal.target.per_sample and self.problem.coupling != "full":
            inner = inner[1:]
        return (self.problem.samples, *self.seeds.shape, *inner)

    @cached_property
    def unreached(self) -> list[Goal]:
        """The goals on which ``y`` does not depend."""
        return [g for g in self.goals if g.slot[0] not in self.graph.reaches]

    @cached_property
    def considered(self) -> dict[Part, Choice]:
        """The goals that a route of their own was looked for, and what was found."""
        coupled = self.problem.coupling in ("sum", "full")
        if self.root is None or coupled or self.problem.mode == "reverse":
            return {}
        gone = self.unreached
        targets = {
            g.part: choose.Target(g.slot, not g.target.per_sample)
            for g in self.goals
            if g not in gone
        }
        return choices(
            self.graph, self.root, targets, self.proof.places, self.seeds, self.problem.mode
        )

    @cached_property
    def choices(self) -> dict[Part, Choice]:
        """The goals that are not left to the plain walk, and the route to each."""
        considered = {} if self.singly else self.considered
        return {part: choice for part, choice in considered.items() if choice.taken}

    @cached_property
    def singly(self) -> Pace | None:
        """Why rows go one at a time through autograd's engine, if they do; None where they walk.

        All samples have their row at once, so this too assumes that they are independent.
        """
        problem = self.problem
        exact = problem.coupling != "frozen" and not problem.create_graph
        own = bool(self.goals) and all(g.target.per_sample for g in self.goals)
        if problem.mode != "auto" or problem.compiler or self.root is None or not (exact and own):
            return None
        routes = [c.route.seconds for c in self.considered.values() if c.taken]
        walked = len(routes) < len(self.goals) - len(self.unreached)
        return pace.singly(self.graph, self.seeds, math.inf if walked else sum(routes))

    @property
    def plain(self) -> tuple[Goal, ...]:
        """The goals of the plain walk."""
        return tuple(g for g in self.goals if g.part not in self.choices)

    @unrounded()
    def fill(self, sinks: dict[Part, Sink], rows: int, by_engine: bool = False) -> None:
        """Compute all rows, ``rows`` at a time, and put them into the sinks.

        Errors: ``NoRoute`` where a route was chosen that cannot be followed.
        """
        goals = self.goals
        if not by_engine and self.singly:
            self._one_by_one(sinks)
            return
        if not by_engine and self.choices:
            goals = self.plain
            for goal in self.goals:
                if goal.part in self.choices:
                    self._follow(sinks[goal.part], goal, self.choices[goal.part], rows)
        shared = tuple(g for g in goals if not g.target.per_sample)
        hooked = by_engine and self.problem.coupling != "sum"
        together = self.count == 1 or self.seeds.across or not (shared or hooked)
        if not together and not by_engine and self._kept_apart(shared):
            try:
                self._push(sinks, rows, self.seeds, goals, self.proof, by_engine)
                return
            except NotPerSample:
                pass  # every sample apart, below
        if together:
            self._push(sinks, rows, self.seeds, goals, None, by_engine)
            return
        # what a hook does to a gradient may depend on all of it, so it sees one sample's at a time
        own = () if by_engine else tuple(g for g in goals if g.target.per_sample)
        apart = goals if by_engine else shared
        self._push(sinks, rows, self.seeds, own, None, by_engine)
        self._push(sinks, rows, replace(self.seeds, across=True), apart, None, by_engine)

    def _one_by_one(self, sinks: dict[Part, Sink]) -> None:
        """Each row through autograd's engine, for all samples at once, into its place."""
        edges = [goal.edge for goal in self.goals]
        for row in range(self.seeds.rows):
            cotangent = self.seeds.block(row, row + 1).full()[0]
            try:
                found = pull(self.y, edges, cotangent)
            except Exception as error:  # the walk decides
                if is_out_of_memory(error):
                    raise
                reason = f"autograd's engine failed ({type(error).__name__}: {error})"
                raise NoRoute(reason, loud=True) from error
            for goal, data in zip(self.goals, found, strict=True):
                block = None if data is None else Block(data[None], tuple(data.shape))
                self._put(sinks[goal.part], goal, block, self.seeds, row, 1)

    def _follow(self, sink: Sink, goal: Goal, choice: Choice, units: int) -> None:
        """One goal by its own route, ``units`` rows or columns at a time."""
        way = Way(
            self.graph, choice.cuts, self.seeds, self.kernels, choice.places, choice.chain,
            units * held(choice.route, choice.chain).live, self.problem.create_graph, self.walk,
        )  # fmt: skip
        inner = goal.target.shape[1:] if goal.target.per_sample else goal.target.shape
        try:
            out = None if self.problem.create_graph else sink.part(self.samples)
            for piece in way.pieces(choice.route, out):
                if piece.placed:
                    sink.wrote(piece.data.numel())
                    continue
                data = piece.data.expand(self.count, -1, -1).to(goal.target.dtype)
                if data.shape[2] == math.prod(inner):
                    data = data.reshape(*data.shape[:2], *inner)
                    sink.put(self.samples.start, piece.row, data)
                else:
                    sink.put_columns(self.samples.start, piece.column, data)
        except NotFinite as error:
            raise NoRoute(str(error)) from error
        except (NoForwardRule, NotPerSample) as error:
            if self.problem.mode != "auto":
                raise UnsupportedError(
                    f'mode="{self.problem.mode}" has no rule for this case of node {error}; use '
                    'mode="auto"'
                ) from error
            decline(choice)
            raise NoRoute(f"no forward rule for this case of node {error}") from error
        except NoRoute:
            raise
        except Exception as error:  # the plain walk decides
            if self.problem.mode != "auto" or is_out_of_memory(error):
                raise
            reason = f"the chosen directions failed ({type(error).__name__}: {error})"
            raise NoRoute(reason, loud=True) from error

    def _kept_apart(self, shared: tuple[Goal, ...]) -> bool:
        """Whether one walk can give each sample its own gradient of what all samples share."""
        places = self.proof.places
        known = all(places.get(g.slot, SHARED) is SHARED for g in shared)
        return known and per_sample_ready(self.graph, places)

    def _push(
        self,
        sinks: dict[Part, Sink],
        rows: int,
        seeds: Seeds,
        goals: tuple[Goal, ...],
        proof: Proof | None,
        by_engine: bool,
    ) -> None:
        graph = self.graph if goals == self.goals else self.pruned(goals)
        create_graph = self.problem.create_graph
        for start in range(0, seeds.rows if goals else 0, rows):
            block = seeds.block(start, start + rows)
            found: dict[Slot, Block] = {}
            if self.root is not None and by_engine:
                found = engine_rows(self.y, [g.edge for g in goals], block, create_graph)
            elif self.root is not None:
                places = proof.places if proof else None
                found = self.walk(graph, {self.root: block}, self.kernels, places, create_graph)
            for goal in goals:
                self._put(sinks[goal.part], goal, found.get(goal.slot), seeds, start, block.rows)

    def _put(
        self, sink: Sink, goal: Goal, block: Block | None, seeds: Seeds, start: int, rows: int
    ) -> None:
        """Rows of one goal, as ``[samples, rows, *target]`` pieces."""
        first = self.samples.start
        kept = not goal.target.per_sample and not seeds.across  # rows and samples in one axis
        if block is None:
            block = _zeros(goal.target, rows * self.count if kept else rows)
        if seeds.across:  # row v of sample n is row n * width + v
            for row, data in enumerate(block.full(), start):
                n, v = divmod(row, seeds.width)
                own = goal.target.per_sample and self.problem.coupling != "full"
                sink.put(first + n, v, (data[n] if own else data)[None, None])
        elif kept:
            sink.put(first, start, block.full().unflatten(0, (rows, self.count)).transpose(0, 1))
        else:
            sink.put(first, start, block.full().transpose(0, 1))


def _zeros(target: Target, rows: int) -> Block:
    """No gradient arrived: zeros, without the memory for them."""
    zero = torch.zeros((), dtype=target.dtype, device=target.device)
    return Block(zero.expand(rows, *(1 for _ in target.shape)), target.shape)


def jobs(
    problem: Problem, captured: Capture, samples: slice, kernels: Kernels, walk: Walk = walk
) -> list[Job]:
    """One job for each differentiable output."""
    if captured.nodes > DEEP and not problem.create_graph:  # a history is for the caller to free
        hold([y.grad_fn for y in captured.outputs.values() if y.grad_fn is not None])
    inputs = tuple((edge.node, edge.output_nr) for edge in captured.inputs)
    paths = captured.values.paths
    found: dict[int, list[Goal]] = {index: [] for index in captured.outputs}
    for part, target in parts(captured):
        found[part[0]].append(Goal(part, target))
    return [
        Job(problem, k, paths[k], captured.outputs[k], samples, tuple(goals), inputs, kernels, walk)
        for k, goals in found.items()
    ]
