"""The walk the other way: all rows of tangents at once from one tensor to the output.

Law: ``<u, tangents(t)> = <walk(u), t>`` for all ``u`` and ``t``; rows are directions in the tensor
that is differentiated by. It is the cheaper way where that tensor is narrower than the output.
Assumes what the walk assumes, and a forward rule for every node that tangents pass:
``forward_ready`` looks for one before anything is computed, but a rule may still decline.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Graph, Meta, Slot, Step
from batchjac.rules import registry

Blocks = Sequence[Block | None]


class NoForwardRule(Exception):
    """Tangents cannot pass a node, whose name is given; cotangents can.

    It has no forward rule, or that does not cover this case.
    """


class NotFinite(NoForwardRule):
    """Tangents hold inf or nan.

    At an infinite slope a direction that is zero there becomes ``0 * inf`` on the way forward,
    where the walk may never meet that product.
    """


def forward_ready(graph: Graph) -> str | None:
    """The name of the first node, from the root on, without a forward rule; None if all have."""
    for step in graph.steps:
        if any(step.edges) and registry.find_forward(step) is None:
            return step.name
    return None


def tangents(
    graph: Graph, seeds: Mapping[Slot, Block], root: Slot, create_graph: bool = False
) -> Block | None:
    """The tangent at ``root`` of a seed at one slot of the graph; None where it does not arrive.

    The seeded tensor is taken for independent, also where it was computed from another target.
    Errors: ``NoForwardRule``.

    Cost: about one forward for each row; peak: the widest two neighbouring tangents.
    """
    ((start, seed),) = seeds.items()
    steps, readers = _between(graph, root)
    alive = {start: seed}
    with torch.set_grad_enabled(create_graph):
        for step in reversed(steps):
            slots = [(e.node, e.slot) if e is not None else None for e in step.edges]
            arriving = [alive.get(slot) if slot is not None else None for slot in slots]
            readers.subtract(slot for slot in slots if slot is not None)
            for slot in slots:
                if slot is not None and not readers[slot]:
                    alive.pop(slot, None)
            if all(block is None for block in arriving):
                continue
            for k, block in enumerate(through(step, arriving)):
                if block is not None and readers[(step.node, k)]:
                    alive[(step.node, k)] = block
            del arriving
    found = alive.get(root)
    if found is not None and not _finite(found.data.detach()):
        raise NotFinite(f"{root[0].name()}: its tangents are not finite")
    return found


def _between(graph: Graph, root: Slot) -> tuple[list[Step], Counter[Slot]]:
    """The steps that lead to the root, and how often each tensor is read on the way."""
    readers: Counter[Slot] = Counter([root])  # whoever asks reads it at last
    nodes = {root[0]}
    steps = []
    for step in graph.steps:
        if step.node in nodes and any(step.edges):
            steps.append(step)
            for edge in step.edges:
                if edge is not None:
                    nodes.add(edge.node)
                    readers[(edge.node, edge.slot)] += 1
    return steps, readers


def through(step: Step, blocks: Blocks) -> Blocks:
    """Tangents through one node, by its rule; in the dtype and on the device of each output.

    Arguments come in the dtype and on the device of the first output: what autograd casts back on
    the way to an edge of another dtype, the node cast on the way from it.
    """
    rule = registry.find_forward(step)
    if rule is None:
        raise NoForwardRule(step.name)
    found = rule(step, [b and _like(b, step.outputs[0]) for b in blocks])
    if found is NotImplemented:
        raise NoForwardRule(step.name)
    assert len(found) == len(step.outputs), step.name
    for block, meta in zip(found, step.outputs, strict=True):
        assert block is None or block.shape == meta.shape, (step.name, block.shape, meta.shape)
    return [b and _like(b, meta) for b, meta in zip(found, step.outputs, strict=True)]


def _like(block: Block, meta: Meta) -> Block:
    return block.on(meta.device).to(meta.dtype)


def _finite(data: Tensor) -> bool:
    """Whether neither inf nor nan is among them; one pass, no copy."""
    wide = torch.promote_types(data.dtype, torch.float32)
    return bool(data.sum(dtype=wide).isfinite())
