"""The walk: all rows at once from the outputs to what is differentiated, node by node.

Law: equal to ``autograd.grad`` called once per row.
Assumes (H1) that samples are independent, or that their sum is wanted, and (H2) that no hook
changes a gradient; ``independence`` and ``verify`` hold the caller to both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from batchjac.block import Block, Waiting
from batchjac.engines import fallback
from batchjac.errors import is_out_of_memory
from batchjac.factors import Factored
from batchjac.graph import Edge, Graph, Slot, Step
from batchjac.rules import registry
from batchjac.rules.registry import Gathered
from batchjac.samples import SHARED, Place, SampleAxis

Blocks = Sequence[Block | None]
Places = Mapping[Slot, Place]
Pending = dict[Slot, Block | Gathered]
Consume = Callable[[Slot, Block | Factored], None]


class NotPerSample(Exception):
    """A rule declined to keep samples apart; the caller goes on sample by sample."""


@dataclass
class Kernels:
    """How each kind of node was computed: ``rule``, ``vmap`` or ``rows``; walks fill it.

    A kind that needed several ways shows the slowest. ``refused`` are the kinds vmap cannot do.
    """

    ways: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    @property
    def slow(self) -> dict[str, str]:
        """The nodes without a rule and the way they took."""
        return {name: way for name, way in self.ways.items() if way != "rule"}

    def took(self, name: str, way: str) -> None:
        """Note a node's way."""
        if self.ways.get(name) == way:
            return
        order = ("rule", "vmap", "rows")
        self.ways[name] = max(self.ways.get(name, "rule"), way, key=order.index)


class Walk(Protocol):
    """What computes a walk: ``walk`` itself, or what may replay it."""

    def __call__(
        self,
        graph: Graph,
        seeds: Mapping[Slot, Block],
        kernels: Kernels,
        places: Places | None = None,
        create_graph: bool = False,
    ) -> dict[Slot, Block]:
        """The seeds pushed down to every target that they reach."""
        ...


def walk(
    graph: Graph,
    seeds: Mapping[Slot, Block],
    kernels: Kernels,
    places: Places | None = None,
    create_graph: bool = False,
    consume: Consume | None = None,
) -> dict[Slot, Block]:
    """Push the seeds down to every target that they reach.

    With ``consume`` what reaches a target goes there instead, as soon as all of it is there, and is
    dropped; toward parameters as products not yet formed, where a rule has them. With ``places`` a
    gradient that would be summed over samples on its way to a parameter is kept per sample, as rows
    ``[V*N, *p]``; every such node must have a ``per_sample`` rule.
    """
    pending: Pending = dict(seeds)
    found: dict[Slot, Block] = {}
    ends = {node for node, _ in graph.targets}
    # a graph may have thousands of small nodes, for which every line here counts
    with torch.set_grad_enabled(create_graph):
        for step in graph.steps:
            node = step.node
            if consume is not None and _handed(pending, step, graph, consume):
                continue
            if len(step.outputs) == 1:
                blocks = [_whole(pending.pop((node, 0), None))]
                reached = blocks[0] is not None
            else:
                blocks = [_whole(pending.pop((node, k), None)) for k in range(len(step.outputs))]
                reached = not all(map(_none, blocks))
            if node in ends and consume is None:
                for k, block in enumerate(blocks):
                    if block is not None and (node, k) in graph.targets:
                        found[node, k] = blocks[k] = block.owned_if(False)
            if not reached or not any(step.edges):
                continue
            rule = registry.find(step)
            if rule is not None and rule.gather is not None:
                _gather(pending, step, rule.gather(step, blocks))
                kernels.took(step.name, "rule")
                continue
            gradients = _through(step, rule, blocks, kernels, places, consume is not None)
            del blocks
            for k, edge in enumerate(step.edges):
                if edge is not None:
                    gradient = gradients[k]
                    if isinstance(gradient, Block):
                        _arrive(pending, edge, gradient)
                    elif gradient is not None:
                        _join(pending, (edge.node, edge.slot), gradient)
    return found


def _handed(pending: Pending, step: Step, graph: Graph, consume: Consume) -> bool:
    """Hand over what reached targets here; and what is factored, on, if the rule can."""
    for k in range(len(step.outputs)):
        slot = (step.node, k)
        if slot in graph.targets and slot in pending:
            arrived = pending[slot]
            if not isinstance(arrived, Block | Factored):
                arrived = arrived.block()
            pending[slot] = arrived
            consume(slot, arrived)
    if not any(step.edges):
        for k in range(len(step.outputs)):
            pending.pop((step.node, k), None)
        return True
    factored = pending.get((step.node, 0))
    rule = registry.find(step)
    if not isinstance(factored, Factored) or rule is None or rule.carry is None:
        return False
    carried = rule.carry(step, factored)
    (edge,) = step.edges
    if carried is None or edge is None:
        return False
    del pending[step.node, 0]
    _join(pending, (edge.node, edge.slot), carried)
    return True


def _none(block: Block | None) -> bool:
    return block is None


def _whole(arrived: Block | Gathered | None) -> Block | None:
    """All that reached a tensor, its parts put together."""
    return arrived if arrived is None or isinstance(arrived, Block) else arrived.block()


def _gather(pending: Pending, step: Step, part: Gathered) -> None:
    """Parts of a tensor wait for each other."""
    (edge,) = step.edges
    assert edge is not None
    _join(pending, (edge.node, edge.slot), part)


def _join(pending: Pending, slot: Slot, part: Gathered) -> None:
    before = pending.get(slot)
    if before is None or isinstance(before, Block):
        pending[slot] = part
        if before is not None:
            part.take(before)
    elif isinstance(part, Factored) and not isinstance(before, Factored):
        before.take(part.block())
    else:
        before.take(part)


def _owned(rule: registry.Rule, blocks: Blocks, gradients: Blocks) -> Blocks:
    """The gradients, marked as the walk's own where the node's rule made new memory for one.

    One that came in and goes on alone stays what it was; several may be one block.
    """
    if len(gradients) == 1:
        (one,) = gradients
    else:
        made = [b for b in gradients if b is not None]
        if len(made) > 1:
            return _lent(gradients)
        one = made[0] if made else None
    # what waits is made when it is read, and kept by it
    if not rule.fresh or one is None or isinstance(one, Waiting):
        return gradients
    memory, owned = one.memory, True
    for b in blocks:
        if b is one:
            return gradients
        owned = owned and (b is None or b.memory != memory)
    return [b and b.owned_if(owned) for b in gradients]


def _lent(blocks: Blocks) -> Blocks:
    """The same blocks, which nobody may write into."""
    return [b and b.owned_if(False) for b in blocks]


def _arrive(pending: Pending, edge: Edge, block: Block) -> None:
    """What the autograd engine does between two nodes: sum to shape, cast, accumulate."""
    slot = (edge.node, edge.slot)
    if block.shape != edge.meta.shape:
        block = block.sum_to(edge.meta.shape)
    block = block.to(edge.meta.dtype)
    before = pending.get(slot)
    if before is None:
        pending[slot] = block
    elif isinstance(before, Block):
        pending[slot] = before.plus(block)
    else:
        before.take(block)


def _through(
    step: Step,
    rule: registry.Rule | None,
    blocks: Blocks,
    kernels: Kernels,
    places: Places | None,
    factored: bool = False,
) -> Sequence[Block | Gathered | None]:
    """The node's rows from its outputs to its edges, by the fastest way that covers it."""
    if rule is not None and places is not None:
        crossing = _crossing(step, places)
        if crossing is not None:
            kernels.took(step.name, "rule")
            # read twice, and handed on as views: nobody may write into these
            return _per_sample(step, _lent(blocks), rule, crossing, places, factored)
    if rule is not None:
        gradients: Blocks = rule.reverse(step, blocks)
        if gradients is not NotImplemented:
            kernels.took(step.name, "rule")
            return gradients if torch.is_grad_enabled() else _owned(rule, blocks, gradients)
    # a step that stands for something else than its node ("...:frozen") must have a rule
    assert step.name == step.node.name(), f"{step.name} has no rule"
    if step.name not in kernels.refused | fallback.WRONG_UNDER_VMAP:
        try:
            gradients = fallback.call(step, blocks, "vmap")
        except Exception as error:  # whatever vmap refuses, the plain call decides
            if is_out_of_memory(error):
                raise
            kernels.refused.add(step.name)
        else:
            kernels.took(step.name, "vmap")
            return gradients
    gradients = fallback.call(step, blocks, "rows")
    kernels.took(step.name, "rows")
    return gradients


def _crossing(step: Step, places: Places) -> SampleAxis | None:
    """The sample axis of the node's output, if some wanted edge has none."""
    at = places.get((step.node, 0))
    edges = [places.get((e.node, e.slot)) for e in step.edges if e is not None]
    return at if isinstance(at, SampleAxis) and SHARED in edges else None


def _per_sample(
    step: Step,
    blocks: Blocks,
    rule: registry.Rule,
    at: SampleAxis,
    places: Places,
    factored: bool,
) -> Sequence[Block | Gathered | None]:
    """Edges that all samples share get one gradient per sample, the others the usual one."""
    assert rule.per_sample is not None  # ``per_sample_ready`` has looked
    shared = [e is not None and places.get((e.node, e.slot)) is SHARED for e in step.edges]
    inner = replace(step, edges=_only(step, [not s for s in shared]))
    outer = replace(step, edges=_only(step, shared))
    batched: Blocks = [None] * len(step.edges)
    if any(inner.edges):
        batched = rule.reverse(inner, blocks)
    single: Sequence[Block | Gathered | None]
    if factored and rule.factors is not None:
        single = rule.factors(outer, blocks, at)
    else:
        single = rule.per_sample(outer, blocks, at)
    if batched is NotImplemented or single is NotImplemented:
        raise NotPerSample(step.name)
    return [s if is_shared else b for is_shared, s, b in zip(shared, single, batched, strict=True)]


def _only(step: Step, keep: Sequence[bool]) -> tuple[Edge | None, ...]:
    return tuple(e if k else None for e, k in zip(step.edges, keep, strict=True))


def per_sample_ready(graph: Graph, places: Places) -> bool:
    """Whether every node that joins samples to a parameter can keep them apart."""
    for step in graph.steps:
        if not any(step.edges):
            continue
        at = places.get((step.node, 0))
        if at is None:
            return False
        rule = registry.find(step)
        if _crossing(step, places) is not None and (rule is None or rule.per_sample is None):
            return False
    return True
