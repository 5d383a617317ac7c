"""A batch made of sample inputs, and the functions it is given to.

Samples number k, made from three seeds, have the same form and other values that lie in the
operator's domain: stacked, they are a batch of three. The tensors that torch marks as requiring a
gradient are the inputs; masks and indices that differ come along; all else is bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from batchjac.tree import Tree, flatten

N = 3
OUTPUT_NUMBERS = 18  # of each output and sample; more are thinned out, evenly
Function = Callable[..., Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One sample of arguments ``(args, kwargs)``, and ``N`` values for what varies.

    ``inputs[k]``, ``[N, ...]``, belongs to the leaf ``places[k]`` of ``tree``.
    """

    tree: Tree
    places: tuple[int, ...]
    inputs: tuple[Tensor, ...]

    @property
    def detail(self) -> str:
        """The arguments in words."""
        args, kwargs = self.tree.map(_describe)
        return ", ".join([*map(str, args), *(f"{k}={v}" for k, v in kwargs.items())])

    @property
    def numbers(self) -> int:
        """How many numbers one sample is differentiated by."""
        return sum(t[0].numel() for t in self.inputs if t.is_floating_point())

    def call(self, function: Function, tensors: Sequence[Tensor]) -> Any:
        """The function on the sample whose varying tensors are these."""
        leaves = [_bound(leaf) for leaf in self.tree.leaves]
        for place, tensor in zip(self.places, tensors, strict=True):
            whole = self.tree.leaves[place]
            value = torch.view_as_complex(tensor) if whole.is_complex() else tensor
            leaves[place] = value.clone()  # the function may write into it
        args, kwargs = self.tree.build(leaves)
        return function(*args, **kwargs)


def _bound(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _describe(leaf: Any) -> Any:
    return list(leaf.shape) if isinstance(leaf, Tensor) else leaf


def batch(arguments: Sequence[Any], together: Function = torch.stack) -> Batch | None:
    """The same sample from all seeds as one batch; None where there is nothing to differentiate.

    ``together`` joins the seeds' tensors: ``torch.stack``, or ``torch.cat`` for samples that are
    batches themselves.
    """
    trees = [flatten(a) for a in arguments]
    if len({t.paths for t in trees}) > 1:
        return None
    columns = list(zip(*(t.leaves for t in trees), strict=True))
    wanted = [k for k, column in enumerate(columns) if differentiable(column[0])]
    if not wanted or any(columns[k][0].numel() == 0 for k in wanted):
        return None
    places = [k for k, column in enumerate(columns) if k in wanted or _varies(column)]
    if any(len({t.shape for t in columns[k]}) > 1 for k in places):
        return None
    joined = [together([t.detach() for t in columns[k]]) for k in places]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in joined]
    return Batch(trees[0], tuple(places), tuple(real))


def differentiable(leaf: Any) -> bool:
    """Whether torch's database asks for the derivative by this leaf."""
    return (
        isinstance(leaf, Tensor)
        and leaf.requires_grad
        and leaf.layout == torch.strided
        and leaf.dtype in (torch.float64, torch.complex128)
    )


def _varies(column: Sequence[Any]) -> bool:
    """Masks and indices that are not the same for every seed."""
    first = column[0]
    if not isinstance(first, Tensor) or first.is_floating_point() or first.is_complex():
        return False
    return any(t.shape == first.shape and not torch.equal(t, first) for t in column[1:])


class OneSample(nn.Module):
    """The function of one sample; a module, so that the state of the function is its own."""

    def __init__(self, function: Function, given: Batch) -> None:
        super().__init__()
        self.function = function
        self.given = given

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_thinned(y, 0) for y in _real(self.given.call(self.function, tensors)))


class Looped(OneSample):
    """The function of one sample, stacked over the samples of a batch in a Python loop."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = [super(Looped, self).forward(*row) for row in zip(*tensors, strict=True)]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))


class Whole(OneSample):
    """The function on the batch itself, whatever it makes of the first axis."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_thinned(y, 1) for y in _real(self.given.call(self.function, tensors)))


def _real(result: Any) -> list[Tensor]:
    """The tensors of a result: sparse ones made dense, complex ones seen as real."""
    found = [t for t in flatten(result).leaves if isinstance(t, Tensor)]
    tensors = [t if t.layout == torch.strided else t.to_dense() for t in found]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _thinned(y: Tensor, first: int) -> Tensor:
    """``OUTPUT_NUMBERS`` of the entries behind the ``first`` axes."""
    if y.dim() <= first or math.prod(y.shape[first:]) <= OUTPUT_NUMBERS:
        return y
    flat = y.flatten(first)
    kept = torch.linspace(0, flat.shape[first] - 1, OUTPUT_NUMBERS).long()
    return flat.index_select(first, kept)


def picked(found: Sequence[T], count: int) -> list[T]:
    """``count`` of them, evenly over the sequence, its ends included."""
    chosen = torch.linspace(0, len(found) - 1, min(count, len(found))).round().long()
    return [found[k] for k in chosen.tolist()]
