"""The plain row loop: ``autograd.grad`` once per row, through the real engine, hooks and all.

Law: it *is* what the walk must equal. It is the last resort when a walk and autograd disagree, and
the faster way for few rows through many small nodes (``pace``).
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from batchjac.block import Block, dense
from batchjac.graph import Graph, Slot, Step


def pull(
    y: Tensor, edges: Sequence[GradientEdge], cotangent: Tensor, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """One cotangent through the autograd engine, from a real ``y`` to every edge, densely.

    The derivative of ``sum(c * y)``, by ``y`` exactly ``c``: given ``grad_outputs=``, torch loads
    its symbolic algebra to compare two shapes, for 34 MiB and a third of a second in a process.
    """
    with torch.enable_grad():
        total = (y * cotangent).sum()
    grads = torch.autograd.grad(
        total, edges, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return tuple(None if g is None else dense(g) for g in grads)


def rows(
    y: Tensor, targets: Sequence[GradientEdge], seeds: Block, create_graph: bool = False
) -> dict[Slot, Block]:
    """Each row of ``seeds`` through the autograd engine, to every target that it reaches."""
    found: list[list[Tensor | None]] = []
    for cotangent in seeds.full():
        found.append(list(pull(y, targets, cotangent, create_graph)))
    blocks = {}
    for edge, column in zip(targets, zip(*found, strict=True), strict=True):
        like = next((g for g in column if g is not None), None)
        if like is not None:
            data = torch.stack([torch.zeros_like(like) if g is None else g for g in column])
            blocks[(edge.node, edge.output_nr)] = Block(data, tuple(like.shape))
    return blocks


def in_engine_order(graph: Graph) -> Graph:
    """The same steps as autograd's engine takes them: of those that are ready the newest first."""
    waits = Counter(e.node for step in graph.steps for e in step.edges if e is not None)
    order = {step.node: k for k, step in enumerate(graph.steps)}
    ready = [_entry(step, k) for k, step in enumerate(graph.steps) if not waits[step.node]]
    heapq.heapify(ready)

    def steps() -> Iterator[Step]:
        while ready:
            step = graph.steps[heapq.heappop(ready)[1]]
            yield step
            for edge in step.edges:
                if edge is not None:
                    waits[edge.node] -= 1
                    if not waits[edge.node]:
                        k = order[edge.node]
                        heapq.heappush(ready, _entry(graph.steps[k], k))

    return replace(graph, steps=tuple(steps()))


def _entry(step: Step, place: int) -> tuple[int, int]:
    return -step.node._sequence_nr(), place
