"""Solutions of the linear systems that the Jacobians of all samples make."""

from typing import Any, Unpack

from torch import Tensor

from batchjac.linalg import factor
from batchjac.linalg.checks import Guard, OnSingular, bounded, check_cut, check_regularisation, cut
from batchjac.linalg.condition import damped_solution, of_factors
from batchjac.linalg.matrices import Options, mapped, right_side, using


def solve(
    f: Any,
    inputs: Any = None,
    b: Tensor | None = None,
    *,
    regularisation: float = 0.0,
    on_singular: OnSingular = "error",
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The x with ``J x = b`` for the Jacobian J of every sample, which is not inverted for it.

    Arguments not listed, and other errors, are those of ``inverse``. With given Jacobians b is the
    second argument: ``solve(J, b)``. Where J is too large to be held, ``solve_by_products`` needs
    only products with it.

    Args:
        b: ``[N, *out]``, or ``[N, *out, k]`` for k right sides; in the dtype of J.
        regularisation: A number lambda > 0 makes x ``(J^T J + lambda I)^-1 J^T b``, which
            minimises ``|J x - b|^2 + lambda |x|^2``, also where J is wide, tall or singular.

    Returns:
        ``[N, *in]``, or ``[N, *in, k]``. With ``create_graph=True``, or J that has a history,
        differentiable by b and by all that J depends on.

    Cost:
        The Jacobian, 2/3 n^3 multiplications and additions for the factors and 2 n^2 for each
        right side; the backward uses the same factors.

    Source:
        Gradients ``J^-T g`` and ``-J^-T g x^T``: Giles, Collected matrix derivative results, 2008,
        section 2.3.1. Error: Higham, Accuracy and Stability, 2nd ed., 2002, theorem 9.4. Condition
        numbers are estimated as in Higham, FORTRAN codes for estimating the one-norm, 1988.

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

    instead = None if damping else "use linalg.lstsq, or regularisation="
    inputs, b = right_side("solve", f, inputs, b)
    then = using(Guard("solve", on_singular), compute, instead, b)
    (x,), axes = mapped("solve", f, inputs, output_axes, options, then)
    return axes.solution(x, b)


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
    return axes.solution(x, b)
