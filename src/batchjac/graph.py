"""The recorded graph, pruned to what leads from one set of edges to another.

Only facts that autograd states itself are read: ``next_functions``, ``_input_metadata`` (the shape
and dtype of what flows into a node) and, by the rules, ``_saved_*``.
"""

import contextlib
import functools
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Slot = tuple[Node, int]
T = TypeVar("T")


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
    found = node._input_metadata
    if len(found) == 1:
        (m,) = found
        return _single(tuple(m.shape), m.dtype, m.device)
    return tuple([_single(tuple(m.shape), m.dtype, m.device)[0] for m in found])


@functools.lru_cache(maxsize=4096)
def _single(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Meta, ...]:
    """The nodes of a graph have few kinds of outputs, so each is made once."""
    return (Meta(shape, dtype, device),)


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
        return frozenset([step.node for step in self.steps])

    @cached_property
    def form(self) -> "Form":
        """What it is made of; graphs that are made alike share one."""
        number: dict[Node, int] = {step.node: k for k, step in enumerate(self.steps)}
        inside = len(number)
        key: list[Any] = []  # flat: one tuple for each of thousands of nodes costs more than this
        for step in self.steps:
            key += (step.name, len(step.outputs), len(step.edges))
            for m in step.outputs:
                key += (m.shape, m.dtype, m.device)
            for e in step.edges:
                if e is None:
                    key.append(None)
                    continue
                key += (number.setdefault(e.node, len(number)), e.slot)
                if number[e.node] >= inside:  # of a part of a graph edges lead out
                    key += (e.meta.shape, e.meta.dtype, e.meta.device)
        key += sorted((number[node], k) for node, k in self.targets if node in number)
        return _form(tuple(key)) if inside <= _MOST_STEPS else Form()


class Form:
    """What a graph is made of, whatever its nodes: their names, what flows into them, their wiring.

    ``fact`` remembers what follows from that alone: nothing that a node saved, nor any number in a
    tensor. What holds no tensor, module or node may be remembered.
    """

    def __init__(self) -> None:
        self._facts: dict[Hashable, Any] = {}

    def fact(self, name: Hashable, find: Callable[[], T]) -> T:
        """What ``find`` returns, found once; ``name`` holds all else that it depends on."""
        found: T | None = self._facts.get(name)
        if found is None:
            found = find()
            if len(self._facts) >= _MOST_FACTS:  # another thread may do the same
                self._facts.clear()
            self._facts[name] = found
        return found


_MOST_STEPS, _MOST_FACTS = 4096, 64


@functools.lru_cache(maxsize=64)
def _form(key: tuple[Hashable, ...]) -> Form:
    """The one form of this key."""
    return Form()


def prune(roots: Sequence[Node], targets: Sequence[Slot]) -> Graph:
    """The nodes on a path from a root to a target, in topological order."""
    below: dict[Node, Below] = {}
    order = _postorder(roots, below)
    goals = {node for node, _ in targets}
    known: dict[Node | None, tuple[Meta, ...]] = {}
    for node in order:  # each after all that lie below it
        if node in goals or not known.keys().isdisjoint([child for child, _ in below[node]]):
            known[node] = metas(node)
    steps = [
        Step(
            node, node.name(), known[node],
            tuple([
                Edge(child, slot, known[child][slot]) if child is not None and child in known
                else None
                for child, slot in below[node]
            ]),
        )
        for node in reversed(order)
        if node in known
    ]  # fmt: skip
    return Graph(tuple(steps), frozenset(targets))


Below = tuple[tuple[Node | None, int], ...]


def _postorder(roots: Sequence[Node], below: dict[Node, Below]) -> list[Node]:
    """Nodes below the roots, children first; what lies ``below`` each is noted. No recursion."""
    order: list[Node] = []
    done: set[Node] = set()
    stack = list(reversed(roots))
    while stack:
        node = stack[-1]
        if node not in below:  # on the way down
            below[node] = children = node.next_functions
            stack.extend([c for c, _ in children if c is not None and c not in below])
        else:
            stack.pop()
            if node not in done:
                done.add(node)
                order.append(node)
    return order


# A node that Python has seen is freed by its Python object, which frees the nodes below from inside
# its own end, one call in the other: some 10,000 in a row overflow the stack of a thread.
DEEP = 1_000
_held: list[list[Node]] = []


def hold(roots: Sequence[Node]) -> None:
    """Keep every node below these from being freed until ``let_go``."""
    _held.append(_postorder(roots, {}))


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
