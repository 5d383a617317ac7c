"""All jobs of one forward together: their bytes, their rows, and in words how they go."""

from collections.abc import Sequence
from dataclasses import replace

from batchjac import memory
from batchjac.engines.rows import in_engine_order
from batchjac.graph import Graph, Slot
from batchjac.job import Job
from batchjac.route import held
from batchjac.samples import SHARED


def need(work: Sequence[Job], samples: int) -> memory.Need:
    """Bytes for each of the samples that these jobs were recorded on; live for a row or column."""
    whole = memory.need([_ordered(job, job.graph) for job in work], samples, shared(work))
    if any(job.problem.compiler for job in work):
        # what rules derive from what was saved is there all at once, and sums are not in place
        whole = replace(whole, saved=2 * whole.saved, live=2 * whole.live)
    ways = [held(choice.route, choice.chain) for job in work for choice in job.choices.values()]
    if not ways:
        return whole
    plain = [_ordered(job, job.pruned(job.plain)) for job in work if job.plain]
    walked = memory.need(plain, samples, shared(work))
    return memory.Need(
        whole.saved + max(w.kept for w in ways),
        max([walked.live, *(w.live for w in ways)]),
        max([walked.widest, *(w.widest for w in ways)]),
    )


def _ordered(job: Job, graph: Graph) -> Graph:
    """The graph's steps as they are taken."""
    return in_engine_order(graph) if job.singly else graph


def units(work: Sequence[Job]) -> int:
    """Rows, or columns where they are what is pushed, that could go together."""
    return width([job for job in work if not job.singly])


def width(work: Sequence[Job]) -> int:
    """Rows of the longest walk, or columns where they are what is pushed, however they go."""
    counts = [
        held(choice.route, choice.chain).units for job in work for choice in job.choices.values()
    ]
    return max([1, *counts, *(job.seeds.rows for job in work if job.plain)])


def reasons(work: Sequence[Job]) -> tuple[str, ...]:
    """In words how each Jacobian is reached, where more than plain reverse was thought of."""
    found: list[str] = []
    for job in work:
        if job.singly:
            found.append(job.singly.line())
        else:
            for choice in job.considered.values():
                found += choice.forecast.lines(choice.taken)
    return tuple(found) or ("plain reverse",)


def shared(work: Sequence[Job]) -> set[Slot]:
    """What all samples share on the way to parameters."""
    return {
        slot
        for job in work
        if job.root is not None and not all(g.target.per_sample for g in job.goals)
        for slot, place in job.proof.places.items()
        if place is SHARED
    }
