"""What the matrices are: the Jacobians of a function, or a given tensor; and their axes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from batchjac.errors import InputError, InputTypeError
from batchjac.linalg.checks import Compute, Guard, check_dtype, check_square
from batchjac.maps import LinearMap
from batchjac.problem import Problem, pose
from batchjac.recompute import recomputed
from batchjac.solution import Solution
from batchjac.solve import solve


class Options(TypedDict, total=False):
    """The options of ``batchjac.jacobian`` that say which Jacobian is meant; not ``out``.

    With ``coupling`` other than ``"error"`` samples stay together in one chunk.
    """

    of: str | None
    wrt: str | Sequence[str] | None
    outputs: Any
    mode: str
    coupling: str
    create_graph: bool
    max_memory: int | str | None
    batched: bool
    compile: bool


@dataclass(frozen=True)
class Axes:
    """The axes of outputs and of inputs, which a matrix has as its rows and its columns."""

    out: tuple[int, ...]
    inner: tuple[int, ...]

    def columns(self, name: str, b: Tensor, j: Tensor, first: int, count: int) -> Tensor:
        """The right sides of these samples as ``[n, o, k]``."""
        part = b[first : first + count] if b.dim() else b
        shape = (count, *self.out)
        if tuple(part.shape[: len(shape)]) != shape or part.dim() > len(shape) + 1:
            rows = ", ".join(map(str, self.out))
            raise InputError(
                f"linalg.{name}: b is {list(b.shape)}, expected [N, {rows}] as the outputs are, or "
                f"[N, {rows}, k] for k right sides, N the number of samples of the Jacobians"
            )
        if part.dtype != j.dtype or part.device != j.device:
            raise InputTypeError(
                f"linalg.{name}: b is {b.dtype} on {b.device}, the Jacobians are {j.dtype} on "
                f"{j.device}; pass b.to(...) that"
            )
        return part.reshape(count, math.prod(self.out), -1)

    def solution(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        """Solutions ``[N, i, k]`` with the axes of inputs; without k where b has none."""
        if len(b) != len(x):
            raise InputError(
                f"linalg.{name}: b is of {len(b)} samples, the Jacobians are of {len(x)}; pass one "
                "right side for each"
            )
        many = b.dim() > 1 + len(self.out)
        return x.reshape(len(x), *self.inner, *((x.shape[2],) if many else ()))


# Tensors of the size of the Jacobian that stay for a backward, or are there at once without one:
# factors, their inverses and a product; of the singular values the vectors of both sides.
_COPIES = 5

# What takes a linear map as it is.
_BY_PRODUCTS = {"solve": ', or method="gmres" or "cgls"', "slogdet": ", or linalg.logdet"}

# From Jacobians [n, o, i] with these axes, of samples ``first`` and on, to tensors with these
# samples first.
Then = Callable[[Tensor, Axes, int], Sequence[Tensor]]


def mapped(
    name: str, f: Any, inputs: Any, output_axes: int | None, options: Options, then: Then
) -> tuple[Sequence[Tensor], Axes]:
    """What ``then`` makes of the matrices, and the axes that they had."""
    if isinstance(f, Tensor):
        j, axes = given(name, f, inputs, output_axes, options)
        return then(j, axes, 0), axes
    if isinstance(f, LinearMap):
        raise InputTypeError(
            f"linalg.{name} needs the matrices themselves, and a linear map has products; pass "
            f"A.matrix(), {list(f.shape)} here{_BY_PRODUCTS.get(name, '')}"
        )
    if output_axes is not None:
        raise InputError(
            f"linalg.{name}: output_axes= says which axes of a given J are outputs; those of "
            "a function are known"
        )
    problem, max_memory = posed(name, inputs, f, options)
    seen: list[Axes] = []

    def some(solution: Solution, samples: slice) -> Sequence[Tensor]:
        j, axes = flattened(name, problem, solution)
        seen[:] = [axes]
        return then(j, axes, samples.start)

    if max_memory is None or problem.coupling != "error":
        solution = solve(problem, max_memory, None, valued=True)
        with torch.set_grad_enabled(problem.create_graph and torch.is_grad_enabled()):
            return some(solution, slice(0, problem.samples)), seen[0]
    return recomputed(problem, some, max_memory, copies=_COPIES), seen[0]


def right_side(name: str, f: Any, inputs: Any, b: Any) -> tuple[Any, Tensor]:
    """The inputs and b; with given Jacobians, or a linear map, b is the second argument."""
    if isinstance(f, Tensor | LinearMap) and b is None:
        inputs, b = None, inputs
    if not isinstance(b, Tensor):
        given = "A" if isinstance(f, LinearMap) else "J"
        raise InputTypeError(
            f"linalg.{name} needs a tensor b: {name}(f, inputs, b) or {name}({given}, b); got "
            f"{type(b).__name__}"
        )
    return inputs, b


def using(
    guard: Guard, compute: Compute, instead: str | None = None, b: Tensor | None = None
) -> Then:
    """What is done with the Jacobians of some samples; only square ones if ``instead`` says so."""

    def then(j: Tensor, axes: Axes, first: int) -> Sequence[Tensor]:
        if instead is not None:
            check_square(guard.name, j, instead)
        right = () if b is None else (axes.columns(guard.name, b, j, first, len(j)),)
        # what reads the function's tensors, where chunks are computed again, need not see this
        with torch._C.DisableTorchFunction():
            return guard(j, first, compute, *right)

    return then


def posed(name: str, inputs: Any, f: Any, options: Options) -> tuple[Problem, int | str | None]:
    """The question whose answer the matrices are, and its budget."""
    known = {"max_memory", *Options.__optional_keys__}
    unknown = [key for key in options if key not in known]
    if unknown:
        raise InputTypeError(
            f"linalg.{name} takes no {unknown[0]!r}; its options are {', '.join(sorted(known))}"
        )
    if inputs is None:
        raise InputTypeError(
            f"linalg.{name} takes a function and its inputs, or a tensor of Jacobians; got "
            f"{type(f).__name__} and no inputs; convert an array of Jacobians with torch.as_tensor"
        )
    if options.get("coupling") == "full":
        raise InputError(
            f'linalg.{name}: coupling="full" makes no matrix for each sample; flatten '
            "batchjac.jacobian's own result"
        )
    plain = {"wrt": None, "of": None, "outputs": None, "mode": "auto", "coupling": "error",
             "create_graph": False, "batched": True, "compile": False}  # fmt: skip
    asked: dict[str, Any] = {**plain, **options}
    max_memory = asked.pop("max_memory", None)
    return pose(f, inputs, **asked), max_memory


def given(
    name: str, j: Tensor, inputs: Any, output_axes: int | None, options: Options
) -> tuple[Tensor, Axes]:
    """A given ``[N, *out, *in]`` as ``[N, o, i]``."""
    if inputs is not None or options:
        what = "inputs" if inputs is not None else f"{next(iter(options))}="
        raise InputError(
            f"linalg.{name}: the Jacobians are given as a tensor, so {what} has no meaning; its "
            "history is what its own making recorded"
        )
    if j.layout != torch.strided:
        raise InputTypeError(f"linalg.{name}: J has the layout {j.layout}; pass its .to_dense()")
    shape = tuple(j.shape)
    if output_axes is None:
        if len(shape) != 3:
            raise InputError(
                f"linalg.{name}: J must be [N, outputs, inputs], got {list(shape)}; with nested "
                "axes [N, *out, *in] say how many are outputs, output_axes=..."
            )
        output_axes = 1
    if isinstance(output_axes, bool) or not isinstance(output_axes, int):
        raise InputTypeError(
            f"linalg.{name}: output_axes must be a number of axes, got {output_axes!r}"
        )
    if not 0 <= output_axes < len(shape):
        raise InputError(
            f"linalg.{name}: output_axes={output_axes} of J {list(shape)}, whose first axis is "
            f"that of samples; expected 0 to {len(shape) - 1}"
        )
    axes = Axes(shape[1 : 1 + output_axes], shape[1 + output_axes :])
    return _as_matrices(name, j, axes), axes


def flattened(name: str, problem: Problem, solution: Solution) -> tuple[Tensor, Axes]:
    """The Jacobian of a function as ``[n, o, i]``."""
    j, y = solution.jacobian, solution.value()
    if not isinstance(j, Tensor) or not isinstance(y, Tensor):
        raise InputError(
            f"linalg.{name} takes one matrix for each sample, and this question has "
            f"{_several(problem, y)}. Name one layer or parameter with wrt=, one output with of= "
            "or a function that returns it alone"
        )
    selects = problem.outputs is not None and not isinstance(problem.outputs, list | tuple | slice)
    out = y.dim() - 1 - selects
    axes = Axes(tuple(j.shape[1 : 1 + out]), tuple(j.shape[1 + out :]))
    return _as_matrices(name, j, axes), axes


def _several(problem: Problem, y: Any) -> str:
    if not isinstance(y, Tensor):
        return f"outputs nested in a {type(y).__name__}"
    if problem.named:
        return f"a dict of {len(problem.wanted)} by name"
    return f"inputs nested in a {type(problem.inputs).__name__}"


def _as_matrices(name: str, j: Tensor, axes: Axes) -> Tensor:
    check_dtype(name, j)
    if 0 in j.shape:
        raise InputError(
            f"linalg.{name}: J {list(j.shape)} has no entries; a sample, an output and an "
            "input are needed at least"
        )
    return j.reshape(len(j), math.prod(axes.out), math.prod(axes.inner))
