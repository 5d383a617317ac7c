"""A walk written down as a graph of tensor operations, valid for every graph of the same kind.

Rules read a graph in two ways only, ``Step.saved`` and ``Step.called``; what they compute depends
on that, on the nodes and edges, and on shapes. (They also look at nodes further down, which decides
kernels and orders in memory, never a value.) So a first walk notes what is read; the same walk then
goes over stand-ins that have shapes and no numbers, while torch writes down the operations. Where
a rule lets a number decide, torch raises: there is no stand-in for it. Every tensor that was read
is an argument of what is written down; everything else that was read is part of the ``Reads``,
which must be equal before it is used again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.fx import GraphModule

from batchjac.block import Block
from batchjac.engines.sweep import Kernels, Places, walk
from batchjac.graph import Graph, Slot, Step

_LONGEST = 1_000  # steps: a compiler takes minutes over more

Get = Callable[[Step], Any]


class Refused(Exception):
    """Why a walk cannot be written down."""


@dataclass(frozen=True)
class Read:
    """What a rule read: of which step, how it is got, and all of it but the tensors' numbers."""

    step: int
    name: str
    get: Get
    described: Any


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


@dataclass(frozen=True)
class Task:
    """A walk to be done: the arguments of ``sweep.walk`` that say what it computes."""

    graph: Graph
    seeds: Mapping[Slot, Block]
    places: Places | None

    def walk(self, kernels: Kernels) -> dict[Slot, Block]:
        """Do it."""
        return walk(self.graph, self.seeds, kernels, self.places)

    @cached_property
    def index(self) -> dict[Any, int]:
        """Where each node is among the steps."""
        return {step.node: k for k, step in enumerate(self.graph.steps)}

    @property
    def signature(self) -> tuple[Any, ...]:
        """Nodes, edges, shapes, seeds and sample axes: all but what rules will read."""
        index, places = dict(self.index), self.places

        def slot(node: Any, k: int) -> tuple[int, int]:
            return index.setdefault(node, len(index)), k

        steps = tuple(
            (
                *(step.name, type(step.node), step.outputs),
                tuple(e and (*slot(e.node, e.slot), e.meta) for e in step.edges),
                places and tuple(places.get((step.node, k)) for k in range(len(step.outputs))),
            )
            for step in self.graph.steps
        )
        rows = tuple(
            (*slot(*at), describe(block.data, []), block.shape) for at, block in self.seeds.items()
        )
        return steps, rows, frozenset(slot(*target) for target in self.graph.targets)

    def arguments(self, reads: Sequence[Read]) -> list[Tensor] | None:
        """The tensors to replay with; None where something else is read than was written down."""
        tensors, steps = [block.data for block in self.seeds.values()], self.graph.steps
        try:
            for read in reads:
                if describe(read.get(steps[read.step]), tensors) != read.described:
                    return None
        except Refused:
            return None
        return tensors

    def refuse(self) -> None:
        """Raise where the walk cannot be written down, as far as the nodes show it."""
        if len(self.graph.steps) > _LONGEST:
            raise Refused(f"the graph has {len(self.graph.steps)} nodes, more than {_LONGEST}")
        for step in self.graph.steps:
            # its backward may read anything
            if isinstance(step.node, BackwardCFunction) and any(step.edges):
                raise Refused(f"{step.name} is a user's own function")

    def note(self) -> Noted:
        """Walk, and note what is read."""
        values: dict[tuple[int, str], tuple[Get, Any]] = {}

        def reader(k: int, name: str, get: Get) -> Any:
            if (k, name) not in values:
                values[k, name] = (get, get(self.graph.steps[k]))
            return values[k, name][1]

        kernels, tensors = Kernels(), [block.data for block in self.seeds.values()]
        found = Task(_watched(self.graph, reader), self.seeds, self.places).walk(kernels)
        reads = tuple(
            Read(k, name, get, describe(value, tensors))
            for (k, name), (get, value) in values.items()
        )
        return Noted(reads, [value for _, value in values.values()], tensors, found, kernels)

    def write(self, noted: Noted) -> GraphModule:
        """The same walk as a function of its seeds and of the tensors that were read."""
        from torch.fx.experimental.proxy_tensor import make_fx

        if noted.kernels.slow:
            raise Refused(f"no rule for {', '.join(noted.kernels.slow)}")

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self._over(noted, iter(tensors))

        # without symbols for sizes, and without numbers where a shape could depend on one: whatever
        # a number decides raises
        stand_ins = FakeTensorMode(allow_fallback_kernels=False)
        given = [stand_ins.from_tensor(tensor.detach()) for tensor in noted.tensors]
        module = make_fx(flat, tracing_mode="fake")(*given)
        kept = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
        if kept:  # a tensor that is no argument: it could hold this input's numbers
            raise Refused(f"a rule reads a tensor beside what was saved ({kept[0]})")
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def _over(self, noted: Noted, tensors: Iterator[Tensor]) -> tuple[Tensor, ...]:
        """The walk over stand-ins for the seeds and for the tensors that were read."""
        rows = {at: Block(next(tensors), block.shape) for at, block in self.seeds.items()}
        table = {
            (read.step, read.name): _stand_in(value, tensors)
            for read, value in zip(noted.reads, noted.values, strict=True)
        }

        def reader(k: int, name: str, get: Get) -> Any:
            if (k, name) not in table:
                raise Refused(f"{self.graph.steps[k].name} reads {name} of stand-ins alone")
            return table[k, name]

        found = Task(_watched(self.graph, reader), rows, self.places).walk(Kernels())
        if found.keys() != noted.found.keys():
            raise Refused("the walk over stand-ins goes elsewhere")
        return tuple(found[slot].data for slot in noted.found)


def _stand_in(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, list):
        return [_stand_in(v, tensors) for v in value]
    if isinstance(value, tuple):
        return tuple(_stand_in(v, tensors) for v in value)
    return value
