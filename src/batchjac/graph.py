"""The recorded graph, pruned to what leads from one set of edges to another.

Only facts that autograd states itself are read: ``next_functions``, ``_input_metadata`` (the shape
and dtype of what flows into a node) and, by the rules, ``_saved_*``.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Slot = tuple[Node, int]


@dataclass(frozen=True)
class Meta:
    """Shape, dtype and device of a tensor of the graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Edge:
    """Where a gradient goes: into input ``slot`` of ``node``, as a tensor like ``meta``."""

    node: Node
    slot: int
    meta: Meta

    @property
    def shape(self) -> tuple[int, ...]:
        return self.meta.shape


@dataclass(frozen=True)
class Step:
    """One node of the pruned graph, as a rule sees it.

    ``outputs`` describes each output of the forward operation, ``edges`` each differentiable
    input: ``None`` where nothing that is asked for lies behind it.
    """

    node: Any  # torch's stubs do not know saved attributes nor that nodes can be called
    name: str
    outputs: tuple[Meta, ...]
    edges: tuple[Edge | None, ...]

    def saved(self, name: str) -> Any:
        """What the forward saved under this name; sizes and dims as signed integers."""
        return _signed(getattr(self.node, f"_saved_{name}"))

    def called(self, name: str, get: Callable[["Step"], Any]) -> Any:
        """What ``get`` finds by calling the node without rows; ``name`` says what that is."""
        return get(self)

    def has(self, *names: str) -> bool:
        """Whether the node saved all of these."""
        return all(hasattr(type(self.node), f"_saved_{name}") for name in names)

    def wanted(self, k: int) -> Edge | None:
        """Edge ``k``; ``None`` also where the node has no such edge."""
        return self.edges[k] if k < len(self.edges) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.outputs[0].shape


def _signed(value: Any) -> Any:
    """Undo autograd's storing of negative dims as unsigned 64-bit integers."""
    if type(value) is int:
        return value - (1 << 64) if value >= 1 << 63 else value
    if isinstance(value, tuple):
        return tuple(_signed(v) for v in value)
    return value


def metas(node: Any) -> tuple[Meta, ...]:
    """What flows into a node: one entry per output of the operation it differentiates."""
    return tuple([Meta(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata])


def edge_of(tensor: Tensor) -> GradientEdge:
    """The place in the graph where this tensor's gradient arrives."""
    return torch.autograd.graph.get_gradient_edge(tensor)


@dataclass(frozen=True)
class Graph:
    """The steps from ``root`` slots to ``targets``, each after all that feed it."""

    steps: tuple[Step, ...]
    targets: frozenset[Slot]

    @cached_property
    def reaches(self) -> frozenset[Node]:
        """The nodes on a path to a target."""
        return frozenset(step.node for step in self.steps)


def prune(roots: Sequence[Node], targets: Sequence[Slot]) -> Graph:
    """The nodes on a path from a root to a target, in topological order."""
    goals = {node for node, _ in targets}
    order, reaches = _postorder(roots, goals)
    known = {node: metas(node) for node in order if reaches[node]}
    steps = []
    for node in reversed(order):
        if node not in known:
            continue
        edges: list[Edge | None] = []
        for child, slot in node.next_functions:
            if child is None or child not in known:
                edges.append(None)
            else:
                edges.append(Edge(child, slot, known[child][slot]))
        steps.append(Step(node, node.name(), known[node], tuple(edges)))
    return Graph(tuple(steps), frozenset(targets))


def _postorder(roots: Sequence[Node], goals: set[Node]) -> tuple[list[Node], dict[Node, bool]]:
    """Nodes below the roots, children first, and whether each leads to a goal; no recursion."""
    order: list[Node] = []
    reaches: dict[Node, bool] = {}
    for root in roots:
        stack: list[tuple[Node, list[Node] | None]] = [(root, None)]
        while stack:
            node, children = stack.pop()
            if node in reaches:
                continue
            if children is None:  # on the way down
                children = [c for c, _ in node.next_functions if c is not None]
                stack.append((node, children))
                stack.extend((c, None) for c in children if c not in reaches)
            else:
                reaches[node] = node in goals or any(reaches[c] for c in children)
                order.append(node)
    return order, reaches


# A node that Python has seen is freed by its Python object, which frees the nodes below from inside
# its own end, one call in the other: some 10,000 in a row overflow the stack of a thread.
DEEP = 1_000
_held: list[list[Node]] = []


def hold(roots: Sequence[Node]) -> None:
    """Keep every node below these from being freed until ``let_go``."""
    _held.append(_postorder(roots, set())[0])


def held() -> bool:
    """Whether there is anything to let go."""
    return bool(_held)


def let_go(restore: Callable[[], None]) -> None:
    """Free the nodes that are held, each before those below it.

    Nothing else may refer to the graphs any more: no tensor, no step, no frame of a traceback;
    ``restore`` sees to the module, which may keep what it computed.
    """
    if _held:
        restore()
    while _held:
        nodes = _held.pop()
        while nodes:
            nodes.pop()


@contextlib.contextmanager
def taken_apart(restore: Callable[[], None]) -> Iterator[None]:
    """Let go after an error in this block, whose traceback would keep graphs alive."""
    try:
        yield
    except BaseException as error:  # an interrupt too; it goes on as it came
        reason: BaseException | None = error
        while held() and reason is not None:
            traceback.clear_frames(reason.__traceback__)
            reason = reason.__cause__ or reason.__context__
        let_go(restore)
        raise
