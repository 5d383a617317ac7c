"""Advanced indexing, ``x[i, :, j]``: reading and writing at several index tensors at once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.registry import Blocks, forward, only, rule, single
from batchjac.rules.zeros import onto
from batchjac.samples import Place, SampleAxis, moved


@dataclass(frozen=True)
class _Layout:
    """How ``x[indices]`` of a tensor with ``rank`` axes lies: axes of x, and axes of the result.

    Index tensors broadcast to ``shape``. Side by side, their axes stand in the result where the
    first of them stood in x; apart from each other, they come first.
    """

    indices: tuple[Tensor | None, ...]
    shape: tuple[int, ...]
    first: int  # where the axes of ``shape`` begin in the result
    together: bool

    @property
    def rest(self) -> list[int]:
        """The axes of x that no tensor indexes, in order."""
        return [d for d, i in enumerate(self.indices) if i is None]

    @property
    def places(self) -> list[int]:
        """Where the ``rest`` stand in the result."""
        width = len(self.shape)
        return [k if k < self.first else k + width for k in range(len(self.rest))]


def _layout(indices: tuple[Tensor | None, ...], rank: int) -> _Layout:
    """Masks become the positions where they hold; axes without an index are appended."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found.extend(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    found += [None] * (rank - len(found))
    at = [d for d, i in enumerate(found) if i is not None]
    shape = torch.broadcast_shapes(*(i.shape for i in found if i is not None))
    together = at == list(range(at[0], at[0] + len(at)))
    return _Layout(tuple(found), tuple(shape), at[0] if together else 0, together)


def _rows_last(data: Tensor, layout: _Layout) -> Tensor:
    """With an axis of rows before x, indices that stand apart put their axes before the rows."""
    return data if layout.together else data.movedim(0, len(layout.shape))


def _rows_first(data: Tensor, layout: _Layout) -> Tensor:
    return data if layout.together else data.movedim(len(layout.shape), 0)


def _place(layout: _Layout, at: SampleAxis, size: int, sizes: tuple[int, ...]) -> Place:
    """An axis that no tensor indexes; or one that a tensor counts through, 0, 1, 2, ..."""
    if at.dim in layout.places:
        return moved(at, layout.rest[layout.places.index(at.dim)])
    own = at.dim - layout.first
    for dim, index in enumerate(layout.indices):
        if index is None or sizes[dim] != size:
            continue
        count = torch.arange(size, device=index.device)
        count = count.reshape(-1, *(1,) * (len(layout.shape) - own - 1))
        if torch.equal(index.expand(layout.shape), count.expand(layout.shape)):
            return moved(at, dim)
    return None


def _index_samples(step: Step, at: SampleAxis) -> list[Place]:
    (edge,) = step.edges
    assert edge is not None
    layout = _layout(step.saved("indices"), len(edge.shape))
    return [_place(layout, at, step.shape[at.dim], edge.shape)]


@rule("IndexBackward0", samples=_index_samples)
def index(step: Step, blocks: Blocks) -> Any:
    """``y[k] = x[i_k, j_k, ...]``: ``g[v,k]`` added at ``(i_k, j_k, ...)``."""
    g, edge = only(step, blocks)
    layout = _layout(step.saved("indices"), len(edge.shape))
    data = g.spread(*range(layout.first, layout.first + len(layout.shape)))
    sizes = [g.rows, *edge.shape]
    for dim, k in zip(layout.rest, layout.places, strict=True):
        sizes[dim + 1] = data.shape[k + 1]
    zeros = data.new_zeros(sizes)
    indices = (None, *layout.indices)
    data = onto(zeros, "index_put", indices, _rows_last(data, layout), True)
    return [Block(data, edge.shape)]


@single("IndexBackward0")
def index_forward(step: Step, t: Block) -> Block:
    """``t[v, i_k, j_k, ...]``."""
    layout = _layout(step.saved("indices"), len(t.shape))
    data = t.spread(*(d for d, i in enumerate(layout.indices) if i is not None))
    found = torch.ops.aten.index(data, (None, *layout.indices))
    return Block(_rows_first(found, layout), step.shape)


def _put_samples(step: Step, at: SampleAxis) -> list[Place]:
    """Axes without an index keep samples apart in x; what was written there follows them."""
    layout = _layout(step.saved("indices"), len(step.shape))
    x: Place = at if at.dim in layout.rest else None
    values: Place = None
    written = step.wanted(1)
    if x is not None and written is not None:
        lead = len(layout.rest) + len(layout.shape) - len(written.shape)
        dim = layout.places[layout.rest.index(at.dim)] - lead
        if dim >= 0 and written.shape[dim] == step.shape[at.dim]:
            values = moved(at, dim)
    return [x, values]


@rule("IndexPutBackward0", "IndexPutImplBackward0", samples=_put_samples)
def index_put(step: Step, blocks: Blocks) -> Any:
    """``y = x``, at ``(i_k, j_k, ...)`` replaced by or added to ``z[k]``.

    ``g[v]``, zero at what was replaced; toward z: ``g[v, i_k, j_k, ...]``.
    """
    (g,) = blocks
    assert g is not None
    x, written = step.edges
    layout = _layout(step.saved("indices"), len(g.shape))
    indexed = [d for d, i in enumerate(layout.indices) if i is not None]
    data = g.spread(*indexed)
    indices = (None, *layout.indices)
    found: list[Block | None] = [None, None]
    if x is not None:
        kept = data
        if not step.saved("accumulate"):
            kept = torch.ops.aten.index_put(data, indices, data.new_zeros(()))
        found[0] = g.with_data(kept)
    if written is not None:
        values = _rows_first(torch.ops.aten.index(data, indices), layout)
        shape = [0] * (len(layout.rest) + len(layout.shape))
        shape[layout.first : layout.first + len(layout.shape)] = layout.shape
        for dim, k in zip(layout.rest, layout.places, strict=True):
            shape[k] = g.shape[dim]
        found[1] = Block(values, tuple(shape)).sum_to(written.shape)
    return found


@forward("IndexPutBackward0", "IndexPutImplBackward0")
def index_put_forward(step: Step, blocks: Blocks) -> list[Block | None]:
    """``t_x[v]``, at ``(i_k, j_k, ...)`` replaced by or added to ``t_z[v,k]``.

    Autograd lets everything that was written to one place count there; so the sum of it.
    """
    x, written = blocks[0], blocks[1] if len(blocks) > 1 else None
    some = x or written
    assert some is not None
    layout = _layout(step.saved("indices"), len(step.shape))
    base = some.data.new_zeros(some.rows, *step.shape) if x is None else x.full()
    indices = (None, *layout.indices)
    if x is not None and not step.saved("accumulate"):
        base = torch.ops.aten.index_put(base, indices, base.new_zeros(()))
    if written is not None:
        shape = [0] * (len(layout.rest) + len(layout.shape))
        shape[layout.first : layout.first + len(layout.shape)] = layout.shape
        for dim, k in zip(layout.rest, layout.places, strict=True):
            shape[k] = step.shape[dim]
        values = _rows_last(written.broadcast_to(shape).full(), layout)
        base = torch.ops.aten.index_put(base, indices, values, True)
    return [Block(base, step.shape)]
