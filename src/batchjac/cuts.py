"""Cuts: tensors of the graph through which every path from the root to a target passes.

The chain rule joins two Jacobians at a cut and nowhere else: a path around it would be lost.

Derivation: handle the steps in topological order and keep the set of *open* slots, those that a
handled step feeds and whose own step is still to come. Every path from the root to the target
crosses it. So where it holds one slot, that slot is a cut; and where it holds a second one, the
path through that one can neither have passed the first, whose step feeds only later ones, nor come
to it any more. The one-slot moments are therefore all cuts (the dominators of the target).
"""

from collections.abc import Mapping
from dataclasses import replace

from batchjac.graph import Graph, Slot, Step
from batchjac.samples import Place, SampleAxis

Places = Mapping[Slot, Place]


def cuts(graph: Graph, root: Slot, target: Slot, places: Places) -> tuple[Slot, ...]:
    """The slots that every path from ``root`` to ``target`` passes, these two first and last.

    Between the two only tensors of real numbers count that have the samples on axis 0, whole:
    Jacobians are joined sample by sample. Linear in the number of edges.
    """
    found = [root]
    if root == target:
        return (root,)
    open_slots: set[Slot] = {root}
    for step in between(graph, root, target).steps:
        here = {slot for slot in slots(step) if slot in open_slots}
        if len(open_slots) == 1 and here and not here & {root, target}:
            (slot,) = here
            real = not step.outputs[slot[1]].dtype.is_complex
            if real and places.get(slot) == SampleAxis(0):
                found.append(slot)
        open_slots -= here
        open_slots |= {(e.node, e.slot) for e in step.edges if e is not None}
    return (*found, target)


def between(graph: Graph, upper: Slot, lower: Slot) -> Graph:
    """The steps on the paths from slot ``upper`` to slot ``lower``, and no edge that leads away."""
    leads: set[Slot] = {lower}
    kept: list[Step] = []
    for step in reversed(graph.steps):
        edges = tuple(
            e if e is not None and (e.node, e.slot) in leads else None for e in step.edges
        )
        if step.node is lower[0]:
            kept.append(replace(step, edges=(None,) * len(step.edges)))
        elif any(edges):
            leads.update(slots(step))
            kept.append(replace(step, edges=edges))
    reached: set[Slot] = {upper}
    steps = []
    for step in reversed(kept):
        if any(slot in reached for slot in slots(step)):
            steps.append(step)
            reached.update((e.node, e.slot) for e in step.edges if e is not None)
    assert lower in reached, "no path leads from one cut to the next"
    return Graph(tuple(steps), frozenset({lower}))


def covered(graph: Graph, root: Slot, cut: Slot, target: Slot) -> bool:
    """Whether no path from ``root`` to ``target`` avoids ``cut``: the proof by taking it away."""
    reached: set[Slot] = {root} - {cut}
    for step in between(graph, root, target).steps:
        if any(slot in reached for slot in slots(step)):
            reached.update((e.node, e.slot) for e in step.edges if e is not None)
            reached.discard(cut)
    return target not in reached


def slots(step: Step) -> list[Slot]:
    """Where gradients arrive at a node: one slot for each output of its operation."""
    return [(step.node, k) for k in range(len(step.outputs))]
