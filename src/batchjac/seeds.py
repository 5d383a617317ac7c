"""The cotangents to push: which outputs, as blocks of rows that all samples share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.errors import InputError, InputTypeError, SelectionError
from batchjac.problem import Coupling


@dataclass(frozen=True)
class Seeds:
    """Rows of the identity on one output ``y [N, *out]``, restricted to the selected outputs.

    ``shape`` is what the rows become in the answer. ``entries [V]`` are flat indices into ``out``,
    the same for all samples, or ``[V, N]``, each sample's own. ``across`` seeds every sample by
    itself, ``[N * V]`` rows: the full coupling.
    """

    output: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    entries: Tensor
    across: bool

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return self.width * (self.output[0] if self.across else 1)

    @property
    def width(self) -> int:
        """How many rows each sample has."""
        return int(self.entries.shape[0])

    @property
    def every(self) -> bool:
        """Whether all outputs are asked for, in their order."""
        width = math.prod(self.output[1:])
        return self.entries.shape == (width,) and bool(
            (self.entries == torch.arange(width, device=self.device)).all()
        )

    @property
    def each_sample(self) -> Tensor:
        """``entries`` as ``[V, N]``, or ``[V, 1]`` where they are the same for all samples."""
        return self.entries if self.entries.dim() == 2 else self.entries.unsqueeze(1)

    def block(self, start: int, stop: int) -> Block:
        """Rows ``start`` to ``stop``: one 1 in each, at its output."""
        n, *out = self.output
        width = math.prod(out)
        stop = min(stop, self.rows)
        if self.across:
            rows = torch.arange(start, stop, device=self.device)
            sample = rows // self.width
            every = self.each_sample.expand(-1, n)
            data = torch.zeros(len(rows), n, width, dtype=self.dtype, device=self.device)
            data[torch.arange(len(rows)), sample, every[rows % self.width, sample]] = 1
        else:
            picked = self.each_sample[start:stop]
            data = torch.zeros(*picked.shape, width, dtype=self.dtype, device=self.device)
            data.scatter_(-1, picked.unsqueeze(-1), 1)
        return Block(data.reshape(stop - start, data.shape[1], *out), self.output)

    def combined(self, weights: Tensor) -> Tensor:
        """The one cotangent ``[N, *out]`` that equals ``sum_v weights[n, v] * row v``."""
        n, *out = self.output
        flat = torch.zeros(n, math.prod(out), dtype=self.dtype, device=self.device)
        picked = self.each_sample.expand(-1, n).T
        flat.scatter_add_(1, picked, weights.to(self.dtype))
        return flat.reshape(self.output)


def seeds(y: Tensor, selection: Any, coupling: Coupling, samples: slice, path: str = "") -> Seeds:
    """The rows for output ``y``, found at ``path``, and the selection as the caller wrote it."""
    where = f"output{path}" if path else "the output"
    shape, entries = _entries(y, selection, samples, where)
    across = coupling == "full"
    return Seeds(tuple(y.shape), y.dtype, y.device, shape, entries.to(y.device), across)


def _entries(
    y: Tensor, selection: Any, samples: slice, where: str
) -> tuple[tuple[int, ...], Tensor]:
    """The shape of the selected outputs and their flat indices."""
    out = tuple(y.shape[1:])
    every = torch.arange(math.prod(out))
    if selection is None:
        return out, every
    if not out:
        raise SelectionError(
            f"outputs={selection!r}: {where} has shape {list(y.shape)}, one number per sample, "
            "so there is nothing to select; leave outputs= out"
        )
    grid = every.reshape(out)
    chosen = _chosen(y, selection, samples, where)
    if isinstance(chosen, Tensor):  # one index per sample
        picked = grid[chosen.cpu()].reshape(len(chosen), -1)
        return out[1:], picked.T.contiguous()
    picked = grid[chosen]
    return tuple(picked.shape), picked.reshape(-1)


def _chosen(y: Tensor, selection: Any, samples: slice, where: str) -> Any:
    """The selection as an index into axis 1: int, slice, list, or a tensor ``[N]``."""
    width = y.shape[1]
    if isinstance(selection, str):
        if selection != "argmax":
            raise InputError(f'outputs must be indices or "argmax", got {selection!r}')
        if y.dim() != 2:
            raise SelectionError(
                f'outputs="argmax" needs an output [N, classes], got {list(y.shape)} from {where}'
            )
        return y.detach().argmax(1)
    if isinstance(selection, bool):
        raise InputTypeError("outputs must be int, list, slice, LongTensor[N] or 'argmax'")
    if _is_index(selection):
        _check_range([int(selection)], width, where)
        return int(selection)
    if isinstance(selection, slice):
        try:
            return list(range(*selection.indices(width)))
        except TypeError as error:
            raise InputTypeError(
                f"outputs as a slice must hold integers, got {selection}"
            ) from error
    if isinstance(selection, Tensor):
        return _per_sample(selection, y, samples, where)
    if isinstance(selection, Sequence) and all(_is_index(s) for s in selection):
        _check_range(selection, width, where)
        return [int(s) for s in selection]
    raise InputTypeError(
        "outputs must be int, list of int, slice, LongTensor[N] or 'argmax', got "
        f"{type(selection).__name__}"
    )


def _is_index(value: Any) -> bool:
    """Whether a value is one integer; arrays have ``__index__`` too, for when they hold one."""
    return (
        hasattr(value, "__index__")
        and not isinstance(value, bool | Tensor)
        and not getattr(value, "ndim", 0)
    )


def _per_sample(selection: Tensor, y: Tensor, samples: slice, where: str) -> Any:
    if selection.dtype not in (torch.int64, torch.int32) or selection.dim() > 1:
        raise InputTypeError(
            "outputs as a tensor must be a LongTensor[N], one output per sample, got "
            f"{selection.dtype} {list(selection.shape)}"
        )
    _check_range(selection.reshape(-1).tolist(), y.shape[1], where)
    if selection.dim() == 0:
        return int(selection)
    return (selection.long() % y.shape[1])[samples]


def _check_range(indices: Sequence[int], width: int, where: str) -> None:
    wrong = [i for i in indices if not -width <= i < width]
    if wrong:
        raise SelectionError(
            f"outputs={wrong[0]} is out of range: axis 1 of {where} has {width} entries, "
            f"0 to {width - 1}"
        )
