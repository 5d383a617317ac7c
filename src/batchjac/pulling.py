"""One forward, kept, and rows through it: all at once by the walk, one by autograd's engine.

Law: ``pull(u)`` is ``Jᵀ u``, with J as ``engines/reference.py`` gives it. The first rows on a graph
are compared with one backward of autograd's engine. What does not agree goes another way, which is
slower and right.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from batchjac import memory, verify
from batchjac.block import Block, dense
from batchjac.capture import Capture, Target, again
from batchjac.engines.rows import pull
from batchjac.engines.rows import rows as engine_rows
from batchjac.errors import BatchjacError, StateError, UnsupportedError, is_out_of_memory
from batchjac.graph import DEEP, Edge, Slot, hold, let_go
from batchjac.job import Job
from batchjac.plain import unrounded
from batchjac.problem import Problem
from batchjac.samples import SHARED, Place
from batchjac.state import untouched

log = logging.getLogger("batchjac")

Blocks = Sequence[Block]


@dataclass
class Pulling:
    """Jobs of one capture, one for each output, all toward the same targets in the same order."""

    problem: Problem
    samples: slice
    captured: Capture
    work: list[Job]
    room: int  # bytes that blocks may take
    by_engine: bool = False  # rows go one at a time through autograd, hooks and all
    need: memory.Need = field(init=False)
    roots: list[torch.autograd.graph.Node] = field(init=False)  # if there are very many below them

    def __post_init__(self) -> None:
        self.need = _need(self.work, self.captured.samples)
        deep = self.captured.nodes > DEEP
        ys = self.captured.outputs.values() if deep else ()
        self.roots = [y.grad_fn for y in ys if y.grad_fn is not None]

    @property
    def targets(self) -> list[Target]:
        """What is differentiated by, in the order of every job's goals."""
        return [goal.target for goal in self.work[0].goals]

    @property
    def at_once(self) -> int:
        """How many rows or columns go together: as many as there is room for."""
        count, targets = self.captured.samples, self.targets
        shared = sum(math.prod(t.shape) * t.dtype.itemsize for t in targets if not t.per_sample)
        row = count * self.need.live + math.ceil(memory.WALK * shared)
        fitting = (self.room - count * self.need.saved) // row
        return max(1, min(fitting, memory.BLOCK // (count * self.need.widest)))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The function's flags as in its forward, for what its graph may run again."""
        with untouched(self.problem.module), again(self.problem, self.captured), unrounded():
            try:
                yield
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise StateError(
                    "a parameter, buffer or input was overwritten since the forward was recorded, "
                    f"and its old value is gone ({str(error).split('; expected')[0]}); call "
                    "batchjac.operator again"
                ) from error

    def pull(self, cotangents: Blocks) -> list[Block]:
        """Rows ``[K, N, *out]``, one block for each output, to every target: ``Jᵀ u``."""
        return in_turns(self._pull, cotangents, self.at_once)

    def _pull(self, cotangents: Blocks) -> list[Block]:
        if not self.by_engine:
            one = cotangents[0].rows == 1 and self.problem.coupling != "frozen"
            found = self._one_row(cotangents) if one else self._all_rows(cotangents)
            if found is not None:
                return found
        return self._combined(cotangents)

    def _all_rows(self, cotangents: Blocks) -> list[Block] | None:
        """Walked from each output; None where that was found to be wrong."""
        total: list[Block | None] = [None] * len(self.targets)
        for job, block in zip(self.work, cotangents, strict=True):
            found = self._trusted_rows(job, block) if job.root is not None else total
            if found is None:
                return None
            for k, part in enumerate(found):
                before = total[k]
                if part is not None and part is not before:
                    total[k] = part if before is None else before.plus(part)
        rows = cotangents[0].rows
        return [b or _zeros(t, rows) for b, t in zip(total, self.targets, strict=True)]

    def _one_row(self, cotangents: Blocks) -> list[Block] | None:
        """One row through autograd's own engine, from all outputs together.

        None where it is not linear in the cotangents: a hook or a Function that clips gradients has
        rows, by definition those of the identity, but no products.
        """
        rows = [block.full()[0] for block in cotangents]
        found = self._engine(rows, self.problem.create_graph)
        if not all(verify.trusted(job, "linear") for job in self.work):
            generator = torch.Generator().manual_seed(3)
            more = [torch.randn(c.shape, generator=generator, dtype=torch.float64).to(c)
                    for c in rows]  # fmt: skip
            other, both = (
                self._engine(given, False)
                for given in (more, [a.detach() + b for a, b in zip(rows, more, strict=True)])
            )
            most = max(verify.tolerance(job) for job in self.work)
            for one, two, sum_of in zip(found, other, both, strict=True):
                if one is not None and two is not None and sum_of is not None:
                    size = one.detach().abs() + two.abs()
                    off = (one.detach() + two - sum_of).abs()
                    limit = most * _largest(size)
                    if size.isfinite().all() and not (off <= limit).all():
                        jobs = zip(self.work, rows, strict=True)
                        limit += max(verify.noise(job, row) for job, row in jobs if job.root)
                        if not (off <= limit).all():
                            self.distrust("gradients are not linear in the cotangents")
                            return None
            for job in self.work:
                verify.trust(job, "linear")
        return [
            _zeros(t, 1) if g is None else Block(g.unsqueeze(0), t.shape)
            for g, t in zip(found, self.targets, strict=True)
        ]

    def _engine(self, cotangents: Sequence[Tensor], history: bool) -> list[Tensor | None]:
        pairs = [
            (job.y, c) for job, c in zip(self.work, cotangents, strict=True) if job.y.requires_grad
        ]
        if not pairs:
            return [None] * len(self.targets)
        edges = [_edge(t) for t in self.targets]
        with torch.enable_grad():
            total = torch.stack([(y * c).sum().to(pairs[0][0].dtype) for y, c in pairs]).sum()
        found = torch.autograd.grad(
            total, edges, retain_graph=True, create_graph=history, allow_unused=True
        )
        return [g if g is None else dense(g) for g in found]

    def _trusted_rows(self, job: Job, block: Block) -> list[Block | None] | None:
        """All rows of one output, walked, and compared with autograd the first time."""
        try:
            found = self.walked(job, block)
        except Exception as error:  # whatever a node raises: autograd's engine decides
            if isinstance(error, BatchjacError) or is_out_of_memory(error):
                raise
            self.distrust(f"the walk failed ({type(error).__name__}: {error})")
            return None
        if self._agrees(job, block, found):
            return found
        self.distrust("the walk and autograd disagree on this function")
        return None

    def identity(self, job: Job, across: bool) -> Iterator[tuple[int, list[Block | None]]]:
        """All rows of the identity on one output, a few at a time: the first, and the blocks."""
        n, width = job.y.shape[0], job.y[0].numel()
        rows = n * width if across else width
        for start in range(0, rows, self.at_once):
            seeds = _identity(job.y, start, min(rows, start + self.at_once), across)
            found = None if self.by_engine else self._trusted_rows(job, seeds)
            if found is None:
                edges, history = [g.edge for g in job.goals], self.problem.create_graph
                slots = engine_rows(job.y, edges, seeds, history)
                found = [slots.get(goal.slot) for goal in job.goals]
            yield start, found

    def across(self, job: Job) -> bool:
        """Whether samples have to go one at a time to be told apart.

        What a hook does to a gradient may depend on all of it, so it sees one sample's at a time.
        """
        if not (self.by_engine or verify.trusted(job)):  # look before it is decided
            self._trusted_rows(job, _identity(job.y, 0, min(2, job.y[0].numel()), False))
        return (
            self.by_engine
            or self.problem.coupling == "full"
            or not all(t.per_sample for t in self.targets)
        )

    def _combined(self, cotangents: Blocks) -> list[Block]:
        """``sum_o u[n,o] J[n,o,i]``, each row of J made and dropped."""
        count = cotangents[0].rows
        total = [t.new_zeros(count, *t.shape[1:]) for t in
                 (_zeros(t, 1).full() for t in self.targets)]  # fmt: skip
        for job, block in zip(self.work, cotangents, strict=True):
            if job.root is None:
                continue
            u, across = flat(block), self.across(job)
            for start, found in self.identity(job, across):
                for k, part in enumerate(found):
                    if part is None:
                        continue
                    rows = part.full()
                    if across:
                        w = u.flatten(1)[:, start : start + len(rows)].to(rows.dtype)
                        total[k] = total[k] + torch.einsum("kr,r...->k...", w, rows)
                    else:
                        w = u[:, :, start : start + len(rows)].to(rows.dtype)
                        total[k] = total[k] + torch.einsum("knr,rn...->kn...", w, rows)
        return [Block(d, t.shape) for d, t in zip(total, self.targets, strict=True)]

    def walked(self, job: Job, block: Block) -> list[Block | None]:
        """Rows to every goal, by the walk."""
        assert job.root is not None
        history = self.problem.create_graph
        slots = job.walk(job.graph, {job.root: block}, job.kernels, None, history)
        return [slots.get(goal.slot) for goal in job.goals]

    def _agrees(self, job: Job, block: Block, found: Sequence[Block | None]) -> bool:
        """Whether a combination of the rows is what the engine gives for that of the cotangents."""
        if self.problem.coupling == "frozen" or not job.y.requires_grad or verify.trusted(job):
            return True
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(block.rows, generator=generator, dtype=torch.float64)
        for weights in (w, torch.eye(block.rows, 1, dtype=torch.float64)[:, 0]):
            cotangent = mixed(job.y, weights, block).detach()
            expected = pull(job.y, [g.edge for g in job.goals], cotangent)
            pairs = [
                (mixed(e, weights, f).detach(), e.detach())
                for f, e in zip(found, expected, strict=True)
                if f is not None and e is not None
            ]
            most = verify.tolerance(job)
            if all(verify.near(ours, theirs, most) for ours, theirs in pairs):
                verify.trust(job)
                return True
            rest = verify.noise(job, cotangent)
            if all(verify.near(ours, theirs, most, rest) for ours, theirs in pairs):
                verify.trust(job)
                return True
            if all(theirs.isfinite().all() for _, theirs in pairs):
                return False
        return False  # a mixture is NaN where no row is, so the first row alone was looked at

    def distrust(self, reason: str) -> None:
        """From here on rows are those of the identity, one at a time through autograd."""
        if self.problem.coupling == "frozen":
            raise UnsupportedError(
                f'{reason}, and coupling="frozen" holds statistics constant in the walk alone; '
                "call model.eval()"
            )
        log.warning("%s: rows now go through autograd one at a time", reason)
        self.by_engine = True

    def close(self) -> None:
        """Free the graph, from its outputs down where it is very deep."""
        if self.roots:
            hold(self.roots)
        self.work, self.roots = [], []
        del self.captured
        let_go(lambda: None)


def _need(work: Sequence[Job], samples: int) -> memory.Need:
    """Bytes for each sample, without rows toward what samples share, which count once."""
    graphs = []
    for job in work:
        if job.root is not None:
            places = job.proof.places
            steps = tuple(
                replace(step, edges=tuple(e if _own(e, places) else None for e in step.edges))
                for step in job.graph.steps
                if places.get((step.node, 0)) is not SHARED
            )
            graphs.append(replace(job.graph, steps=steps))
    return memory.need(graphs, samples)


def _own(edge: Edge | None, places: Mapping[Slot, Place]) -> bool:
    return edge is not None and places.get((edge.node, edge.slot)) is not SHARED


def in_turns(go: Callable[[Blocks], list[Block]], blocks: Blocks, step: int) -> list[Block]:
    """``go`` on so many columns at a time."""
    if blocks[0].rows <= step:
        return go(blocks)
    parts = [
        go([b.with_data(b.data[start : start + step]) for b in blocks])
        for start in range(0, blocks[0].rows, step)
    ]
    return [
        column[0].with_data(torch.cat([b.full() for b in column]))
        for column in zip(*parts, strict=True)
    ]


def _edge(target: Target) -> GradientEdge:
    assert target.edge is not None
    return target.edge


def _zeros(target: Target, rows: int) -> Block:
    zero = torch.zeros((), dtype=target.dtype, device=target.device)
    return Block(zero.expand(rows, *(1 for _ in target.shape)), target.shape)


def _largest(data: Tensor) -> float:
    return float(data.max()) if data.numel() else 0.0


def mixed(like: Tensor, weights: Tensor, block: Block) -> Tensor:
    """``sum_k w[k] block[k]``, dense, in the dtype of the block."""
    w = weights.to(like.device, block.data.dtype)
    return torch.einsum("k,k...->...", w, block.full())


def _identity(y: Tensor, start: int, stop: int, across: bool) -> Block:
    """Rows of the identity on ``y``, the same for all samples or through all of ``[N, out]``."""
    n, width = y.shape[0], y[0].numel()
    data = y.new_zeros(stop - start, n * width if across else width)
    data[torch.arange(stop - start, device=y.device), torch.arange(start, stop)] = 1
    return Block(data.reshape(stop - start, n if across else 1, *y.shape[1:]), tuple(y.shape))


def flat(block: Block) -> Tensor:
    """``[K, N, entries]``."""
    data = block.full()
    return data.flatten(2) if data.dim() > 2 else data.unsqueeze(2)
