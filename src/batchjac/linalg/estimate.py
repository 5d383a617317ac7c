"""Traces and log-determinants from products with random vectors, each with its standard error."""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from batchjac.errors import InputError, InputTypeError, LinAlgError
from batchjac.linalg.checks import check_choice
from batchjac.linalg.lanczos import bidiagonal
from batchjac.linalg.matrices import Options
from batchjac.linalg.products import System, system
from batchjac.linalg.series import series
from batchjac.space import drawn_on

_TRACES = ("hutchinson", "hutch++")
_LOGARITHMS = ("lanczos", "power")


class Estimate(NamedTuple):
    """A mean over random vectors, and its standard error, estimated from them; both ``[N]``.

    The error is the root of the variance between the vectors' own values (unbiased) over their
    number. It has no gradient.
    """

    value: Tensor
    error: Tensor


def trace(
    f: Any,
    inputs: Any = None,
    *,
    probes: int = 16,
    method: str = "hutchinson",
    generator: torch.Generator | None = None,
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Estimate:
    """An unbiased estimate of the trace of the Jacobian of every sample, from products with it.

    Args:
        f: A module or callable on a batch; a linear map; or Jacobians ``[N, o, i]``. Square.
        inputs: A batch ``[N, *in]``, as for ``batchjac.jacobian``.
        probes: Random vectors of signs, each sample its own.
        method: ``"hutchinson"``: the mean of ``z^T J z``. Its variance is
            ``(|J + J^T|_F^2 / 2 - 2 sum_i J_ii^2) / probes``. ``"hutch++"``: a third of the vectors
            finds the leading part of J, whose trace is exact; the rest estimates what is left.
            Better where few directions hold most of J; as many products.
        generator: Where random numbers come from; default torch's own.
        output_axes: Of given Jacobians ``[N, *out, *in]``, how many axes are outputs; 1 of 3.
        **options: As for ``batchjac.jacobian``: of, wrt, outputs, coupling, create_graph,
            max_memory, batched.

    Returns:
        ``Estimate(value, error)``, ``[N]`` each. The value is differentiable where products are,
        and its gradient is unbiased too.

    Raises:
        InputError: J is not square, or there are too few probes.
        InputTypeError: float16, bfloat16 or complex; or outputs of another dtype than inputs.
        UnsupportedError: A linear map made with ``coupling="full"``.

    Cost:
        One forward, and one product for each probe.

    Source:
        Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines, 1990, proposition 1. Meyer, Musco, Musco and Woodruff, Hutch++: optimal
        stochastic trace estimation, 2021, algorithm 1.

    Example:
        >>> import torch, batchjac
        >>> value, error = batchjac.linalg.trace(lambda x: 3 * x, torch.zeros(2, 4))
        >>> value.tolist(), error.tolist()
        ([12.0, 12.0], [0.0, 0.0])
    """
    check_choice("method", method, _TRACES)
    _check_probes(probes, 2 if method == "hutchinson" else 6)
    found = system("trace", f, inputs, output_axes, options)
    with torch.set_grad_enabled(found.history):
        if method == "hutchinson":
            z = signs(found, probes, generator)
            return _mean("trace", (z * found.products.times(z)).sum(1))
        return _deflated(found, probes, generator)


def _deflated(found: System, probes: int, generator: torch.Generator | None) -> Estimate:
    """Hutch++: exactly on the range of ``J S``, by random vectors outside it."""
    third = min(probes // 3, found.rows)
    products = found.products
    with torch.no_grad():  # for any fixed q the estimate is unbiased, and so is its gradient
        q = torch.linalg.qr(products.times(signs(found, third, generator)))[0]
    exact = (q * products.times(q)).sum((1, 2))
    z = signs(found, probes - 2 * third, generator)
    z = z - q @ (q.mT @ z)
    rest = _mean("trace", (z * products.times(z)).sum(1))
    return Estimate(exact + rest.value, rest.error)


def logdet(
    f: Any,
    inputs: Any = None,
    *,
    probes: int = 16,
    method: str = "lanczos",
    steps: int | None = None,
    generator: torch.Generator | None = None,
    output_axes: int | None = None,
    **options: Unpack[Options],
) -> Estimate:
    """An estimate of ``log |det J|`` for the Jacobian of every sample, from products with it.

    Arguments not listed are those of ``trace``. ``linalg.slogdet`` is exact, where J fits.

    Args:
        method: ``"lanczos"``: ``1/2 tr log(J^T J)`` by Gauss quadrature in the space that products
            with J and its transpose span from each vector. Any J that is not singular. Biased by
            what the quadrature misses, which falls by the factor ``((k - 1) / (k + 1))^2`` for
            every step, k the condition number of J, and is none after n steps. ``"power"``:
            ``sum_j (-1)^(j+1) tr(G^j) / j`` for ``J = I + G``, as of a residual block ``x + g(x)``
            with ``|G| < 1``.
        steps: Of ``"lanczos"`` at most so many, default ``min(n, 20)``. Of ``"power"``: the terms,
            after which the value is wrong by up to ``n L^(steps+1) / ((steps+1) (1 - L))``, L the
            norm of G; by default a random number of them, each divided by the probability that it
            is taken, so that the value is unbiased. Its variance is then finite for L < 0.7.

    Returns:
        ``Estimate(value, error)``, ``[N]`` each; the error is that of random vectors and of random
        terms, not the bias. Differentiable where products are: with ``"power"`` to every order;
        with ``"lanczos"`` once, by ``J^-T`` estimated from the same vectors.

    Raises:
        LinAlgError: With ``"power"``, samples whose G is no contraction: a vector grew. With
            ``"lanczos"``, J whose condition number is seen to be 1/eps or more; with fewer steps
            than rows it may go unseen.
        InputError, InputTypeError: As ``trace``.
        UnsupportedError: As ``trace``; in a backward with ``create_graph=True``, of ``"lanczos"``.

    Cost:
        One forward; with ``"lanczos"`` 2 ``steps`` products for each probe and as many vectors, one
        product more with a history; with ``"power"`` one product for each term.

    Source:
        Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017,
        theorem 4.1; Golub and Kahan, Calculating the singular values and pseudo-inverse of a
        matrix, 1965, for the bidiagonal form. Behrmann et al., Invertible residual networks, 2019,
        theorem 4, for the bound; Chen et al., Residual flows for invertible generative modeling,
        2019, theorem 1, for the random number of terms.

    Example:
        >>> import torch, batchjac
        >>> value, error = batchjac.linalg.logdet(lambda x: 2 * x, torch.zeros(2, 4), probes=2)
        >>> value.exp().tolist()
        [16.0, 16.0]
    """
    check_choice("method", method, _LOGARITHMS)
    _check_probes(probes, 2)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        raise InputTypeError(f"steps must be a number or None, got {steps!r}")
    if steps is not None and steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    found = system("logdet", f, inputs, output_axes, options)
    z = signs(found, probes, generator)
    with torch.set_grad_enabled(found.history):
        if method == "power":
            return _mean("logdet", series(found, z, steps, generator))
        return _mean("logdet", bidiagonal(found, z, min(found.rows, steps or 20)))


def signs(found: System, count: int, generator: torch.Generator | None) -> Tensor:
    """Random signs ``[N, n, count]``."""
    where = drawn_on(generator, found.like.device)
    shape = (found.samples, found.rows, count)
    drawn = torch.randint(0, 2, shape, generator=generator, device=where)
    return (2 * drawn - 1).to(found.like)


def _mean(name: str, values: Tensor) -> Estimate:
    """Of values ``[N, probes]``."""
    bad = ~values.detach().isfinite().all(1)
    if bad.any():
        at = bad.nonzero().flatten()
        shown = ", ".join(map(str, at[:5].tolist()))
        raise LinAlgError(
            f"linalg.{name}: products with the Jacobians of samples {shown}"
            f"{f' and {len(at) - 5} more' if len(at) > 5 else ''} hold NaN or inf; look for "
            "overflow or 0/0 in f there",
            at, torch.full((len(at),), float("nan")),
        )  # fmt: skip
    return Estimate(values.mean(1), values.detach().std(1) / values.shape[1] ** 0.5)


def _check_probes(probes: int, least: int) -> None:
    if isinstance(probes, bool) or not isinstance(probes, int):
        raise InputTypeError(f"probes must be a number of vectors, got {probes!r}")
    if probes < least:
        raise InputError(f"probes must be at least {least}, to tell the error; got {probes}")
