"""Determinants, singular values and condition numbers of the Jacobian of every sample."""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from batchjac.linalg import factor
from batchjac.linalg.checks import Guard, OnSingular, bounded, check_regularisation
from batchjac.linalg.condition import of_damped, of_factors
from batchjac.linalg.matrices import Options, mapped, using


class SlogDet(NamedTuple):
    """The sign of a determinant, and the natural logarithm of its absolute value; both ``[N]``."""

    sign: Tensor
    logabsdet: Tensor


def slogdet(
    f: Any,
    inputs: Any = None,
    *,
    regularisation: float = 0.0,
    on_singular: OnSingular = "error",
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> SlogDet:
    """The sign and the logarithm of the size of the determinant of the Jacobian of every sample.

    Arguments not listed, and errors, are those of ``inverse``.

    Args:
        regularisation: A number lambda > 0 makes the logarithm ``1/2 log det(J^T J + lambda I)``,
            also of singular J; the sign stays that of ``det J``, 0 where a pivot is zero.

    Returns:
        ``SlogDet(sign, logabsdet)``, both ``[N]``. The sign has no gradient.

    Cost:
        The Jacobian, and 2/3 n^3 multiplications and additions; as many again, twice, in the
        backward, for the inverse from the same factors, whose transpose is the gradient.

    Source:
        Gradient ``J^-T``: Giles, Collected matrix derivative results, 2008, section 2.2.4. The
        determinant found is that of a matrix next to J: Higham, Accuracy and Stability, 2nd ed.,
        2002, section 14.6.

    Example:
        >>> import torch, batchjac
        >>> sign, log = batchjac.linalg.slogdet(lambda x: -2 * x, torch.zeros(1, 3))
        >>> sign.tolist(), log.exp().tolist()
        ([-1.0], [8.0])
    """
    damping = check_regularisation(regularisation)

    def compute(j: Tensor) -> tuple[list[Tensor], Tensor]:
        factors = factor.factorised(j)
        sign, plain = factor.determinant(factors)
        if damping:
            root = factor.damped(j, damping)
            found = root.r.diagonal(dim1=1, dim2=2).abs().log().sum(1)
            return [sign, found], of_damped(root)
        return [sign, factor.logarithm(j, plain, factors)], of_factors(j, factors)

    then = using(Guard("slogdet", on_singular), compute, "there is no determinant")
    (sign, found), _ = mapped("slogdet", f, inputs, output_axes, options, then)
    return SlogDet(sign, found)


def svdvals(
    f: Any,
    inputs: Any = None,
    *,
    on_singular: OnSingular = "error",
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The singular values of the Jacobian of every sample, the largest first.

    Arguments not listed are those of ``inverse``. A singular J is no error here; ``on_singular``
    is about NaN and inf. The gradient is ``U diag(g) V^T``. Where singular values are equal, or
    zero, it is that of one choice of singular vectors: right for a function that treats equal ones
    alike (a sum, a norm), one of several one-sided derivatives for others. The second derivative
    divides by differences of their squares, so it is NaN or inf there.

    Returns:
        ``[N, min(o, i)]``.

    Raises:
        LinAlgError: A Jacobian holds NaN or inf.

    Cost:
        The Jacobian, and one singular value decomposition for each sample.

    Source:
        Giles, Collected matrix derivative results, 2008, section 3.2.

    Example:
        >>> import torch, batchjac
        >>> batchjac.linalg.svdvals(torch.tensor([[[0.0, 3.0], [-4.0, 0.0]]])).tolist()
        [[4.0, 3.0]]
    """

    def compute(j: Tensor) -> tuple[list[Tensor], Tensor]:
        return bounded(torch.linalg.svdvals(j))

    then = using(Guard("svdvals", on_singular), compute)
    (s,), _ = mapped("svdvals", f, inputs, output_axes, options, then)
    return s


def condition(
    f: Any,
    inputs: Any = None,
    *,
    on_singular: OnSingular = "error",
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The largest singular value of the Jacobian of every sample over its smallest.

    Arguments not listed, gradients and errors are those of ``svdvals``.

    Returns:
        ``[N]``; inf, whose gradient is zero, where the smallest singular value is zero. From 1/eps
        on, which rounding makes of most singular matrices, the number says no more than that.

    Cost:
        As ``svdvals``.

    Source:
        Higham, Accuracy and Stability, 2nd ed., 2002, section 6.3, with the 2-norm.

    Example:
        >>> import torch, batchjac
        >>> batchjac.linalg.condition(torch.tensor([[[2.0, 0.0], [0.0, 8.0]]])).tolist()
        [4.0]
    """

    def compute(j: Tensor) -> tuple[list[Tensor], Tensor]:
        s = torch.linalg.svdvals(j)
        zero = s[:, -1] == 0
        ratio = s[:, 0] / torch.where(zero, 1.0, s[:, -1])
        return [torch.where(zero, float("inf"), ratio)], torch.zeros_like(ratio)

    then = using(Guard("condition", on_singular), compute)
    (ratio,), _ = mapped("condition", f, inputs, output_axes, options, then)
    return ratio
