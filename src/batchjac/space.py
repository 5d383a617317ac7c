"""What a linear map takes or gives: tensors in the nesting of the caller, all of known shape.

Inside, one tensor is a ``Block`` of columns, ``[K, *shape]``. Outside it is the tensor itself, or
with many columns ``[*shape, K]``, as in a matrix product.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.errors import InputError, InputTypeError, SelectionError
from batchjac.problem import check_boundary
from batchjac.state import normal
from batchjac.tree import Tree, flatten


@dataclass(frozen=True)
class Axes:
    """One tensor: ``[N, *inner]``, or ``[*inner]`` where all samples share it."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    shared: bool = False

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape for one sample."""
        return self.shape if self.shared else self.shape[1:]

    @property
    def width(self) -> int:
        """The entries of one sample."""
        return math.prod(self.inner)


@dataclass(frozen=True)
class Space:
    """Tensors nested as the caller nests them; ``None`` for what has no derivative.

    Law: ``nest(parts(v)) == v`` where v holds ``None`` for what has no derivative.
    """

    tree: Tree

    @property
    def leaves(self) -> tuple[Axes, ...]:
        """The tensors, in order; flat indices count through them."""
        return tuple(a for a in self.tree.leaves if a is not None)

    @property
    def width(self) -> int:
        """The entries of one sample, of all tensors."""
        return sum(a.width for a in self.leaves)

    @property
    def shared(self) -> bool:
        """Whether there is something that all samples share: a parameter."""
        return any(a.shared for a in self.leaves)

    @property
    def dtype(self) -> torch.dtype:
        """The widest."""
        return functools.reduce(torch.promote_types, (a.dtype for a in self.leaves))

    @property
    def words(self) -> str:
        """The axes, for people."""
        return " + ".join(f"{a.path.lstrip('.') or ''}{list(a.shape)}" for a in self.leaves)

    def parts(self, value: Any, what: str) -> tuple[list[Block], bool]:
        """The tensors of a value as blocks of columns, and whether it came with many columns."""
        given = flatten(value)
        if given.paths != self.tree.paths:
            raise InputError(
                f"{what} is nested as {_paths(given.paths)}, expected {_paths(self.tree.paths)}, "
                f"one tensor for each of {self.words}"
            )
        pairs = [
            (axes, leaf)
            for axes, leaf in zip(self.tree.leaves, given.leaves, strict=True)
            if axes is not None
        ]
        for axes, leaf in pairs:
            _check_kind(axes, leaf, what)
        extra = [tuple(leaf.shape[len(axes.shape) :]) for axes, leaf in pairs]
        fits = all(tuple(leaf.shape[: len(axes.shape)]) == axes.shape for axes, leaf in pairs)
        if not fits or len(set(extra)) > 1 or len(extra[0]) > 1:
            came = ", ".join(f"{what}{axes.path} {list(leaf.shape)}" for axes, leaf in pairs)
            raise InputError(
                f"got {came}; expected {self.words}, or the same with one axis more at the end for "
                "several columns"
            )
        many = bool(extra[0])
        return [
            Block(leaf.movedim(-1, 0) if many else leaf.unsqueeze(0), axes.shape)
            for axes, leaf in ((a, normal(t)) for a, t in pairs)
        ], many

    def nest(self, blocks: Sequence[Block], many: bool) -> Any:
        """The blocks in the caller's nesting; their columns last, or none where there is one."""
        found = iter(blocks)
        leaves = [None if axes is None else next(found).full() for axes in self.tree.leaves]
        return self.tree.build(
            [t if t is None else t.movedim(0, -1) if many else t.squeeze(0) for t in leaves]
        )

    def split(self, flat: Tensor) -> list[Block]:
        """Flat entries ``[K, N or 1, width]``, the same for all samples where it says 1."""
        sizes = [a.width for a in self.leaves]
        blocks = []
        for axes, part in zip(self.leaves, flat.split(sizes, dim=2), strict=True):
            data = part.reshape(*part.shape[:2], *axes.inner).to(axes.device, axes.dtype)
            blocks.append(Block(data.squeeze(1) if axes.shared else data, axes.shape))
        return blocks

    def flat(self, blocks: Sequence[Block]) -> Tensor:
        """The other way: ``[K, N, width]``, or ``[K, 1, width]`` where all samples share it."""
        parts = []
        for axes, block in zip(self.leaves, blocks, strict=True):
            data = block.full().unsqueeze(1) if axes.shared else block.full()
            parts.append(data.flatten(2) if data.dim() > 2 else data.unsqueeze(2))
        if len(parts) == 1:
            return parts[0]
        samples = max(p.shape[1] for p in parts)
        return torch.cat([p.expand(-1, samples, -1) for p in parts], dim=2)

    def basis(self, entries: Sequence[int]) -> list[Block]:
        """One column for each of these flat entries, 1 there, the same for every sample."""
        first = self.leaves[0]
        data = torch.zeros(len(entries), 1, self.width, dtype=first.dtype, device=first.device)
        index = torch.tensor(list(entries), dtype=torch.int64, device=first.device)
        data[torch.arange(len(entries), device=first.device), 0, index] = 1
        return self.split(data)

    def random(self, count: int, samples: int, generator: torch.Generator | None) -> list[Block]:
        """Columns of independent random signs, each sample its own."""
        first = self.leaves[0]
        device = drawn_on(generator, first.device)
        signs = torch.randint(0, 2, (count, samples, self.width), generator=generator,
                              device=device)  # fmt: skip
        return self.split((2 * signs - 1).to(first.device, first.dtype))


def drawn_on(generator: Any, device: torch.device) -> torch.device:
    """Where random numbers are drawn: on the generator's device, or on this one without one."""
    if generator is None:
        return device
    if not isinstance(generator, torch.Generator):
        raise InputTypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; a seed "
            "makes one, torch.Generator().manual_seed(0)"
        )
    return generator.device


def space(structure: Any, axes: Sequence[Axes | None]) -> Space:
    """The space whose value has the nesting of ``structure``, which holds counted integers."""
    tree = flatten(structure)
    named = tuple(
        None if axes[k] is None else _at(axes[k], path)
        for k, path in zip(tree.leaves, tree.paths, strict=True)
    )
    return Space(Tree(named, tree.paths, tree.build))


def _at(axes: Axes | None, path: str) -> Axes | None:
    return axes and Axes(path, axes.shape, axes.dtype, axes.device, axes.shared)


def _paths(paths: Sequence[str]) -> str:
    return "(" + ", ".join(path or "one tensor" for path in paths) + ")"


def _check_kind(axes: Axes, leaf: Any, what: str) -> None:
    if not isinstance(leaf, Tensor):
        raise InputTypeError(
            f"{what}{axes.path} must be a tensor {list(axes.shape)}, got {type(leaf).__name__}; "
            "convert arrays with torch.as_tensor, and pass zeros for what does not change"
        )
    if leaf.is_complex():
        raise InputTypeError(
            f"{what}{axes.path} is {leaf.dtype}, and this operator is real; apply it to the real "
            "and to the imaginary part"
        )
    check_boundary(f"{what}{axes.path}", leaf)
    if leaf.dtype != axes.dtype or leaf.device != axes.device:
        raise InputTypeError(
            f"{what}{axes.path} is {leaf.dtype} on {leaf.device}, this operator is {axes.dtype} on "
            f"{axes.device}; convert it with .to({str(axes.device)!r}, {axes.dtype})"
        )


def renamed(blocks: Sequence[Block], into: Space) -> list[Block]:
    """Blocks of one space as those of another with the same tensors."""
    return [Block(b.data, a.shape) for b, a in zip(blocks, into.leaves, strict=True)]


def apart(block: Block) -> Block:
    """Rows ``[K, 1, *s]`` as ``[K * N, N, *s]``: one sample's at a time, the others zero."""
    n = block.shape[0]
    data = torch.zeros(block.rows, n, n, *block.shape[1:], dtype=block.data.dtype,
                       device=block.data.device)  # fmt: skip
    own = torch.arange(n, device=data.device)
    data[:, own, own] = block.full()
    return Block(data.flatten(0, 1), block.shape)


def nested(space: Space, leaves: Sequence[Any]) -> Any:
    """Anything for each tensor, in the nesting of the space."""
    found = iter(leaves)
    return space.tree.build([None if a is None else next(found) for a in space.tree.leaves])


def entries_of(key: Any, size: int, what: str) -> tuple[list[int], bool]:
    """Flat indices, and whether their axis goes."""
    if isinstance(key, slice):
        return list(range(*key.indices(size))), False
    if isinstance(key, range):
        key = list(key)
    elif isinstance(key, Tensor) and key.dim() == 1 and key.dtype in (torch.int64, torch.int32):
        key = key.tolist()
    elif not isinstance(key, Tensor) and getattr(key, "ndim", 0) == 1:  # of NumPy and the like
        key = list(key)
    single = hasattr(key, "__index__") and not isinstance(key, bool) and not getattr(key, "ndim", 0)
    found = [key] if single else key
    if not isinstance(found, list) or not all(
        hasattr(k, "__index__") and not isinstance(k, bool) for k in found
    ):
        raise InputTypeError(
            f"{what} must be an int, a slice, a range, a list of int, or a 1-D array of integers "
            f"or LongTensor, got {_kind(key)}"
        )
    wrong = [k for k in found if not -size <= int(k) < size]
    if wrong:
        raise SelectionError(
            f"{what} {wrong[0]} is out of range: flat indices go from 0 to {size - 1}"
        )
    return [int(k) % size for k in found], single


def _kind(key: Any) -> str:
    return f"{key.dtype} {list(key.shape)}" if isinstance(key, Tensor) else type(key).__name__


def only(block: Block, samples: Sequence[int]) -> Block:
    """The part of these samples."""
    shape = (len(samples), *block.shape[1:])
    every = block.data.shape[1] == 1 or len(samples) == block.data.shape[1]
    return Block(block.data if every else block.data[:, list(samples)], shape)


def part(block: Block, samples: slice) -> Block:
    """The part of these samples."""
    count = samples.stop - samples.start
    data = block.data if block.data.shape[1] == 1 else block.data[:, samples]
    return Block(data, (count, *block.shape[1:]))


def joined(parts: Sequence[Sequence[Block]], into: Space) -> list[Block]:
    """Every tensor of all chunks of samples."""
    columns = zip(*parts, strict=True)
    return [_joined(column, axes) for column, axes in zip(columns, into.leaves, strict=True)]


def _joined(column: Sequence[Block], axes: Axes) -> Block:
    """One tensor of all chunks of samples: side by side, or their sum where they share it."""
    if len(column) == 1:
        return Block(column[0].data, axes.shape)
    if axes.shared:
        total = column[0]
        for block in column[1:]:
            total = total.plus(block)
        return total
    return Block(torch.cat([b.full() for b in column], dim=1), axes.shape)
