"""Solutions of the linear systems that the Jacobians of all samples make."""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from batchjac.errors import InputError
from batchjac.linalg import factor
from batchjac.linalg.checks import (
    Guard,
    OnSingular,
    bounded,
    check_choice,
    check_cut,
    check_regularisation,
    cut,
)
from batchjac.linalg.condition import damped_solution, of_factors
from batchjac.linalg.implicit import Task, implicit, marked
from batchjac.linalg.krylov import SOLVERS
from batchjac.linalg.matrices import Options, mapped, right_side, using
from batchjac.linalg.products import System, system


def solve(
    f: Any,
    inputs: Any = None,
    b: Tensor | None = None,
    *,
    regularisation: float = 0.0,
    method: str = "lu",
    tolerance: float | None = None,
    max_products: int | None = None,
    on_singular: OnSingular = "error",
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The x with ``J x = b`` for the Jacobian J of every sample, which is not inverted for it.

    Arguments not listed, and other errors, are those of ``inverse``. With given Jacobians, or
    a linear map, b is the second argument: ``solve(J, b)``.

    Args:
        f: Also a linear map, as ``batchjac.operator`` makes, for ``"gmres"`` and ``"cgls"``.
        b: ``[N, *out]``, or ``[N, *out, k]`` for k right sides; in the dtype of J.
        regularisation: A number lambda > 0 makes x ``(J^T J + lambda I)^-1 J^T b``, which
            minimises ``|J x - b|^2 + lambda |x|^2``, also where J is wide, tall or singular.

        method: ``"lu"`` factorises J. ``"gmres"`` and ``"cgls"`` (which is also called CGNR) take
            products with J and its transpose alone, so that J, which may be too large, is never
            there; the first is the faster one where the eigenvalues of J lie together, as those of
            residual blocks do, the second always comes nearer. Their options are of, wrt, outputs,
            coupling, create_graph, max_memory and batched.
        tolerance: Of these two: ``|J x - b| <= tolerance |b|`` for every sample and right side;
            default ``eps^(2/3)``, 2e-5 in float32 and 4e-11 in float64. The error of x is up to
            the condition number times that, and so is that of its gradients.
        max_products: Of these two: how many products to try; default ``10 n``, 1000 at most.

    Returns:
        ``[N, *in]``, or ``[N, *in, k]``. With ``create_graph=True``, or J that has a history,
        differentiable by b and by all that J depends on.

    Raises:
        LinAlgError: Also where an iteration did not come to the tolerance, in a backward too.

    Cost:
        The Jacobian, 2/3 n^3 multiplications and additions for the factors and 2 n^2 for each
        right side; the backward uses the same factors. By products: one forward, one pass for each
        product, and 20 vectors; the backward solves once more, with the transpose.

    Source:
        Gradients ``J^-T g`` and ``-J^-T g x^T``: Giles, Collected matrix derivative results, 2008,
        section 2.3.1. Error: Higham, Accuracy and Stability, 2nd ed., 2002, theorem 9.4. Condition
        numbers are estimated as in Higham, FORTRAN codes for estimating the one-norm, 1988. Saad
        and Schultz, GMRES, 1986; Hestenes and Stiefel, 1952, section 10.

    Example:
        >>> import torch, batchjac
        >>> b = torch.tensor([[2.0, 4.0]])
        >>> batchjac.linalg.solve(lambda x: 4 * x, torch.zeros(1, 2), b).tolist()
        [[0.5, 1.0]]
    """
    damping = check_regularisation(regularisation)

    def compute(j: Tensor, b: Tensor) -> tuple[list[Tensor], Tensor]:
        if damping:
            return damped_solution(j, b, damping)
        factors = factor.factorised(j)
        return [factor.solved(j, b, factors)], of_factors(j, factors)

    if method != "lu":
        inputs, b = right_side("solve", f, inputs, b)
        if damping:
            raise InputError(f'regularisation= needs method="lu", got method={method!r}')
        accuracy = Accuracy(method, tolerance, max_products, on_singular)
        return _by_products(f, inputs, b, output_axes, options, accuracy)
    if tolerance is not None or max_products is not None:
        raise InputError('tolerance= and max_products= are for method="gmres" and "cgls"')
    instead = None if damping else "use linalg.lstsq, or regularisation="
    inputs, b = right_side("solve", f, inputs, b)
    then = using(Guard("solve", on_singular), compute, instead, b)
    (x,), axes = mapped("solve", f, inputs, output_axes, options, then)
    return axes.solution("solve", x, b)


def lstsq(
    f: Any,
    inputs: Any = None,
    b: Tensor | None = None,
    *,
    rtol: float | None = None,
    regularisation: float = 0.0,
    on_singular: OnSingular = "error",
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Of all x that bring ``J x`` nearest to b, the shortest, for the Jacobian J of every sample.

    That is ``J^+ b``: of wide Jacobians the shortest solution, of tall ones the one of least
    squares, of singular ones the shortest of these. Arguments not listed are those of ``solve`` and
    ``pinv``; gradients are at constant rank, as for ``pinv``.

    Returns:
        ``[N, *in]``, or ``[N, *in, k]``.

    Raises:
        LinAlgError: A Jacobian holds NaN or inf, or the solution overflows.

    Cost:
        As ``pinv``; the pseudo-inverse itself is not formed.

    Source:
        As for ``pinv``.

    Example:
        >>> import torch, batchjac
        >>> J = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
        >>> batchjac.linalg.lstsq(J, torch.tensor([[1.0, 3.0]])).tolist()
        [[1.0, 1.0]]
    """
    damping = check_regularisation(regularisation)
    check_cut(rtol, damping)

    def compute(j: Tensor, b: Tensor) -> tuple[list[Tensor], Tensor]:
        if damping:
            return damped_solution(j, b, damping)
        return bounded(factor.least(j, b, factor.decomposed(j, cut(j, rtol))))

    inputs, b = right_side("lstsq", f, inputs, b)
    then = using(Guard("lstsq", on_singular), compute, None, b)
    (x,), axes = mapped("lstsq", f, inputs, output_axes, options, then)
    return axes.solution("lstsq", x, b)


@dataclass(frozen=True)
class Accuracy:
    """How far an iteration goes."""

    method: str
    tolerance: float | None
    most: int | None
    on_singular: OnSingular

    def task(self, found: System) -> Task:
        """What is to be solved with these products."""
        check_choice("method", self.method, ("lu", *SOLVERS))
        check_choice("on_singular", self.on_singular, ("error", "nan"))
        tolerance, most = self.tolerance, self.most
        if tolerance is None:
            tolerance = torch.finfo(found.like.dtype).eps ** (2 / 3)
        if not 0 < tolerance < 1:
            raise InputError(f"tolerance must lie between 0 and 1, got {tolerance}")
        if most is None:
            most = min(10 * found.rows, 1000)
        if most < 1:
            raise InputError(f"max_products must be at least 1, got {most}")
        lenient = self.on_singular == "nan"
        return Task("solve", found.products, found.ends, self.method, tolerance, most, lenient)


def _by_products(
    f: Any,
    inputs: Any,
    b: Tensor,
    output_axes: int | None,
    options: Options,
    accuracy: Accuracy,
) -> Tensor:
    found = system("solve", f, inputs, output_axes, options)
    task = accuracy.task(found)
    right = found.axes.columns("solve", b, found.like, 0, found.samples)
    x = implicit(task, right) if found.history else marked(*task.solve(right.detach()))
    return found.axes.solution("solve", x, b)
