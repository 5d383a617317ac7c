"""One forward, kept, and products with its Jacobian in both directions.

Law: ``<u, push(v)> = <pull(u), v>``, which is looked at the first time tangents go some way on a
graph.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchjac import coupling, verify
from batchjac.block import Block
from batchjac.capture import capture
from batchjac.engines.forward import NoForwardRule, forward_ready, tangents
from batchjac.engines.rows import pull
from batchjac.engines.sweep import Kernels
from batchjac.errors import BatchjacError, is_out_of_memory
from batchjac.graph import let_go
from batchjac.job import Job, jobs
from batchjac.problem import Problem
from batchjac.pulling import Pulling, flat, in_turns, mixed
from batchjac.state import untouched

log = logging.getLogger("batchjac")

Blocks = Sequence[Block]


@dataclass
class Recording(Pulling):
    """Jobs of one capture, with columns through them: by forward rules, or as rows allow."""

    def push(self, columns: Blocks) -> list[Block]:
        """Columns ``[K, N, *in]``, one block for each target, to every output: ``J v``."""
        return in_turns(
            lambda some: [self._pushed(job, some) for job in self.work], columns, self.at_once
        )

    def _pushed(self, job: Job, columns: Blocks) -> Block:
        if job.root is None:
            return Block(_nothing(job.y, columns[0].rows), tuple(job.y.shape))
        plain = not self.by_engine and not self.captured.hooked
        ways: list[Callable[[Job, Blocks], Block]] = [self._forward] if plain else []
        if self.problem.coupling != "frozen":
            ways.append(self._twice_back)
        for way in ways:
            try:
                found = way(job, columns)
                if self._transposed(job, columns, found, way.__name__):
                    return found
            except NoForwardRule as error:
                log.info("no forward rule for node %s: products go back twice", error)
            except RuntimeError as error:  # a node that cannot be differentiated twice
                if isinstance(error, BatchjacError) or is_out_of_memory(error):
                    raise
                log.info("products go row by row: %s", error)
        return self._by_rows(job, columns)

    def _forward(self, job: Job, columns: Blocks) -> Block:
        """By the forward rules, from each target by itself."""
        assert job.root is not None
        total: Block | None = None
        for goal, block in zip(job.goals, columns, strict=True):
            graph = job.pruned((goal,))
            missing = forward_ready(graph)
            if missing is not None:
                raise NoForwardRule(missing)
            found = tangents(graph, {goal.slot: block}, job.root, self.problem.create_graph)
            if found is not None:
                found = found.owned_if(False)
                total = found if total is None else total.plus(found)
        return total or Block(_nothing(job.y, columns[0].rows), tuple(job.y.shape))

    def _twice_back(self, job: Job, columns: Blocks) -> Block:
        """``Jᵀ u`` is linear in u: its derivative by u, along v, is ``J v``.

        Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994,
        for R{.}; the two reverse passes: Townsend, "A new trick for calculating Jacobian vector
        products", 2017.
        """
        history, found = self.problem.create_graph, []
        with torch.enable_grad():
            u = torch.zeros_like(job.y, requires_grad=True)
            edges = [g.edge for g in job.goals]
            back = torch.autograd.grad((job.y * u).sum(), edges, create_graph=True,
                                       allow_unused=True)  # fmt: skip
            for k in range(columns[0].rows):
                pairs = [
                    (g * c.full()[k]).sum()
                    for g, c in zip(back, columns, strict=True)
                    if g is not None and g.requires_grad
                ]
                total = torch.stack([p.to(pairs[0].dtype) for p in pairs]).sum() if pairs else None
                if total is None:
                    found.append(torch.zeros_like(job.y))
                else:
                    (along,) = torch.autograd.grad(total, u, retain_graph=True,
                                                   create_graph=history)  # fmt: skip
                    found.append(along)
        return Block(torch.stack(found), tuple(job.y.shape))

    def _by_rows(self, job: Job, columns: Blocks) -> Block:
        """``sum_i J[n,o,i] v[n,i]``, each row of J made and dropped."""
        shape = tuple(job.y.shape)
        count, n = columns[0].rows, shape[0]
        pieces, across = [], self.across(job)
        for _, found in self.identity(job, across):
            part = job.y.new_zeros(())
            for block, v in zip(found, columns, strict=True):
                if block is not None and across:
                    part = part + block.full().flatten(1) @ v.full().flatten(1).T
                elif block is not None:
                    part = part + torch.einsum("rni,kni->rnk", flat(block), flat(v))
            if part.dim() == 0:
                return Block(_nothing(job.y, count), shape)
            pieces.append(part.to(job.y.dtype))
        whole = torch.cat(pieces)
        if across:
            return Block(whole.T.reshape(count, *shape), shape)
        return Block(whole.permute(2, 1, 0).reshape(count, n, *shape[1:]), shape)

    def _transposed(self, job: Job, columns: Blocks, found: Block, way: str) -> bool:
        """Whether ``<u, J v> = <Jᵀ u, v>``, u random and v one random column of those pushed."""
        if verify.trusted(job, way):
            return True
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(found.rows, generator=generator, dtype=torch.float64)
        u = torch.randn(job.y.shape, generator=generator, dtype=torch.float64)
        u = u.to(job.y.device, job.y.dtype)
        ours = u * mixed(job.y, w, found).detach()
        theirs: list[Tensor] = []
        row = self.walked(job, Block(u.unsqueeze(0), tuple(u.shape))) if (
            self.problem.coupling == "frozen"
        ) else [g if g is None else Block(g.unsqueeze(0), tuple(g.shape)) for g in
                pull(job.y, [g.edge for g in job.goals], u)]  # fmt: skip
        for g, v in zip(row, columns, strict=True):
            if g is not None:
                theirs.append((g.full()[0] * mixed(g.data, w, v)).detach())
        a, b = float(ours.sum()), sum(float(t.sum()) for t in theirs)
        size = float(ours.abs().sum()) + sum(float(t.abs().sum()) for t in theirs)
        if not abs(a - b) <= verify.tolerance(job) * size:  # also where either is NaN
            return False
        verify.trust(job, way)
        return True


def record(problem: Problem, samples: slice, room: int, halved: bool = False) -> Recording:
    """One forward on these samples, checked for coupling.

    ``halved``: compared with a forward of half of them, since others will come by themselves.

    Errors: ``CouplingError``, and what a forward may raise.
    """
    with untouched(problem.module) as restore:
        with capture(problem, samples) as captured:
            work = jobs(problem, captured, samples, Kernels())
            if captured.samples > 1 and problem.coupling not in ("sum", "full"):
                for job in work:
                    coupling.check(job, captured, captured.hooked)
            if halved:
                coupling.Values(problem, restore).half(captured.samples, captured.outputs)
        let_go(restore)
    found = Recording(problem, samples, captured, work, room, captured.hooked)
    if found.by_engine and problem.coupling == "frozen":
        found.distrust("this function hooks gradients")
    return found


def _nothing(y: Tensor, rows: int) -> Tensor:
    return y.new_zeros(()).expand(rows, *(1 for _ in y.shape))
