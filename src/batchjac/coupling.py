"""Do samples depend on each other? What gradients of one chunk say, and values of several."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchjac import verify
from batchjac.capture import Capture, capture
from batchjac.engines.sweep import Kernels
from batchjac.errors import BatchAxisError, CouplingError
from batchjac.graph import Graph
from batchjac.independence import Proof, prove
from batchjac.job import Job, jobs
from batchjac.locate import coupled
from batchjac.problem import Problem
from batchjac.solution import detached
from batchjac.stand_in import Seen, decide


def probe(job: Job, captured: Capture, graph: Graph, proof: Proof, by_engine: bool) -> None:
    """Refuse samples of which a cotangent on others shows, or NaN hides, a gradient."""
    whole = slice(0, captured.samples)

    def again(finite: Problem) -> Seen:
        with torch.random.fork_rng([]), capture(finite, whole) as other:
            same = next(j for j in jobs(finite, other, whole, job.kernels) if j.index == job.index)
            return same.probe(None if by_engine else same.towards(same.witnesses))

    seen = decide(job.problem, job.samples, job.probe(None if by_engine else graph), again)
    if seen.leaks:
        raise CouplingError(coupled(job.problem, captured, graph, proof.suspects[:3]))
    if seen.wholly.any():
        raise CouplingError(
            f"whether outputs of one sample depend on other samples cannot be seen: all gradients "
            f"of {int(seen.wholly.sum())} of {captured.samples} samples are NaN, also with finite "
            "numbers in the place of their inputs. Look for NaN in parameters and buffers, or say "
            'what you want: coupling="sum" or "full"'
        )


def check(job: Job, captured: Capture, by_engine: bool) -> str:
    """Refuse coupled samples, by proof or by probe; says which it was."""
    if job.root is None:
        return "not asked"
    targets = job.witnesses
    own = all(g.target.per_sample for g in job.goals)
    graph = job.graph if own else job.towards(targets)
    proof = job.proof if own else prove(graph, job.y)
    if proof.holds(targets) and not by_engine:
        return "proved from the graph"
    probe(job, captured, graph, proof, by_engine)
    return "probed"


# Samples on either side of a border between chunks whose values are compared across it, at most.
REACH = 8
# All that is compared may take one part in so many of the work, beside the first border.
SHARE = 16


@dataclass
class Values:
    """Whether the value of a sample depends on which others come with it, chunk after chunk.

    Coupling that no gradient of a chunk shows (a branch on the whole batch, detached statistics, a
    layer before the one that is asked for, a sample that reads one of the next chunk) would make
    the answer depend on the chunks. The first chunk is compared with its first half; what is next
    to a border between two chunks with a forward across it, at the first border with one of the
    whole first chunk and some samples more, if that is little beside the job. A value that differs
    there may depend on its place alone, which leaves the Jacobian right, so gradients decide.

    Unseen remain: samples that read only others further than ``REACH`` beyond a border, or, where
    chunks and rows are few beside a forward, beyond borders left out or looked at less far;
    functions that know their samples by the place among those that come together, where that place
    is in no forward across a border; values that no gradient explains, but at the first chunk;
    differences of the size of rounding; and all of it where random numbers are drawn, which differ
    anyway.
    """

    problem: Problem
    restore: Callable[[], None]
    spent: int = 0  # samples through forwards of ours
    work: int = 0  # samples through forwards of the job, a row of a walk counted as two
    random: bool = False
    ends: dict[int, Tensor] = field(default_factory=dict)  # values of the last samples so far

    def half(self, count: int, outputs: Mapping[int, Tensor]) -> None:
        """Refuse if the first chunk, of so many samples, has other values than half of it."""
        part = slice(0, count // 2 if count > 1 else 2)
        with self._again(part) as again:
            for path, index, y in _outputs(again):
                theirs = outputs[index]
                n = min(len(y), len(theirs))
                if not _same(theirs[:n], y[:n]):
                    raise CouplingError(_depends(path))

    def keep(self, outputs: Mapping[int, Tensor]) -> None:
        """Add the values of the chunk just done to what is known of those before."""
        for index, y in outputs.items():
            before = self.ends.get(index)
            if before is not None and before.shape[1:] != y.shape[1:]:
                raise BatchAxisError(
                    f"an output has {list(before.shape[1:])} numbers for each sample in one chunk "
                    f"of samples, {list(y.shape[1:])} in the next; f must return as many for every "
                    "sample, whichever come together: pad and mask"
                )
            self.ends[index] = detached(y) if before is None else torch.cat([before, y.detach()])

    def border(self, stop: int, last: int, rows: int, most: int) -> None:
        """Refuse if the chunk of the ``last`` samples and those before differ from both together.

        The chunk ends at sample ``stop``; ``rows`` are what a sample has; a forward may take
        ``most`` samples.
        """
        self._across(stop, stop - last, rows, most)
        if stop > last:
            self.ends = {k: y[-REACH:].clone() for k, y in self.ends.items()}

    def _across(self, stop: int, border: int, rows: int, most: int) -> None:
        self.work += (stop - border) * (1 + 2 * rows)
        if border == 0 or self.random:
            return
        first = self.spent == 0
        reach = REACH if first else min(REACH, (self.work // SHARE - self.spent) // 2)
        reach = min(reach, most // 2)
        if reach < 1:
            return
        high = min(stop, border + reach)
        low = max(0, border - reach)
        if first and high * SHARE <= self.problem.samples * (1 + 2 * rows):
            low = 0
        low = max(low, high - most, stop - min(map(len, self.ends.values())))
        self.spent += high - low
        with self._again(slice(low, high)) as again:
            for path, index, y in _outputs(again):
                if again and not _same(self._between(index, stop, low, high), y):
                    self._confirm(path, index, again, slice(low, high))

    def _between(self, index: int, stop: int, low: int, high: int) -> Tensor:
        """Samples ``low`` to ``high`` of one output, of which the last known is before ``stop``."""
        known = self.ends[index]
        return known[len(known) - (stop - low) : len(known) - (stop - high)]

    def _confirm(self, path: str, index: int, again: Capture, samples: slice) -> None:
        """Refuse if a gradient crosses the border: a value may also depend on the place alone."""
        for job in jobs(self.problem, again, samples, Kernels()):
            if job.index == index and job.root is not None and job.probe(None).leaks:
                raise CouplingError(_depends(path))

    @contextlib.contextmanager
    def _again(self, samples: slice) -> Iterator[Capture | None]:
        """The forward of these samples; None if it draws random numbers."""
        state = torch.get_rng_state()
        self.restore()
        with torch.random.fork_rng([]), capture(self.problem, samples) as again:
            self.random = not torch.equal(state, torch.get_rng_state())
            yield None if self.random else again


def _outputs(captured: Capture | None) -> list[tuple[str, int, Tensor]]:
    """Each output: its path, its index and its value."""
    if captured is None:
        return []
    return [(captured.values.paths[k], k, y) for k, y in captured.outputs.items()]


def _same(before: Tensor, now: Tensor) -> bool:
    return before.shape == now.shape and verify.close(before.detach(), now.detach())


def _depends(path: str) -> str:
    return (
        f"output{path} of a sample depends on which other samples are in the batch (a branch on "
        "the whole batch, or statistics of it), and the batch does not fit into max_memory at "
        "once: raise max_memory, use model.eval(), or make the function independent of them"
    )
