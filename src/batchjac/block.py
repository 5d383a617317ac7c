"""A block: all rows of cotangents, or of tangents, that belong to one tensor of the graph.

Rows come first, ``[V, *shape]``. Any axis after the first may have size 1 where the tensor has
more: the rows are then the same all along it. Broadcasting carries that through products, so a
block has no batch axis until something depends on the sample.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows ``data [V, *s]`` for a tensor of ``shape``, each ``s`` equal to the shape's or 1.

    ``owned``: the walk made this memory, and nothing else refers to it.
    """

    data: Tensor
    shape: tuple[int, ...]
    owned: bool = False

    def __post_init__(self) -> None:
        assert self.data.dim() == len(self.shape) + 1, (self.data.shape, self.shape)

    @property
    def rows(self) -> int:
        return int(self.data.shape[0])

    def full(self) -> Tensor:
        """``[V, *shape]``, the repeated axes expanded without a copy."""
        return self.data.expand(self.data.shape[0], *self.shape)

    def with_data(self, data: Tensor) -> "Block":
        return Block(data, self.shape)

    @property
    def writable(self) -> bool:
        """Whether the rows may be overwritten in place by others of the same shape."""
        return self.owned and self.data.shape[1:] == self.shape and 0 not in self.data.stride()

    @property
    def memory(self) -> int:
        """Which memory the rows are in; of stand-ins too, which have no address."""
        return int(self.data.untyped_storage()._cdata)

    def owned_if(self, owned: bool) -> "Block":
        """The same rows, known to be the walk's own or not."""
        return self if owned == self.owned else Block(self.data, self.shape, owned)

    def spread(self, *dims: int) -> Tensor:
        """``data`` with the axes ``dims`` of the tensor at their full size, the others as is."""
        have = self.data.shape
        size = list(have)
        for dim in dims:
            dim %= len(self.shape)
            size[dim + 1] = self.shape[dim]
        return self.data if have == tuple(size) else self.data.expand(size)

    def reshape(self, shape: Sequence[int]) -> "Block":
        """Rows of the tensor reshaped; an axis of size 1 survives where whole axes merge or stay.

        Old and new axes are cut into the shortest groups of equal volume; inside a group the data
        is either all repeated, and stays so, or it is expanded.
        """
        shape = tuple(shape)
        if shape == self.shape:
            return self
        if self.data.shape[1:] == self.shape:
            return Block(self.data.reshape(self.rows, *shape), shape)
        sizes = [self.rows]
        expanded = [self.rows]
        for old, new in _groups(self.shape, shape):
            repeated = all(self.data.shape[1 + d] == 1 for d in old)
            expanded += [1 if repeated else self.shape[d] for d in old]
            sizes += [1 if repeated else shape[d] for d in new]
        return Block(self.data.expand(expanded).reshape(sizes), shape)

    def sum_to(self, shape: Sequence[int]) -> "Block":
        """The rows of a tensor that was broadcast from ``shape``: summed over what was repeated."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        lead = len(self.shape) - len(shape)
        over = [d for d in range(len(self.shape)) if d < lead or shape[d - lead] != self.shape[d]]
        data = self.data
        summed = [d + 1 for d in over if data.shape[d + 1] != 1]
        if summed:
            data = data.sum(summed, keepdim=True)
        copies = math.prod(self.shape[d] for d in over if self.data.shape[d + 1] == 1)
        if copies != 1:
            data = data * copies
        return Block(data.reshape(self.rows, *data.shape[1 + lead :]), shape)

    def broadcast_to(self, shape: Sequence[int]) -> "Block":
        """The rows of a tensor that is broadcast to ``shape``: what is repeated has size 1."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        lead = len(shape) - len(self.shape)
        sizes = (self.rows, *(1,) * lead, *self.data.shape[1:])
        return Block(self.data.reshape(sizes), shape)

    def plus(self, other: "Block") -> "Block":
        """The sum of two blocks of one tensor; in place where the rows may be overwritten."""
        if self.writable:
            self.data.add_(other.data)
            return self
        return other.plus(self) if other.writable else Block(self.data + other.data, self.shape)

    def to(self, dtype: torch.dtype) -> "Block":
        """The same rows in another dtype; complex to real keeps the real part, as autograd does."""
        if self.data.dtype == dtype:
            return self
        data = self.data.real if self.data.is_complex() and not dtype.is_complex else self.data
        return Block(data.to(dtype), self.shape)

    def on(self, device: torch.device) -> "Block":
        """The same rows on another device."""
        return self if self.data.device == device else Block(self.data.to(device), self.shape)


class Waiting(Block):
    """A block whose rows are made when they are read, from ``source``, and kept.

    What comes next may rather take what they are made of.
    """

    source: Tensor

    def _hold(self, **fields: object) -> None:
        """What dataclasses do in a frozen class; ``data`` is computed."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def rows(self) -> int:
        return int(self.source.shape[0])

    @property
    def memory(self) -> int:
        return int(self.source.untyped_storage()._cdata)

    def to(self, dtype: torch.dtype) -> Block:
        return self if dtype == self.source.dtype else super().to(dtype)

    def on(self, device: torch.device) -> Block:
        return self if device == self.source.device else super().on(device)


class Scaled(Waiting):
    """Rows that all samples share, times a diagonal of each sample's own.

    A product that comes next may rather join the shared rows with its matrix, once for all samples.
    ``scale`` multiplies a tensor ``[*, *shape]``, broadcast, by the diagonal; ``selects``: it lets
    entries through or not, and 0 times inf is 0.
    """

    def __init__(self, shared: Block, scale: Callable[[Tensor], Tensor], selects: bool) -> None:
        self._hold(
            shape=shared.shape, shared=shared, source=shared.data, scale=scale, selects=selects
        )

    shared: Block
    scale: Callable[[Tensor], Tensor]
    selects: bool

    @cached_property
    def data(self) -> Tensor:
        return self.scale(self.source)

    def diagonal(self) -> Tensor:
        """The factor of each sample, ``[1, *shape]`` or broadcast to it."""
        data = self.source
        ones = torch.ones((1,) * data.dim(), dtype=data.dtype, device=data.device)
        return self.scale(ones.expand((1,) * (data.dim() - 1) + (self.shape[-1],)))


class Scattered(Waiting):
    """Rows that are zero but for a few places of each plane, which all rows share.

    ``few [V, N, C, P]`` stand at ``index [N, C, P]`` of the planes ``[N, C, *plane]``, flattened,
    each at a place of its own: what a pooling that keeps the maximum hands down. A diagonal that
    comes next need only look at those places, and a convolution skips making the zeros.
    """

    def __init__(self, few: Tensor, index: Tensor, shape: tuple[int, ...]) -> None:
        self._hold(shape=shape, source=few, few=few, index=index)

    few: Tensor
    index: Tensor

    @cached_property
    def data(self) -> Tensor:
        places = self.index.expand(self.few.shape)
        sizes = (*self.few.shape[:3], math.prod(self.shape[2:]))
        flat = self.few.new_zeros(sizes).scatter_(-1, places, self.few)
        return flat.view(self.rows, *self.shape)

    def reshape(self, shape: Sequence[int]) -> Block:
        """Of planes reshaped, in which every place keeps its number, the same few."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        kept = len(shape) > 2 and shape[:2] == self.shape[:2]
        return Scattered(self.few, self.index, shape) if kept else super().reshape(shape)

    def there(self, tensor: Tensor) -> Tensor:
        """A tensor ``[N, C, *plane]`` at those places: ``[N, C, P]``."""
        return tensor.flatten(2).gather(-1, self.index)


def dense(gradient: Tensor) -> Tensor:
    """A gradient as autograd may return it, laid out densely: embeddings give sparse ones."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


@lru_cache(maxsize=1024)
def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes of ``old`` and ``new`` that hold the same number of elements."""
    if 0 in old or 0 in new:
        return [(list(range(len(old))), list(range(len(new))))]
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        while True:
            if a <= b and i < len(old) and (a < b or not left):
                left.append(i)
                a *= old[i]
                i += 1
            elif b <= a and j < len(new) and (b < a or not right):
                right.append(j)
                b *= new[j]
                j += 1
            else:
                break
        groups.append((left, right))
    return groups
