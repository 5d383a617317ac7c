"""The power series of the log-determinant of a residual map."""

import torch
from torch import Tensor

from batchjac.errors import LinAlgError
from batchjac.linalg.products import System
from batchjac.space import drawn_on

# Terms that are always taken, and the probability to stop after each further one.
# Source: Chen et al., Residual flows for invertible generative modeling, 2019: two exact terms and
# a geometric distribution with p = 0.5, four terms on average.
_ALWAYS, _STOP = 2, 0.5


def series(
    found: System, z: Tensor, terms: int | None, generator: torch.Generator | None
) -> Tensor:
    """``sum_j (-1)^(j+1) / j z^T G^j z`` for ``J = I + G`` and each column of z, ``[N, k]``."""
    most, weights = _weights(z, terms, generator)
    total = torch.zeros_like(z[:, 0])
    v, size = z, torch.linalg.vector_norm(z, dim=1)
    grown = torch.zeros_like(size)
    for j in range(1, most + 1):
        v = found.products.times(v) - v
        total = total + (-1) ** (j + 1) / j * weights[j - 1] * (z * v).sum(1)
        length = torch.linalg.vector_norm(v.detach(), dim=1) / size
        grown = torch.maximum(grown, length.nan_to_num(nan=float("inf"), posinf=float("inf")))
    _refuse_growth(grown.amax(1))
    return total


def _weights(z: Tensor, terms: int | None, generator: torch.Generator | None) -> tuple[int, Tensor]:
    """How many terms there are, and the weight of each for each column, ``[terms, k]``.

    A term that is taken with probability p is divided by it. All samples share the numbers.
    """
    columns = z.shape[2]
    if terms is not None:
        return terms, torch.ones(terms, columns, dtype=z.dtype, device=z.device)
    where = drawn_on(generator, z.device)
    uniform = torch.rand(columns, generator=generator, device=where, dtype=torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    more = (uniform.clamp_min(tiny).log() / torch.tensor(1 - _STOP).log().item()).floor()
    taken = _ALWAYS + more  # P(more >= m) = (1 - _STOP)^m
    most = int(taken.max())
    at = torch.arange(1, most + 1, device=where).unsqueeze(1)
    chance = (1 - _STOP) ** (at - _ALWAYS).clamp_min(0).to(torch.float64)
    return most, torch.where(at <= taken, 1 / chance, 0).to(z)


def _refuse_growth(grown: Tensor) -> None:
    """A vector that grew proves that the norm of G is more than one."""
    bad = grown > 1 + 1e-6
    if not bad.any():
        return
    at = bad.nonzero().flatten()
    listed = ", ".join(f"{n} (by {float(grown[n]):.2g})" for n in at[:5].tolist())
    more = f" and {len(at) - 5} more" if len(at) > 5 else ""
    raise LinAlgError(
        'linalg.logdet: method="power" needs J = I + G with |G| < 1, and G made a vector longer '
        f'for samples {listed}{more}; use method="lanczos" or linalg.slogdet, or a smaller '
        "Lipschitz constant in the residual branch",
        at, grown[at],
    )  # fmt: skip
