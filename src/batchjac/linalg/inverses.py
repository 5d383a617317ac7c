"""Inverses and pseudo-inverses of the Jacobian of every sample."""

from typing import Any, Unpack

import torch
from torch import Tensor

from batchjac.linalg import factor
from batchjac.linalg.checks import Guard, OnSingular, bounded, check_cut, check_regularisation, cut
from batchjac.linalg.condition import damped_inverse, norm
from batchjac.linalg.matrices import Options, mapped, using


def inverse(
    f: Any,
    inputs: Any = None,
    *,
    regularisation: float = 0.0,
    on_singular: OnSingular = "error",
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The inverse of the Jacobian of every sample.

    Args:
        f: A module or callable on a batch, as for ``batchjac.jacobian``; or Jacobians
            ``[N, o, i]`` themselves, with no inputs.
        inputs: A batch ``[N, *in]``, as for ``batchjac.jacobian``; one tensor is differentiated
            by, or what ``wrt=`` names.
        regularisation: A number lambda > 0 makes it ``(J^T J + lambda I)^-1 J^T``, also of J
            that is wide, tall or singular. In the units of J squared.
        on_singular: ``"error"``, or ``"nan"``: NaN in the places of samples that have no
            inverse, whose gradient is zero.
        output_axes: Of given Jacobians ``[N, *out, *in]``, how many axes are outputs; 1 of 3.
        **options: As for ``batchjac.jacobian``: of, wrt, outputs, mode, coupling, create_graph,
            max_memory, batched, compile. ``create_graph=True`` makes the answer differentiable.

    Returns:
        ``[N, *in, *out]``.

    Raises:
        LinAlgError: Jacobians whose condition number is 1/eps or more, or that hold NaN or inf.
        InputError: J is not square, or is not one matrix for each sample.
        InputTypeError: float16, bfloat16 or complex.

    Cost:
        The Jacobian, and 2 n^3 multiplications and additions for n rows; n^2 numbers kept for the
        backward, which takes two matrix products.

    Source:
        Gradient ``-X^T G X^T``: Giles, Collected matrix derivative results, 2008, section 2.2.3.
        Error ``c n eps condition``: Higham, Accuracy and Stability, 2nd ed., 2002, section 14.1.

    Example:
        >>> import torch, batchjac
        >>> batchjac.linalg.inverse(lambda x: 4 * x, torch.zeros(3, 2))[0].tolist()
        [[0.25, 0.0], [0.0, 0.25]]
    """
    damping = check_regularisation(regularisation)

    def compute(j: Tensor) -> tuple[list[Tensor], Tensor]:
        if damping:
            return damped_inverse(j, damping)
        x = factor.inverted(j)
        return [x], norm(j) * norm(x)

    instead = None if damping else "use linalg.pinv, or regularisation="
    then = using(Guard("inverse", on_singular), compute, instead)
    (x,), axes = mapped("inverse", f, inputs, output_axes, options, then)
    return x.reshape(-1, *axes.inner, *axes.out)


def pinv(
    f: Any,
    inputs: Any = None,
    *,
    rtol: float | None = None,
    regularisation: float = 0.0,
    on_singular: OnSingular = "error",
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The pseudo-inverse of the Jacobian of every sample, wide, tall, singular or not.

    Arguments not listed, and other errors, are those of ``inverse``. Gradients are those at
    constant rank: where a singular value is about to cross the cut-off the pseudo-inverse jumps
    and has none, and near it they are large; ``regularisation`` is smooth everywhere.

    Args:
        rtol: Singular values up to ``rtol`` times the largest count as zero; default
            ``max(o, i) * eps``, the rounding of the decomposition itself.
        regularisation: A number lambda > 0 makes it ``(J^T J + lambda I)^-1 J^T``, in which no
            singular value is cut off.

    Returns:
        ``[N, *in, *out]``; zeros where J is zero.

    Raises:
        LinAlgError: A Jacobian holds NaN or inf, or its pseudo-inverse overflows.

    Cost:
        The Jacobian, and a singular value decomposition for each sample, some 20 times the work
        of an inverse; with ``regularisation`` a QR decomposition, about three times.

    Source:
        Golub and Pereyra, The differentiation of pseudo-inverses and nonlinear least squares
        problems whose variables separate, 1973, theorem 4.3. The cut-off is that of NumPy's
        and PyTorch's ``matrix_rank``.

    Example:
        >>> import torch, batchjac
        >>> batchjac.linalg.pinv(lambda x: x.sum(1, keepdim=True), torch.zeros(1, 2)).tolist()
        [[[0.5], [0.5]]]
    """
    damping = check_regularisation(regularisation)
    check_cut(rtol, damping)

    def compute(j: Tensor) -> tuple[list[Tensor], Tensor]:
        if damping:
            return damped_inverse(j, damping)
        one = torch.eye(j.shape[1], dtype=j.dtype, device=j.device).expand(len(j), -1, -1)
        return bounded(factor.least(j, one, factor.decomposed(j, cut(j, rtol))))

    then = using(Guard("pinv", on_singular), compute)
    (x,), axes = mapped("pinv", f, inputs, output_axes, options, then)
    return x.reshape(-1, *axes.inner, *axes.out)
