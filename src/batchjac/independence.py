"""Do outputs of one sample ignore the other samples? Proved from the graph, else probed.

The proof follows the sample axis from the output through every rule's ``samples`` claim to each
target. Where a claim is missing, random cotangents on half of the samples must leave the gradients
of the others exactly zero. Halves are tried both ways round, enough of them to separate every pair
in a batch of up to 16 samples, and a single pair in a larger batch but for one chance in sixteen.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Graph, Slot, Step
from batchjac.rules import registry
from batchjac.samples import Place, SampleAxis
from batchjac.stand_in import Seen, look, together, unseen

PAIRS_UP_TO = 16
SPLITS = 4  # of a larger batch


@dataclass(frozen=True)
class Proof:
    """Where the sample axis is at every slot, and the steps where that was lost."""

    places: dict[Slot, Place]
    suspects: tuple[int, ...]

    def holds(self, targets: Sequence[Slot]) -> bool:
        """Whether every one of these targets keeps its samples apart along axis 0."""
        return all(self.places.get(t, SampleAxis(0)) == SampleAxis(0) for t in targets)


def prove(graph: Graph, y: Tensor) -> Proof:
    """Follow the sample axis of ``y`` down the graph, claim by claim."""
    assert y.grad_fn is not None
    places: dict[Slot, Place] = {(y.grad_fn, y.output_nr): SampleAxis(0)}
    suspects = []
    for index, step in enumerate(graph.steps):
        # one line after the other counts where a graph has hundreds of small nodes
        at = places.get((step.node, 0)) if len(step.outputs) == 1 else _arrived(step, places)
        claims = _claims(step, at)
        known = isinstance(at, SampleAxis)
        lost = False
        for edge, claim in zip(step.edges, claims, strict=True):
            if edge is not None:
                slot = (edge.node, edge.slot)
                before = places.get(slot, claim)
                places[slot] = claim if before is claim or before == claim else None
                lost = lost or (known and not isinstance(claim, SampleAxis))
        if lost:
            suspects.append(index)
    return Proof(places, tuple(suspects))


def _arrived(step: Step, places: Mapping[Slot, Place]) -> Place:
    """Where the samples are in all outputs of a node that anything is known of, if in one place."""
    at: Place = None
    first = True
    for k in range(len(step.outputs)):
        place = places.get((step.node, k), _UNKNOWN)
        if place is _UNKNOWN:
            continue
        if not first and place != at:
            return None
        at, first = place, False
    return at


_UNKNOWN = SampleAxis(-1)  # nothing arrived here


def _claims(step: Step, at: Place) -> Sequence[Place]:
    if not isinstance(at, SampleAxis):
        return [at] * len(step.edges)
    rule = registry.find(step)
    if rule is None or rule.samples is None:
        return [None] * len(step.edges)
    return rule.samples(step, at)


Push = Callable[[Block], Mapping[Slot, Block]]


def probe(y: Tensor, targets: Sequence[Slot], push: Push) -> Seen:
    """Whether a cotangent on some samples reaches the gradient of others, as ``push`` sends it."""
    n = y.shape[0]
    seen = unseen(n)
    masks = _splits(n)
    generator = torch.Generator().manual_seed(n)  # its own: the user's random state stays
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
    for mask in masks:  # one row at a time: a probe must not need more memory than the walk
        lead = mask.reshape(-1, *(1,) * (y.dim() - 1)).to(y.device, y.dtype)
        found = push(Block((lead * noise).unsqueeze(0), tuple(y.shape)))
        for gradient in (found[slot].full()[0] for slot in targets if slot in found):
            if len(gradient) != n:
                return replace(seen, leaks=True)
            seen = together(seen, look(gradient, ~mask))
        if seen.leaks:
            break
    return seen


def _splits(n: int) -> Tensor:
    """Halves of the samples and their complements, as masks ``[K, N]``."""
    if n <= PAIRS_UP_TO:
        # the binary digits of the index: any two samples differ in one of them
        digits = torch.arange(max(1, math.ceil(math.log2(n)))).unsqueeze(1)
        halves = (torch.arange(n) >> digits) % 2 == 1
    else:
        generator = torch.Generator().manual_seed(n)
        order = torch.stack([torch.randperm(n, generator=generator) for _ in range(SPLITS)])
        halves = order < n // 2
    return torch.cat([halves, ~halves])


BATCH_STATISTICS = (
    "NativeBatchNormBackward0", "CudnnBatchNormBackward0", "NativeBatchNormLegitBackward0",
    "NativeBatchNormLegitBackward1",
)  # fmt: skip


def frozen(graph: Graph, y: Tensor, mixes: Callable[[Graph], bool]) -> Graph:
    """The graph with batch statistics held constant where they are taken over samples.

    What is constant keeps samples apart, so that the proof then reaches the next normalisation.
    Where it has lost the samples, a normalisation is tried: it takes its statistics over samples
    if the graph ``mixes`` them when all other doubtful ones are constant.
    """
    while over := {k for k, at in _training(graph, y).items() if _over_samples(at)}:
        graph = _constant(graph, over)
    doubtful = {k for k, at in _training(graph, y).items() if at is None}
    found = {k for k in doubtful if mixes(_constant(graph, doubtful - {k}))}
    return _constant(graph, found)


def _over_samples(at: Place) -> bool:
    return isinstance(at, SampleAxis) and at.dim != 1


def _training(graph: Graph, y: Tensor) -> dict[int, Place]:
    """The normalisations by statistics of this batch, and where the samples are in each."""
    places = prove(graph, y).places
    return {
        k: places.get((step.node, 0))
        for k, step in enumerate(graph.steps)
        if step.name in BATCH_STATISTICS and step.has("training") and step.saved("training")
    }


def _constant(graph: Graph, which: Collection[int]) -> Graph:
    steps = [
        replace(step, name=f"{step.name}:frozen") if k in which else step
        for k, step in enumerate(graph.steps)
    ]
    return replace(graph, steps=tuple(steps))
