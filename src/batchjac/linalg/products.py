"""What an iteration asks of a matrix: products with it and with its transpose."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from batchjac.errors import InputError, InputTypeError
from batchjac.lazy import operator
from batchjac.linalg.checks import check_dtype
from batchjac.linalg.matrices import Axes, Options, given, posed
from batchjac.maps import LinearMap
from batchjac.problem import differentiable

_OPTIONS = ("of", "wrt", "outputs", "coupling", "create_graph", "max_memory", "batched")

# What takes Jacobians that are not square.
_INSTEAD = {"solve": "use linalg.lstsq"}


class Products(Protocol):
    """A square matrix for each of n samples, of n_rows rows.

    Law: ``<u, times(v)> = <times_transposed(u), v>``, and products have a history if the matrix is
    differentiable.
    """

    def times(self, v: Tensor) -> Tensor:
        """``J v`` for columns ``[N, n, k]``."""

    def times_transposed(self, u: Tensor) -> Tensor:
        """``J^T u`` for columns ``[N, n, k]``."""


@dataclass(frozen=True)
class Dense:
    """Products with given matrices."""

    j: Tensor

    def times(self, v: Tensor) -> Tensor:
        return self.j @ v

    def times_transposed(self, u: Tensor) -> Tensor:
        return self.j.mT @ u


@dataclass(frozen=True)
class Lazy:
    """Products with a linear map, whose axes are flattened."""

    a: LinearMap

    def times(self, v: Tensor) -> Tensor:
        return _through(self.a, v)

    def times_transposed(self, u: Tensor) -> Tensor:
        return _through(self.a.T, u)


def _through(a: LinearMap, v: Tensor) -> Tensor:
    shape = a.inputs.leaves[0].shape
    found: Tensor = a @ v.reshape(*shape, v.shape[2])
    return found.reshape(len(v), -1, v.shape[2])


@dataclass(frozen=True)
class Flipped:
    """The transpose."""

    a: Products

    def times(self, v: Tensor) -> Tensor:
        return self.a.times_transposed(v)

    def times_transposed(self, u: Tensor) -> Tensor:
        return self.a.times(u)


@dataclass(frozen=True)
class System:
    """Square matrices by their products, their axes, and where the numbers are."""

    products: Products
    samples: int
    axes: Axes
    rows: int
    like: Tensor  # an empty tensor of their dtype, on their device
    history: bool  # whether products are differentiable
    ends: tuple[Tensor, ...]  # where their history may be cut: it goes on before these


def system(name: str, f: Any, inputs: Any, output_axes: int | None, options: Options) -> System:
    """Square matrices of a function, of a linear map, or given."""
    if isinstance(f, Tensor):
        j, axes = given(name, f, inputs, output_axes, options)
        found = System(Dense(j), len(j), axes, j.shape[1], j.detach()[:0], j.requires_grad, (j,))
        return _square(name, found, j.shape[2])
    ends: tuple[Tensor, ...]
    if isinstance(f, LinearMap):
        if inputs is not None or options:
            raise InputError(
                f"linalg.{name}: a linear map has its inputs and options already; leave "
                f"{'inputs' if inputs is not None else next(iter(options)) + '='} away"
            )
        f.refuse_coupled()
        a, ends = f, ()
    else:
        problem, _ = posed(name, inputs, f, options)
        refused = [key for key in options if key not in _OPTIONS]
        if refused:
            raise InputTypeError(
                f"linalg.{name} by products takes no {refused[0]!r}; its options are "
                f"{', '.join(_OPTIONS)}"
            )
        told: dict[str, Any] = dict(options)
        a = operator(f, problem.inputs, **told)
        ends = tuple(t for t in problem.tree.leaves if differentiable(t))
    into, out = a.inputs.leaves, a.outputs.leaves
    if len(into) > 1 or len(out) > 1 or a.inputs.shared or a.outputs.shared:
        raise InputError(
            f"linalg.{name} takes one matrix for each sample, from one tensor [N, *in] to one "
            f"[N, *out]; got {a.inputs.words} to {a.outputs.words}"
        )
    like = torch.empty(0, dtype=a.dtype, device=a.device)
    check_dtype(name, like)
    if a.inputs.dtype != a.dtype:
        raise InputTypeError(
            f"linalg.{name} by products needs inputs and outputs of one dtype, got {a.inputs.dtype}"
            f" to {a.dtype}; convert one of them, as lambda x: f(x).to(x.dtype)"
        )
    history = bool(getattr(getattr(a, "problem", None), "create_graph", isinstance(f, LinearMap)))
    axes = Axes(tuple(out[0].inner), tuple(into[0].inner))
    found = System(Lazy(a), a.samples, axes, a.shape[1], like, history, ends)
    return _square(name, found, a.shape[2])


def _square(name: str, found: System, columns: int) -> System:
    check_dtype(name, found.like)
    if found.rows != columns:
        raise InputError(
            f"linalg.{name} needs as many outputs as inputs, got Jacobians of {found.rows} x "
            f"{columns}; {_INSTEAD.get(name, 'linalg.svdvals takes others')}"
        )
    return replace(found, history=found.history and torch.is_grad_enabled())


def read_by(product: Tensor, ends: Sequence[Tensor]) -> list[Tensor]:
    """The tensors a product is differentiable by: ``ends``, and the leaves of its graph."""
    if product.grad_fn is None:
        return []
    known = {e.grad_fn for e in ends if e.grad_fn is not None}
    found: dict[int, Tensor] = {id(e): e for e in ends if e.requires_grad}
    seen, waiting = {product.grad_fn}, [product.grad_fn]
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen and following not in known:
                seen.add(following)
                waiting.append(following)
    return list(found.values())
