"""Do samples depend on each other? What gradients of one chunk say, and values of several."""

import torch

from batchjac.capture import Capture, capture
from batchjac.errors import CouplingError
from batchjac.graph import Graph
from batchjac.independence import Proof
from batchjac.job import Job, jobs
from batchjac.locate import coupled
from batchjac.problem import Problem
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
