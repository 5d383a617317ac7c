"""The loop over chunks of samples: capture, check, fill; smaller again when memory runs out."""

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchjac import coupling, history, memory, verify
from batchjac.answer import Part, nest
from batchjac.aside import aside
from batchjac.capture import Capture, capture, without_graph
from batchjac.engines.compiled import Compiler
from batchjac.engines.mixed import NoRoute
from batchjac.engines.sweep import Kernels
from batchjac.errors import (
    BatchjacError,
    BudgetError,
    CouplingError,
    OutError,
    UnsupportedError,
    is_out_of_memory,
)
from batchjac.graph import let_go, taken_apart
from batchjac.independence import prove
from batchjac.job import Goal, Job, jobs
from batchjac.memory import Chunk
from batchjac.plan import Plan
from batchjac.problem import Problem, without_routes
from batchjac.sink import Collected, Preallocated, Sink, size, writable
from batchjac.solution import Solution, kept
from batchjac.stand_in import count_nan
from batchjac.state import redrawing, untouched
from batchjac.tree import Tree
from batchjac.work import need, reasons, units, width

log = logging.getLogger("batchjac")


def solve(
    problem: Problem,
    max_memory: int | str | None,
    out: Any,
    fixed: Chunk | None = None,
    valued: bool = False,
) -> Solution:
    """The Jacobian of a posed problem, its value if ``valued``; ``fixed`` chunks are for tests."""
    return aside(lambda: _solve(problem, max_memory, out, fixed, valued))


def _solve(
    problem: Problem, max_memory: int | str | None, out: Any, fixed: Chunk | None, valued: bool
) -> Solution:
    if out is not None and problem.create_graph:
        raise OutError("out= and create_graph=True exclude each other: a history needs new tensors")
    device = next(t.device for t in problem.tree.leaves if isinstance(t, Tensor))
    allowed = memory.budget(max_memory, device)
    if problem.around is contextlib.nullcontext:  # no chunk of a call that has looked already
        count_nan(problem)
    with untouched(problem.module) as restore, taken_apart(restore):
        if not problem.batched and not verify.vmap_agrees(problem):
            problem = replace(problem, vmapped=False)
        given = (allowed, max_memory is not None, out, fixed, valued, restore)
        run = _Run(problem, *given)
        try:
            return run.answer()
        except CouplingError:
            if problem.batched or not problem.vmapped:
                raise
        # one sample at a time there is nothing to couple: vmap did it (torch.roll of a scalar)
        plain = replace(problem, vmapped=False)
        return _Run(plain, *given).answer()


@dataclass
class _Run:
    """What one call has so far."""

    problem: Problem
    allowed: int
    told: bool  # the caller set the budget
    out: Any
    fixed: Chunk | None
    valued: bool  # the value is part of the answer
    restore: Callable[[], None]  # every forward finds the module as the first did
    sinks: dict[Part, Sink] = field(default_factory=dict)
    kernels: Kernels = field(default_factory=Kernels)
    values: list[tuple[int, Tree]] = field(default_factory=list)  # samples, and what f gave
    skeleton: Capture | None = None
    chunk: Chunk = field(default_factory=lambda: Chunk(0, 0))
    most: Chunk = field(default_factory=lambda: Chunk(1 << 62, 1 << 62))  # since memory ran out
    result: int = 0  # bytes, unless the caller brought the memory
    heap: memory.Heap = field(default_factory=memory.Heap)
    by_engine: bool = False  # rows go one at a time through autograd, hooks and all
    ran: bool = False  # the function was called, which may have changed its module
    checked: bool = False  # a chunk of at least two samples was looked at
    independence: str = "not asked"
    rows: int = 0  # of the last walk
    width: int = 1  # rows of one sample
    need: memory.Need | None = None  # of the present capture
    units: int = 1  # of the same: rows, or columns, that could go together
    directions: tuple[str, ...] = ()
    singly: bool = False  # every row by itself through autograd, since that is faster
    compared: coupling.Values = field(init=False)
    compiler: Compiler = field(init=False)

    def __post_init__(self) -> None:
        self.compiler = Compiler(self.problem.compiler)
        self.compared = coupling.Values(self.problem, self.restore)

    @property
    def whole(self) -> bool:
        """Samples stay together: their coupling is part of the answer."""
        return self.problem.coupling != "error"

    def answer(self) -> Solution:
        """All chunks of samples, then the nested result."""
        start, n = 0, self.problem.samples
        self.chunk = self._first()
        while start < n:
            stop = min(n, start + self.chunk.samples)
            try:
                done = self._part(slice(start, stop))
            except Exception as error:  # torch has no one class for memory that ran out
                if not is_out_of_memory(error):
                    raise
                done = False
                self._shrink(stop - start, error)
                gc.collect()
            if done:
                start = stop
                self._across(stop)
            let_go(self.restore)
        self._report()
        assert self.skeleton is not None
        j = nest(self.problem, self.skeleton, lambda p: self.sinks[p].result())
        return Solution(self.values, j)

    def _shrink(self, samples: int, error: Exception) -> None:
        """Half the samples, else half the rows, after memory ran out; so there is an end of it."""
        smaller = samples <= self.most.samples and self.rows <= self.most.rows
        assert smaller, "no smaller than the last attempt"
        if samples > 1 and not self.whole:
            log.warning("out of memory with %d samples at a time; trying half", samples)
            self.most = replace(self.most, samples=samples // 2)
            self.chunk = replace(self.chunk, samples=samples // 2)
        elif self.rows > 1:
            log.warning("out of memory with %d rows at a time; trying half", self.rows)
            self.most = replace(self.most, rows=self.rows // 2)
        else:
            raise BudgetError(
                f"out of memory with {'the whole batch' if self.whole else 'one sample'} and one "
                "row at a time; free memory, use a smaller model or input, or another device"
            ) from error

    def _across(self, stop: int) -> None:
        """Compare values across the border before the chunk that ends at ``stop``."""
        if self.whole:
            return
        room = self.most.samples // 2  # less than what failed, if memory ran out
        if self.need is not None:
            fits = memory.spare(self.allowed, self.result) // max(1, self.need.saved)
            room = min(room, max(2, fits))
        try:
            self.compared.border(stop, self.values[-1][0], self.width, room)
        except Exception as error:  # as above; a look that does not fit is left out
            if not is_out_of_memory(error):
                raise

    def _first(self) -> Chunk:
        """The first chunk, before anything is known but the inputs."""
        n = self.problem.samples
        if self.fixed is not None:
            return replace(self.fixed, samples=n if self.whole else self.fixed.samples)
        if self.whole:
            return Chunk(n, 1 << 62)
        tensors = [t for t in self.problem.tree.leaves if isinstance(t, Tensor)]
        samples = memory.first(tensors, self.problem.module, n, self.allowed, self.told)
        return Chunk(samples, 1 << 62)

    def _part(self, samples: slice) -> bool:
        """One chunk of samples, from its forward to the sinks; False if it must be smaller."""
        if self.ran:
            self.restore()
        self.ran = True
        self.rows, self.need = 0, None  # fewer rows do not help a forward that runs out
        redraw = redrawing() if self.fixed else None  # who fixes chunks may compute them again
        with capture(self.problem, samples) as captured:
            try:
                return self._captured(samples, captured)
            except NoRoute as error:
                level = logging.WARNING if error.loud else logging.INFO
                log.log(level, "%s: rows now go in reverse", error)
                self.problem = replace(self.problem, mode="reverse")
                if redraw:
                    redraw()
                return False

    def _captured(self, samples: slice, captured: Capture) -> bool:
        if captured.hooked and not self.by_engine:
            log.info("hooks on gradients: rows go through autograd one at a time, so that they run")
            self.problem = without_routes(self.problem, "hooks on gradients")
            self.by_engine = True
        work = jobs(self.problem, captured, samples, self.kernels, self.compiler.walk)
        self.directions, self.width = reasons(work), width(work)
        self.singly = all(job.singly for job in work)
        here = self.chunk
        first = not self.sinks
        if first:
            self._allocate(captured, work)
        for job in work:
            for goal in job.goals:
                self.sinks[goal.part].same(job.shape(goal), job.path)
            if self.by_engine:
                self._engage(job)
            self._walk(job, captured, partial(self._check, job, captured))
        if self.fixed is None:
            if first:
                best = self._chunk(work, captured, self.problem.samples, self.whole)
                self.chunk = replace(best, samples=min(best.samples, self.most.samples))
            try:
                here = self._chunk(work, captured, captured.samples, whole=True)
            except BudgetError:
                if self.whole or captured.samples == 1:
                    raise
                fewer = min(self.chunk.samples, captured.samples // 2)
                self.chunk = replace(self.chunk, samples=fewer)
                return False
        self.rows = min(here.rows, self.most.rows)
        # a chunk that comes once is not worth compiling
        self.compiler.patient = captured.samples < self.problem.samples or self.rows < self.width
        for job in work:
            self._fill(job, captured, self.rows)
        values = kept(captured.values, self.valued, self.problem.create_graph)
        self.values.append((captured.samples, values))
        if captured.samples < self.problem.samples and not self.whole:
            self.compared.keep(captured.outputs)
            if len(self.values) == 1:
                self.compared.half(captured.samples, captured.outputs)
        return True

    def _chunk(self, work: Sequence[Job], captured: Capture, samples: int, whole: bool) -> Chunk:
        """The largest chunk of so many samples that keeps the promise."""
        if self.need is None:
            self.need, self.units = need(work, captured.samples), units(work)
        try:
            return memory.chunk(self.need, samples, self.units, self.allowed, self.result, whole)
        except BudgetError as error:
            tight = self.whole or not whole or captured.samples == 1
            if tight and any(job.choices for job in work):
                raise NoRoute("max_memory does not hold the Jacobians on the way") from error
            raise

    def _allocate(self, captured: Capture, work: Sequence[Job]) -> None:
        """The sinks, once the first capture has shown the shapes."""
        self.skeleton = without_graph(captured)
        goals = [(job, goal) for job in work for goal in job.goals]
        if self.out is not None and len(goals) != 1:
            raise OutError(
                f"out= takes one Jacobian, but this question has {len(goals)} (several outputs, "
                "inputs, layers or parameters); ask for one of them, or leave out= away"
            )
        shapes = [job.shape(goal) for job, goal in goals]
        own = [size(s, g.target.dtype) for s, (_, g) in zip(shapes, goals, strict=True)]
        self.result = 0 if self.out is not None else sum(own)
        if self.valued:  # in chunks, and joined
            each = sum(y.nbytes for y in captured.outputs.values()) // captured.samples
            self.result += 2 * self.problem.samples * each
        if self.problem.create_graph and self.told:
            each = history.history(work, captured.samples)
            history.check(each, self.problem.samples, self.allowed, sum(own))
            self.allowed = 1 << 62  # chunks would only add small blocks to what stays
        self.heap.allow(self.allowed - self.result)
        if self.fixed is None:
            self._chunk(
                work, captured, self.problem.samples, self.whole
            )  # an error before memory is taken
        for shape, (job, goal) in zip(shapes, goals, strict=True):
            self.sinks[goal.part] = self._sink(shape, job, goal)

    def _sink(self, shape: tuple[int, ...], job: Job, goal: Goal) -> Sink:
        rows, target = job.seeds.width, goal.target
        if self.problem.create_graph and 0 not in shape:
            return Collected(shape, rows)
        if self.out is not None:
            tensor = writable(self.out, shape, target.dtype, target.device)
        else:
            tensor = torch.empty(shape, dtype=target.dtype, device=target.device)
        inner = shape[1 + len(job.seeds.shape) :]
        # memory that the caller brought may lie in a file
        width = 0 if self.out is not None else tensor.element_size()
        heap = self.heap  # and not self, which holds the sinks
        return Preallocated(shape, rows, inner, tensor, lambda entries: heap.wrote(width * entries))

    def _check(self, job: Job, captured: Capture) -> None:
        """Refuse coupled samples, unless the question says what to do with them."""
        if self.problem.coupling in ("sum", "full"):
            return
        if self.problem.samples == 1 or job.root is None:
            return
        if captured.samples == 1 and not self.checked:
            pair = slice(0, 2)  # one sample alone shows nothing
            with capture(self.problem, pair) as again:
                for other in jobs(self.problem, again, pair, self.kernels):
                    self._check(other, again)
            return
        self.checked = True
        targets = job.witnesses
        own = all(g.target.per_sample for g in job.goals)
        graph = job.graph if own else job.towards(targets)
        proof = job.proof if own else prove(graph, job.y)
        if captured.samples == 1:
            return
        if proof.holds(targets) and not self.by_engine:
            self.independence = "proved from the graph"
            return
        self.independence = "probed"
        coupling.probe(job, captured, graph, proof, self.by_engine)

    def _distrust(self, job: Job, captured: Capture, reason: str) -> None:
        """From here on rows go one at a time through autograd, whose hooks then run."""
        log.warning("%s: rows now go through autograd one at a time", reason)
        self._engage(job)
        self._check(job, captured)

    def _engage(self, job: Job) -> None:
        self.by_engine = True
        if any(step.name.endswith(":frozen") for step in job.graph.steps):
            raise UnsupportedError(
                'coupling="frozen" holds statistics constant in the walk, but this function needs '
                "autograd's own engine (it hooks gradients, or the walk failed on it); call "
                "model.eval(), or remove the hooks"
            )

    def _walk(self, job: Job, captured: Capture, act: Callable[[], None]) -> None:
        """Do something that walks; where the walk fails, do it again by the engine."""
        try:
            act()
        except Exception as error:  # whatever a node raises: autograd's engine decides
            ours = isinstance(error, BatchjacError | NoRoute) or is_out_of_memory(error)
            if self.by_engine or ours:
                raise
            self._distrust(job, captured, f"the walk failed ({type(error).__name__}: {error})")
            act()

    def _fill(self, job: Job, captured: Capture, rows: int) -> None:
        if job.unreached and not self.values:
            for goal in job.unreached:
                log.warning(
                    "output%s does not depend on %s%s: its Jacobian is zero",
                    self._path(goal), goal.part[1], goal.target.path,
                )  # fmt: skip
        self._walk(job, captured, lambda: job.fill(self.sinks, rows, self.by_engine))
        if self.by_engine or verify.trusted(job):
            return
        if verify.agrees(job, self.sinks) is False:
            if job.choices:
                raise NoRoute("autograd and the chosen directions disagree", loud=True)
            reason = (
                "the walk and autograd disagree on this function (a hook that changes gradients, "
                "or a node whose rule is wrong)"
            )
            self._distrust(job, captured, reason)
            job.fill(self.sinks, rows, self.by_engine)
            return
        verify.trust(job)

    def _path(self, goal: Goal) -> str:
        assert self.skeleton is not None
        return self.skeleton.values.paths[goal.part[0]]

    def _report(self) -> None:
        if self.kernels.slow:
            listed = ", ".join(f"{name} ({way})" for name, way in self.kernels.slow.items())
            log.info("nodes without a rule, called themselves: %s", listed)
        self.compiler.report(self.by_engine)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("plan\n%s", self.plan())

    def plan(self) -> Plan:
        """How this call was computed."""
        n, width = self.problem.samples, max((s.rows for s in self.sinks.values()), default=0)
        return Plan(
            samples=min(self.chunk.samples, n), batch=n, rows=min(self.rows, width), width=width,
            engine="rows" if self.by_engine or self.singly else "walk",
            independence=self.independence, kernels=self.kernels.ways,
            directions=self.directions,
            compiled=self.compiler.lines,
        )  # fmt: skip
