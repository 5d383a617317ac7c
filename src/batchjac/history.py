"""Bytes of a differentiable answer: the history that leads to it, and of some samples of it."""

import math
from collections.abc import Sequence

from batchjac import memory
from batchjac.errors import BudgetError
from batchjac.job import Job
from batchjac.memory import BLOCK, HELD, text
from batchjac.work import shared, units

# With a history all blocks stay, and factors beside them. Source: tests/test_memory.py,
# whose cases stay below their budgets.
HISTORY = 1.5
# Pulling a cotangent back through a history computes beside it: gradients of the widest blocks, and
# what convolutions lay out. Source: nine models, fresh processes: 0.3 to 1.85 of the history alone.
AGAIN = 2.0
# Samples that are computed again together where they fit, however wide their blocks are.
FEWEST = 16


def history(work: Sequence[Job], samples: int) -> int:
    """Bytes for each of the recorded samples of what leads to an answer, which is not counted.

    Every block of every walk stays.
    """
    alone = shared(work)
    graphs = [job.graph for job in work]
    blocks = sum(
        memory.size_of(e.meta) * (samples if (e.node, e.slot) in alone else 1)
        for graph in graphs
        for step in graph.steps
        if not memory.views(step.name)
        for e in step.edges
        if e is not None
    )
    saved = memory.need(graphs, samples, alone).saved
    return saved + math.ceil(HISTORY * units(work) * blocks / samples)


class TooLong(BudgetError):
    """The history of the whole answer does not fit; that of some samples might."""


def check(each: int, samples: int, allowed: int, result: int) -> None:
    """Refuse a history of ``each`` bytes for every sample. Chunks change nothing here."""
    # the result is joined over rows, then over samples; then it has a gradient
    total = 2 * result + math.ceil(AGAIN * samples * each)
    if total > allowed:
        raise TooLong(
            f"max_memory allows {text(allowed)}, but with create_graph=True all that leads to the "
            f"result stays until the backward pass, {text(total)}; the least that would do is "
            f"max_memory={total}. Take fewer samples or select outputs="
        )


def pieces(each: int, samples: int, allowed: int, kept: int, widest: int) -> int:
    """How many samples are computed again together: their history fits beside what is kept.

    ``each``: bytes of the history of a sample; ``widest``: of the blocks of all its rows, which
    stay in the cache if that leaves enough samples to share what a walk costs.
    """
    each = math.ceil(AGAIN * each)
    most = min(samples, memory.spare(allowed, kept) // each)
    if most < 1:
        total = kept + math.ceil(each * HELD / (HELD - 1)) + 1
        raise BudgetError(
            f"max_memory allows {text(allowed)}, but the result and its gradient take "
            f"{text(kept)}, and with create_graph=True all that leads to the result of one sample "
            f"{text(each)} beside it; the least that would do is max_memory={total}. Take fewer "
            "samples or select outputs="
        )
    few = max(FEWEST, BLOCK // max(1, widest))
    return math.ceil(samples / math.ceil(samples / min(most, few)))
