"""A route followed on a graph: rows down, columns up, and Jacobians joined at cuts.

Law: equal to the plain walk from the output to the target. Assumes what the walk does, and that
every path passes the cuts, which ``cuts`` finds and ``between`` holds to.

A Jacobian of cut ``a`` by cut ``b`` is a tensor ``[N, rows, columns]`` here, or ``[1, ...]`` where
it is the same for all samples, in whatever order of memory it was computed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from batchjac import kernels
from batchjac.block import Block
from batchjac.cuts import Places, between
from batchjac.engines.forward import tangents
from batchjac.engines.sweep import Kernels, Walk, walk
from batchjac.graph import Graph, Meta, Slot, Step, metas
from batchjac.route import Chain, Down, Forward, Join, Reverse, Route, Up, Weight, live
from batchjac.seeds import Seeds


class NoRoute(Exception):
    """A route that was chosen cannot be followed; ``loud`` where something is wrong with it."""

    def __init__(self, reason: str, loud: bool = False) -> None:
        super().__init__(reason)
        self.loud = loud


@dataclass(frozen=True)
class Piece:
    """Part ``[N, rows, columns]`` of a Jacobian, where it starts, and if it was written there."""

    row: int
    column: int
    data: Tensor
    placed: bool = False


@dataclass(frozen=True)
class Way:
    """The graph from the output to one target, its cuts, and the rows that are asked for.

    ``places`` says where the samples are when all of them share the target, as they do a
    parameter: rows toward it are then kept per sample. ``units`` rows or columns go at a time.
    """

    graph: Graph
    cuts: tuple[Slot, ...]
    seeds: Seeds
    kernels: Kernels
    places: Places | None
    chain: Chain
    room: int
    create_graph: bool
    walk: Walk = walk

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.seeds.output[0]

    @cached_property
    def every(self) -> bool:
        """Whether all outputs are asked for, in their order."""
        return self.seeds.every

    def meta(self, cut: int) -> Meta:
        """Shape and dtype of a cut."""
        node, k = self.cuts[cut]
        return metas(node)[k]

    def between(self, upper: int, lower: int) -> Graph:
        """The steps from one cut to another."""
        return between(self.graph, self.cuts[upper], self.cuts[lower])

    def units(self, route: Route, total: int) -> int:
        """How many of this step's rows or columns are computed at a time, in equal parts."""
        most = total if self.create_graph else max(1, self.room // live(route, self.chain))
        return math.ceil(total / max(1, math.ceil(total / most)))

    def shared(self, cut: int) -> bool:
        """Whether this is the target, and one for all samples."""
        return self.places is not None and cut == len(self.cuts) - 1

    def entries(self, cut: int) -> tuple[int, ...]:
        """The shape of one sample's part of a cut."""
        shape = self.meta(cut).shape
        return shape if self.shared(cut) else shape[1:]

    def pieces(self, route: Route, out: Tensor | None = None) -> Iterator[Piece]:
        """The Jacobian that the route leads to, in chunks of its rows or of its columns.

        ``out`` is where it goes, ``[N, rows, columns]``; a product is written there directly.
        """
        with torch.set_grad_enabled(self.create_graph):
            match route:
                case Weight():
                    yield Piece(0, 0, self._weight(route))
                case Reverse():
                    yield from self._identity_down(route)
                case Down():
                    yield from self._down(route, self.jacobian(route.above))
                case Forward():
                    yield from self._identity_up(route)
                case Up():
                    yield from self._up(route, self.jacobian(route.below))
                case Join():
                    above, below = self.jacobian(route.above), self.jacobian(route.below)
                    yield from self._join(route, above, below, out)

    def jacobian(self, route: Route) -> Tensor:
        """All of it: ``[N, rows, columns]``."""
        found = list(self.pieces(route))
        if len(found) == 1:
            return found[0].data
        if found[-1].column:  # joined in the order in which they lie in memory
            return torch.cat([p.data.permute(2, 0, 1) for p in found]).permute(1, 2, 0)
        return torch.cat([p.data.transpose(0, 1) for p in found]).transpose(0, 1)

    def _weight(self, route: Weight) -> Tensor:
        """A linear layer's own matrix, or the rows of it that are asked for."""
        step = self.between(route.upper, route.lower).steps[0]
        self.kernels.took(step.name, "rule")
        w = weight(step)
        assert w is not None, "the planner took a node for a linear layer"
        return self._selected(w.t().unsqueeze(0)) if route.upper == 0 else w.t().unsqueeze(0)

    def _identity_down(self, route: Reverse) -> Iterator[Piece]:
        meta, n = self.meta(route.upper), math.prod(self.entries(route.upper))
        rows = self.seeds.width if route.upper == 0 else n
        graph = self.between(route.upper, route.lower)
        units = self.units(route, rows)
        for start in range(0, rows, units):
            if route.upper == 0:
                block = self.seeds.block(start, start + units)
            else:
                data = _eye(start, min(rows, start + units), n, meta)
                block = Block(data.reshape(-1, 1, *meta.shape[1:]), meta.shape)
            yield Piece(start, 0, self._pushed(graph, route, block))

    def _down(self, route: Down, above: Tensor) -> Iterator[Piece]:
        shape = self.meta(route.above.lower).shape
        graph = self.between(route.above.lower, route.lower)
        units = self.units(route, above.shape[1])
        for start in range(0, above.shape[1], units):
            rows = above[:, start : start + units].transpose(0, 1)
            block = Block(rows.reshape(*rows.shape[:2], *shape[1:]), shape)
            below = Reverse(route.above.lower, route.lower, 0.0)
            yield Piece(start, 0, self._pushed(graph, below, block))

    def _pushed(self, graph: Graph, route: Route, block: Block) -> Tensor:
        """Rows of the upper cut at the lower one, as ``[N, rows, columns]``."""
        upper, lower = self.cuts[route.upper], self.cuts[route.lower]
        seeds = {upper: block}
        found = self.walk(graph, seeds, self.kernels, self.places, self.create_graph).get(lower)
        size = self.entries(route.lower)
        if found is None:
            return self._zeros(route.lower, block.rows, math.prod(size))
        if self.shared(route.lower):  # rows and samples in one axis
            return found.full().reshape(block.rows, self.samples, -1).transpose(0, 1)
        data = found.data
        return data.expand(*data.shape[:2], *size).reshape(*data.shape[:2], -1).transpose(0, 1)

    def _identity_up(self, route: Forward) -> Iterator[Piece]:
        meta, size = self.meta(route.lower), self.entries(route.lower)
        lead = () if self.shared(route.lower) else (1,)
        graph = self.between(route.upper, route.lower)
        columns = math.prod(size)
        units = self.units(route, columns)
        for start in range(0, columns, units):
            data = _eye(start, min(columns, start + units), columns, meta)
            block = Block(data.reshape(-1, *lead, *size), meta.shape)
            yield Piece(0, start, self._pulled(graph, route.upper, route.lower, block))

    def _up(self, route: Up, below: Tensor) -> Iterator[Piece]:
        meta = self.meta(route.below.upper)
        graph = self.between(route.upper, route.below.upper)
        units = self.units(route, below.shape[2])
        for start in range(0, below.shape[2], units):
            columns = below[:, :, start : start + units].permute(2, 0, 1).to(meta.dtype)
            block = Block(columns.reshape(*columns.shape[:2], *meta.shape[1:]), meta.shape)
            yield Piece(0, start, self._pulled(graph, route.upper, route.below.upper, block))

    def _pulled(self, graph: Graph, upper: int, lower: int, block: Block) -> Tensor:
        """Columns of the lower cut at the upper one, as ``[N, rows, columns]``."""
        root = self.cuts[upper]
        found = tangents(graph, {self.cuts[lower]: block}, root, self.create_graph)
        for step in graph.steps:
            if any(step.edges):
                self.kernels.took(step.name, "rule")
        size = self.entries(upper)
        if found is None:
            found = Block(block.data.new_zeros(block.rows, *(1,) * (1 + len(size))),
                          self.meta(upper).shape)  # fmt: skip
        data = found.data
        data = data.expand(*data.shape[:2], *size).reshape(*data.shape[:2], -1).permute(1, 2, 0)
        return self._selected(data) if upper == 0 else data

    def _selected(self, jacobian: Tensor) -> Tensor:
        """The rows that are asked for, of all rows of the output."""
        if self.every:
            return jacobian
        entries = self.seeds.entries
        if entries.dim() == 1:
            return jacobian.index_select(1, entries)
        each = torch.arange(self.samples, device=entries.device)
        return jacobian.expand(self.samples, -1, -1)[each[:, None], entries.T]

    def _join(
        self, route: Join, above: Tensor, below: Tensor, out: Tensor | None
    ) -> Iterator[Piece]:
        below = below.to(above.dtype)
        if not (_finite(above) and _finite(below)):
            # 0 * inf: a masked entry is 0 in a walk, and NaN in a product
            raise NoRoute("the Jacobians on the way are not finite")
        if len(above) > 1 and len(below) > 1 and out is not None and out.dtype == above.dtype:
            yield Piece(0, 0, product(above, below, out), placed=True)
            return
        if len(above) == 1 and not below.permute(2, 0, 1).is_contiguous():
            below = below.transpose(0, 1).contiguous().transpose(0, 1)  # once for all chunks
        units = self.units(route, above.shape[1])
        for start in range(0, above.shape[1], units):
            yield Piece(start, 0, product(above[:, start : start + units], below))

    def _zeros(self, cut: int, rows: int, columns: int) -> Tensor:
        meta = self.meta(cut)
        return torch.zeros((), dtype=meta.dtype, device=meta.device).expand(1, rows, columns)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a[n v k] b[n k i]``; a factor that all samples share is one matrix for all."""
    if len(a) > 1 and len(b) > 1:
        return kernels.batched(a, b, out)
    if len(b) == 1:
        flat = a.transpose(0, 1)  # rows come first in memory where rows were pushed down
        return kernels.linear(flat, b[0].t()).transpose(0, 1)
    columns = b.permute(2, 0, 1)
    if columns.is_contiguous():
        return kernels.linear(columns, a[0]).permute(1, 2, 0)
    rows = b.transpose(0, 1)
    found = kernels.linear(a[0], rows.reshape(len(rows), -1).t())
    return found.view(len(found), *rows.shape[1:]).transpose(0, 1)


def weight(step: Step) -> Tensor | None:
    """``w[i, o]`` where the node is ``y = x w`` or ``b + x w`` for rows ``x`` that are samples.

    Of a node that is asked for ``x`` alone: its Jacobian is ``w`` whatever the sample.
    """
    left = {"MmBackward0": 0, "AddmmBackward0": 1}.get(step.name)
    wanted = [k for k, e in enumerate(step.edges) if e is not None]
    if left is None or wanted != [left] or step.outputs[0].dtype.is_complex:
        return None
    w = step.saved("mat2")
    alpha = step.saved("alpha") if step.has("alpha") else 1
    scaled: Tensor = w if alpha == 1 else w * alpha
    return scaled


def _finite(tensor: Tensor) -> bool:
    """Whether all entries are; a sum that overflows is taken for one that is not."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.detach().sum(dtype=wide).isfinite())


def _eye(start: int, stop: int, size: int, meta: Meta) -> Tensor:
    """Rows ``start`` to ``stop`` of the identity."""
    rows = torch.zeros(stop - start, size, dtype=meta.dtype, device=meta.device)
    rows[:, start:stop].fill_diagonal_(1)
    return rows
