"""Where the rows of an answer go: a tensor made beforehand, or pieces kept for autograd."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchjac.errors import BatchAxisError, OutError


class Sink(ABC):
    """Takes ``[samples, rows, *target]`` pieces of one Jacobian in any order of chunks.

    Law: ``result()`` is the pieces put together, whatever the chunks were.
    """

    def __init__(self, shape: tuple[int, ...], rows: int) -> None:
        self.shape = shape
        self.rows = rows
        self.wrote: Callable[[int], None] = lambda entries: None  # told how many, after each piece

    def same(self, shape: tuple[int, ...], where: str) -> None:
        """Refuse a chunk whose samples have a Jacobian of another shape."""
        if shape != self.shape:
            raise BatchAxisError(
                f"output{where} changes its size from one chunk of samples to the next: the "
                f"Jacobian of the first was {list(self.shape)}, now it is {list(shape)}. f must "
                "return as many numbers for every sample, whichever come together: pad and mask"
            )

    @abstractmethod
    def put(self, sample: int, row: int, piece: Tensor) -> None:
        """Store a piece whose first entry belongs to this sample and row."""

    @abstractmethod
    def put_columns(self, sample: int, column: int, piece: Tensor) -> None:
        """Store all rows of some entries of the target, ``[samples, rows, entries]``."""

    def part(self, samples: slice) -> Tensor | None:
        """Where these samples go, as ``[samples, rows, entries]``, if they can be written there."""
        return None

    @abstractmethod
    def chunk(self, samples: slice) -> Tensor:
        """The rows of these samples, as they were put: ``[samples, rows, *target]``."""

    @abstractmethod
    def result(self) -> Tensor:
        """The whole Jacobian."""


class Preallocated(Sink):
    """Writes straight into a tensor ``[N, *out, *in]``: the caller's, or a new one.

    ``wrote`` is told how many entries after each piece.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rows: int,
        inner: tuple[int, ...],
        tensor: Tensor,
        wrote: Callable[[int], None],
    ) -> None:
        super().__init__(shape, rows)
        self.tensor = tensor
        self.wrote = wrote
        try:
            self.view = tensor.view(shape[0], rows, *inner)
        except RuntimeError as error:
            raise OutError(
                f"out has strides {tuple(tensor.stride())} that do not let its output axes be seen "
                "as one; pass a contiguous tensor or array"
            ) from error

    def put(self, sample: int, row: int, piece: Tensor) -> None:
        self.view[sample : sample + piece.shape[0], row : row + piece.shape[1]].copy_(piece)
        self.wrote(piece.numel())

    def part(self, samples: slice) -> Tensor | None:
        part = self.view[samples]
        try:
            return part.view(*part.shape[:2], math.prod(part.shape[2:]))
        except RuntimeError:  # the axes of the target are apart in the caller's memory
            return None

    def put_columns(self, sample: int, column: int, piece: Tensor) -> None:
        n, _, width = piece.shape
        part = self.part(slice(sample, sample + n))
        if part is not None:
            part[:, :, column : column + width].copy_(piece)
        else:
            entries = torch.arange(column, column + width, device=self.view.device)
            where = torch.unravel_index(entries, self.view.shape[2:])
            every: tuple[slice | Tensor, ...] = (slice(None), slice(None), *where)
            self.view[sample : sample + n][every] = piece.to(self.view.device, self.view.dtype)
        self.wrote(piece.numel())

    def chunk(self, samples: slice) -> Tensor:
        return self.view[samples]

    def result(self) -> Tensor:
        return self.tensor


class Collected(Sink):
    """Keeps the pieces with their history and joins them at the end."""

    def __init__(self, shape: tuple[int, ...], rows: int) -> None:
        super().__init__(shape, rows)
        self.pieces: dict[int, list[Tensor]] = {}

    def put(self, sample: int, row: int, piece: Tensor) -> None:
        if row == 0:
            self.pieces[sample] = []  # also when a chunk is computed again
        self.pieces[sample].append(piece)

    def put_columns(self, sample: int, column: int, piece: Tensor) -> None:
        raise AssertionError("a history is kept whole, so its columns come together")

    def chunk(self, samples: slice) -> Tensor:
        starts = [n for n in sorted(self.pieces) if samples.start <= n < samples.stop]
        return torch.cat([torch.cat(self.pieces[n], 1) for n in starts])

    def result(self) -> Tensor:
        chunks = [torch.cat(self.pieces[n], 1) for n in sorted(self.pieces)]
        return torch.cat(chunks).reshape(self.shape)


def writable(out: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The caller's ``out`` as a tensor over the same memory, or an error that says why not."""
    expected = f"{list(shape)} of {dtype} on {device}"
    if not isinstance(out, Tensor):
        flags = getattr(out, "flags", None)
        if not hasattr(out, "__array_interface__") or flags is None:
            raise OutError(
                f"out must be a tensor or a NumPy array or memmap, {expected}; got "
                f"{type(out).__name__}"
            )
        if not flags.writeable:
            raise OutError(
                "out is read-only; open the memory map with mode 'r+' or 'w+', or pass a copy"
            )
        try:
            out = torch.from_numpy(out)
        except (TypeError, ValueError) as error:  # byte order, negative strides, odd dtypes
            raise OutError(
                f"out must be {expected}, and torch cannot use this array: {error}"
            ) from error
    if out.layout != torch.strided:
        raise OutError(f"out must be dense, {expected}; got the layout {out.layout}")
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device:
        raise OutError(
            f"out must be {expected}, got {list(out.shape)} of {out.dtype} on {out.device}"
        )
    if out.requires_grad:
        raise OutError("out requires grad; pass a plain buffer such as torch.empty(...)")
    if out.is_inference():
        raise OutError("out was made under inference mode; make it outside, or pass out.clone()")
    if any(n > 1 and step == 0 for n, step in zip(out.shape, out.stride(), strict=True)):
        raise OutError(
            "out is an expanded tensor, whose entries share memory; pass out.contiguous()"
        )
    written: Tensor = out
    return written


def size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize
