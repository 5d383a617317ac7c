"""The one place where rules are found: node name to the few lines that map its blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.autograd.function import BackwardCFunction

from batchjac.block import Block
from batchjac.factors import Factored
from batchjac.graph import Edge, Step
from batchjac.samples import Place, SampleAxis, broadcast

Blocks = Sequence[Block | None]
Reverse = Callable[[Step, Blocks], Any]
Samples = Callable[[Step, SampleAxis], Sequence[Place]]
PerSample = Callable[[Step, Blocks, SampleAxis], Blocks]
Forward = Callable[[Step, Blocks], Any]


class Gathered(Protocol):
    """Rows that reach parts of a tensor, to be put together when all that will come has come."""

    def take(self, other: "Block | Gathered") -> None:
        """Add what else reaches the tensor, in all of it or in parts."""
        ...

    def block(self) -> Block:
        """The rows of the whole tensor, zero where nothing came."""
        ...


Gather = Callable[[Step, Blocks], Gathered]
Factors = Callable[[Step, Blocks, SampleAxis], Sequence[Block | Gathered | None]]
Carry = Callable[[Step, Factored], Factored | None]


@dataclass(frozen=True)
class Rule:
    """What is known about one kind of graph node.

    ``reverse(step, blocks)`` takes one block per output of the node (``None`` where nothing
    arrived) and returns one per edge (``None`` where nothing is wanted or nothing flows). It must
    equal the node called once per row. It may return ``NotImplemented`` for a case it does not
    cover; the node itself is then called.

    ``samples(step, at)`` says where the sample axis of the node's output is in each edge's tensor:
    a ``SampleAxis`` claims that the node keeps samples apart along it, ``SHARED`` that the tensor
    has none, ``None`` that the rule cannot tell.

    ``per_sample(step, blocks, at)`` returns for each ``SHARED`` edge the block of rows
    ``[V*N, *shape]``: one gradient per row *and sample* of what all samples share.

    ``factors(step, blocks, at)`` returns the same as products not yet formed, or some of it; a
    walk whose rows are only multiplied with each other calls it instead of ``per_sample``.

    ``carry(step, factored)`` takes such products through a node that rearranges the parameter;
    ``None`` for a case it does not cover.

    ``gather(step, blocks)`` holds what ``reverse`` would return for the only edge until the parts
    of its neighbours are there: a tensor that was taken apart is then written once. A walk calls it
    instead of ``reverse``; it covers every case.

    ``fresh`` claims that a block for a single edge is new memory, or a block that came in: no view
    of one, nor of what the forward saved. Later nodes may then write into it.
    """

    name: str
    reverse: Reverse
    samples: Samples | None = None
    per_sample: PerSample | None = None
    gather: Gather | None = None
    fresh: bool = False
    factors: Factors | None = None
    carry: Carry | None = None


_RULES: dict[str, Rule] = {}


def rule(
    *names: str,
    samples: Samples | None = None,
    per_sample: PerSample | None = None,
    gather: Gather | None = None,
    fresh: bool = False,
    factors: Factors | None = None,
    carry: Carry | None = None,
) -> Callable[[Reverse], Reverse]:
    """Register a function as the reverse rule of these nodes."""

    def register(reverse: Reverse) -> Reverse:
        for name in names:
            if name in _RULES:
                raise ValueError(f"a rule for {name} is registered already")
            _RULES[name] = Rule(name, reverse, samples, per_sample, gather, fresh, factors, carry)
        return reverse

    return register


def find(step: Step) -> Rule | None:
    """The rule of this node, if there is one; a user's Function may bear any name and has none."""
    if isinstance(step.node, BackwardCFunction):
        return None
    return _RULES.get(step.name)


def names() -> list[str]:
    """The names of all nodes that have a rule."""
    return sorted(_RULES)


_FORWARD: dict[str, Forward] = {}


def forward(*names: str) -> Callable[[Forward], Forward]:
    """Register a function as the forward rule of these nodes.

    It takes one tangent block per edge (``None`` where nothing arrives or the edge is ``None``),
    in the dtype and on the device of the node's first output but each in the shape of its edge,
    and returns one per output (``None`` where nothing flows or the output has no derivative).
    Law: ``<u, forward(t)> = <reverse(u), t>``. It may return ``NotImplemented`` for a case it does
    not cover. Tensors are real: ``find_forward`` holds that.
    """

    def register(push: Forward) -> Forward:
        for name in names:
            if name in _FORWARD:
                raise ValueError(f"a forward rule for {name} is registered already")
            _FORWARD[name] = push
        return push

    return register


def single(*names: str) -> Callable[[Callable[[Step, Block], Any]], Callable[[Step, Block], Any]]:
    """Register the forward rule of nodes with one edge and one derivative: block to block."""

    def register(push: Callable[[Step, Block], Any]) -> Callable[[Step, Block], Any]:
        @forward(*names)
        def every(step: Step, blocks: Blocks) -> Any:
            (tangent,) = blocks
            assert tangent is not None
            found = push(step, tangent)
            return found if found is NotImplemented else first(step, found)

        return push

    return register


def first(step: Step, block: Block | None) -> list[Block | None]:
    """Tangents of a node of whose outputs only the first has a derivative."""
    return [block] + [None] * (len(step.outputs) - 1)


def find_forward(step: Step) -> Forward | None:
    """The forward rule of this node, if there is one; none for a user's Function.

    Nor where anything is complex: a conjugate tells a derivative from its transpose there.
    """
    edges = (e.meta for e in step.edges if e is not None)
    if isinstance(step.node, BackwardCFunction) or any(
        meta.dtype.is_complex for meta in (*step.outputs, *edges)
    ):
        return None
    return _FORWARD.get(step.name)


def forward_names() -> list[str]:
    """The names of all nodes that have a forward rule."""
    return sorted(_FORWARD)


def only(step: Step, blocks: Blocks) -> tuple[Block, Edge]:
    """The block and the edge of a node that has one of each."""
    (block,) = blocks
    (edge,) = step.edges
    assert block is not None
    assert edge is not None
    return block, edge


def elementwise(step: Step, at: SampleAxis) -> list[Place]:
    """Sample places of a node whose every edge is broadcast to its output, entry by entry."""
    shape = step.outputs[0].shape
    return [
        None if e is None else at if e.meta.shape == shape else broadcast(at, shape, e.meta.shape)
        for e in step.edges
    ]
