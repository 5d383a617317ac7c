"""A walk written down as a graph of tensor operations, valid for every graph of the same kind.

Rules read a graph in two ways only, ``Step.saved`` and ``Step.called``; what they do depends on
that, on the nodes and edges, and on shapes. So a first walk notes what is read; the same walk then
goes over stand-ins that have shapes and no numbers, while torch writes down the operations. Where
a rule lets a number decide, torch raises: there is no stand-in for it. Every tensor that was read
is an argument of what is written down; everything else that was read is part of the ``Reads``,
which must be equal before it is used again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from batchjac.block import Block
from batchjac.engines.sweep import Kernels, Places, walk
from batchjac.graph import Graph, Slot, Step

_LONGEST = 1_000  # steps: a compiler takes minutes over more

Get = Callable[[Step], Any]
Seeds = Mapping[Slot, Block]


class Refused(Exception):
    """Why a walk cannot be written down."""


@dataclass(frozen=True)
class Read:
    """What a rule read: of which step, how it is got, and all of it but the tensors' numbers."""

    step: int
    name: str
    get: Get
    value: Any


@dataclass(frozen=True)
class Noted:
    """One walk: what its rules read, the blocks it found and how its nodes were computed."""

    reads: tuple[Read, ...]
    values: list[Any]
    tensors: list[Tensor]
    found: dict[Slot, Block]
    kernels: Kernels


@dataclass(frozen=True)
class _Watched(Step):
    """A step that asks ``reader`` for what its rules read."""

    reader: Callable[[str, Get], Any]

    def saved(self, name: str) -> Any:
        return self.reader(name, _Saved(name))

    def called(self, name: str, get: Get) -> Any:
        return self.reader(f"called {name}", get)


@dataclass(frozen=True)
class _Saved:
    name: str

    def __call__(self, step: Step) -> Any:
        return Step.saved(step, self.name)


def _watched(graph: Graph, reader: Callable[[int, str, Get], Any]) -> Graph:
    def of(k: int, step: Step) -> Step:
        own = {f.name: getattr(step, f.name) for f in fields(Step)}
        return _Watched(**own, reader=lambda name, get: reader(k, name, get))

    return Graph(tuple(of(k, step) for k, step in enumerate(graph.steps)), graph.targets)


def signature(graph: Graph, seeds: Seeds, places: Places | None) -> tuple[Any, ...]:
    """Nodes, edges, shapes, seeds and sample axes of a walk: all but what rules will read."""
    index = {step.node: k for k, step in enumerate(graph.steps)}

    def slot(node: Any, k: int) -> tuple[int, int]:
        return index.setdefault(node, len(index)), k

    steps = tuple(
        (
            *(step.name, type(step.node), step.outputs),
            tuple(e and (*slot(e.node, e.slot), e.meta) for e in step.edges),
            places and tuple(places.get((step.node, k)) for k in range(len(step.outputs))),
        )
        for step in graph.steps
    )
    rows = tuple((*slot(*s), describe(block.data, []), block.shape) for s, block in seeds.items())
    return steps, rows, frozenset(slot(*target) for target in graph.targets)


def describe(value: Any, tensors: list[Tensor]) -> Any:
    """All of a value but the numbers in its tensors, which are appended to ``tensors``."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise Refused(f"a saved tensor is of the kind {type(value).__name__}")
        tensors.append(value)
        turned = (value.is_conj(), value.is_neg())
        return (value.shape, value.stride(), value.dtype, value.device, turned)
    if isinstance(value, tuple | list):
        return (type(value), *(describe(v, tensors) for v in value))
    if isinstance(value, float):
        return value.hex()  # tells 0.0 from -0.0, and finds nan equal to itself
    if isinstance(value, complex):
        return (value.real.hex(), value.imag.hex())
    if value is None or isinstance(value, int | str | torch.dtype | torch.device):
        return (type(value), value)
    raise Refused(f"a rule reads a value of the kind {type(value).__name__}")


def arguments(reads: Sequence[Read], graph: Graph, seeds: Seeds) -> list[Tensor] | None:
    """The tensors to replay with; None where something else is read than was written down."""
    tensors = [block.data for block in seeds.values()]
    for read in reads:
        if describe(read.get(graph.steps[read.step]), tensors) != read.value:
            return None
    return tensors


def note(graph: Graph, seeds: Seeds, places: Places | None) -> Noted:
    """Walk, and note what is read."""
    values: dict[tuple[int, str], tuple[Get, Any]] = {}

    def reader(k: int, name: str, get: Get) -> Any:
        if (k, name) not in values:
            values[k, name] = (get, get(graph.steps[k]))
        return values[k, name][1]

    kernels, tensors = Kernels(), [block.data for block in seeds.values()]
    found = walk(_watched(graph, reader), seeds, kernels, places)
    reads = [
        Read(k, name, get, describe(value, tensors)) for (k, name), (get, value) in values.items()
    ]
    return Noted(tuple(reads), [v for _, v in values.values()], tensors, found, kernels)


def refuse(graph: Graph) -> None:
    """Raise where a graph cannot be written down, as far as its nodes show it."""
    if len(graph.steps) > _LONGEST:
        raise Refused(f"the graph has {len(graph.steps)} nodes, more than {_LONGEST}")
    for step in graph.steps:
        # its backward may read anything
        if isinstance(step.node, BackwardCFunction) and any(step.edges):
            raise Refused(f"{step.name} is a user's own function")


def write(graph: Graph, seeds: Seeds, places: Places | None, noted: Noted) -> torch.fx.GraphModule:
    """The same walk as a function of its seeds and of what was read."""
    if noted.kernels.slow:
        raise Refused(f"no rule for {', '.join(noted.kernels.slow)}")

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        rows = {slot: Block(next(rest), block.shape) for slot, block in seeds.items()}
        table = {
            (read.step, read.name): _stand_in(value, rest)
            for read, value in zip(noted.reads, noted.values, strict=True)
        }

        def reader(k: int, name: str, get: Get) -> Any:
            if (k, name) not in table:
                raise Refused(f"{graph.steps[k].name} reads {name} of stand-ins alone")
            return table[k, name]

        found = walk(_watched(graph, reader), rows, Kernels(), places)
        if found.keys() != noted.found.keys():
            raise Refused("the walk over stand-ins goes elsewhere")
        return tuple(found[slot].data for slot in noted.found)

    from torch.fx.experimental.proxy_tensor import make_fx

    given = [tensor.detach() for tensor in noted.tensors]
    module = make_fx(flat, tracing_mode="fake")(*given)
    kept = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    if kept:  # a tensor that is no argument: it could hold this input's numbers
        raise Refused(f"a rule reads a tensor beside what was saved ({kept[0]})")
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _stand_in(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, list):
        return [_stand_in(v, tensors) for v in value]
    if isinstance(value, tuple):
        return tuple(_stand_in(v, tensors) for v in value)
    return value
