"""All rows at once by the walk, or one at a time by autograd's engine: which takes less time.

    walk   = arithmetic of all rows + nodes * seconds of Python
    engine = rows * (arithmetic of one row + nodes * seconds of C++)

A node costs the walk several times what it costs the engine, but only once. So the engine is faster
for a few rows through many small nodes: one output of a recurrent network, an energy of a deep one.
"""

import functools
import math
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchjac import cost
from batchjac.block import Block
from batchjac.calibration import remembered
from batchjac.choose import MARGIN, MOST_REMEMBERED, question
from batchjac.cost import Rates
from batchjac.engines import rows as engine
from batchjac.engines.sweep import Kernels, walk
from batchjac.graph import Graph, edge_of, prune
from batchjac.plain import unrounded
from batchjac.rules import registry
from batchjac.seeds import Seeds

# More rows than this were never faster by the engine, whatever the nodes.
FEW_ROWS = 32
# So little to gain, and looking costs more.
SHORT = 3e-4  # seconds


@dataclass(frozen=True)
class Clock:
    """Seconds that one node takes beside its arithmetic, for however many rows."""

    walked: float  # by a rule of the walk
    called: float  # by the node itself under vmap, where there is no rule
    engine: float  # by autograd's engine, each time


# A convolution toward its input by autograd's kernel beside the one that the walk chooses.
# Source: NUMBERS.md, and LeNet5 and a small ResNet with one output.
KERNELS = 2.0
# Source: the network below and each of its nodes under vmap, one core of the machine of NUMBERS.md.
USUAL = Clock(walked=1.4e-5, called=6e-5, engine=3.4e-6)


@dataclass(frozen=True)
class Pace:
    """What both ways are predicted to take, in seconds; ``walked`` is the best of the others."""

    walked: float
    engine: float

    def line(self) -> str:
        """The same in words."""
        mine, theirs = (f"{s * 1e3:.3g} ms" for s in (self.engine, self.walked))
        return f"one row at a time by autograd's engine: predicted {mine}, {theirs} all at once"


_known: dict[int, Pace | None] = {}


def singly(graph: Graph, seeds: Seeds, other: float = math.inf) -> Pace | None:
    """What the engine is predicted to take, if that is clearly less than the walk or ``other``."""
    if not 0 < seeds.rows <= FEW_ROWS or seeds.device.type != "cpu":
        return None
    key = hash((question(graph, (), seeds), seeds.across, other))
    if key not in _known:
        if len(_known) >= MOST_REMEMBERED:
            _known.clear()
        _known[key] = _singly(graph, seeds, other)
    return _known[key]


def _singly(graph: Graph, seeds: Seeds, other: float) -> Pace | None:
    """The same, found out anew."""
    if not _gains(pace(graph, seeds, None, USUAL, other)):
        return None  # whatever the arithmetic
    threads, nodes = torch.get_num_threads(), cost.work(graph.steps, seeds.output[0])
    rates = cost.rates(threads, nodes.convolutions + nodes.thin > 0)
    found = pace(graph, seeds, rates, clock(threads), other)
    return found if _gains(found) else None


def _gains(found: Pace) -> bool:
    return MARGIN * found.engine + SHORT < found.walked


def pace(
    graph: Graph, seeds: Seeds, rates: Rates | None, clock: Clock, other: float = math.inf
) -> Pace:
    """Both ways through this graph for these rows; without rates, of the nodes alone."""
    n, rows, steps = seeds.output[0], seeds.rows, [s for s in graph.steps if any(s.edges)]
    slow = sum(registry.find(step) is None for step in steps)
    walked = (len(steps) - slow) * clock.walked + slow * clock.called
    each = len(steps) * clock.engine
    if rates is not None:
        work, rates = cost.work(steps, n), replace(rates, call=0.0)
        walked += cost.seconds(work, rows, n, rates)
        theirs = replace(work, convolutions=KERNELS * work.convolutions, thin=KERNELS * work.thin)
        each += cost.seconds(theirs, 1, n, rates)
    return Pace(min(walked, other), rows * each)


@functools.cache
@unrounded()
def clock(threads: int) -> Clock:
    """What a node takes on this machine, measured once a day on a small recurrent network."""
    assert threads == torch.get_num_threads()
    per = {name: 1 / v for name, v in remembered("nodes", _measured).items()}
    return Clock(per["walked"], USUAL.called / USUAL.walked * per["walked"], per["engine"])


_STEPS, _SIZE, _RUNS = 8, 8, 9


def _network() -> tuple[Tensor, Tensor]:
    """A few steps of a gated recurrence, whose nodes are what there usually are many of."""
    like = torch.zeros((), dtype=torch.float32, device="cpu")
    x = like.new_full((_SIZE, _SIZE), 0.1).requires_grad_()
    w, b = like.new_full((_SIZE, 2 * _SIZE), 0.1), like.new_zeros(2 * _SIZE)
    state: Tensor = x
    for _ in range(_STEPS):
        gate, new = torch.addmm(b, state, w).split(_SIZE, 1)
        state = state + gate.sigmoid() * (new.tanh() - state)
    return x, state


def _measured() -> dict[str, float]:
    with torch.enable_grad(), torch.inference_mode(False):
        x, y = _network()
    edge = edge_of(x)
    assert y.grad_fn is not None
    graph = prune([y.grad_fn], [(edge.node, edge.output_nr)])
    block = Block(y.new_ones(1, 1, 1), tuple(y.shape))
    root = (y.grad_fn, y.output_nr)
    count = len(graph.steps)
    return {
        "walked": count / _best(lambda: walk(graph, {root: block}, Kernels())),
        "engine": count / _best(lambda: engine.rows(y, [edge], block)),
    }


def _best(run: Callable[[], object]) -> float:
    """The shortest of a few runs: interference only lengthens one."""
    return min(timeit.repeat(run, number=1, repeat=_RUNS))
