"""What can be said of every sample's block ``J [O, I]`` by products with it.

Exact figures take the rows or the columns, whichever are fewer, a few at a time. Estimates take
random signs z, independent and of mean zero, so that ``E[z zᵀ] = 1``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.errors import InputError, InputTypeError, UnsupportedError
from batchjac.space import Space, drawn_on

Blocks = Sequence[Block]

POWER_ITERATIONS = 4  # Halko, Martinsson and Tropp, section 4.5: two to four are enough in practice
OVERSAMPLING = 10  # the same, section 4.2
_HALF = frozenset({torch.float16, torch.bfloat16})


class Products(Protocol):
    """The part of a linear map that its measures need; ``maps.LinearMap`` says what each is."""

    @property
    def inputs(self) -> Space: ...
    @property
    def outputs(self) -> Space: ...
    @property
    def samples(self) -> int: ...
    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def shorter(self) -> str: ...
    @property
    def T(self) -> "Products": ...
    def push(self, columns: Blocks) -> list[Block]: ...
    def pull(self, rows: Blocks) -> list[Block]: ...
    def in_turns(
        self, go: Callable[[Blocks], list[Block]], blocks: Blocks, into: Space
    ) -> list[Block]: ...
    def pieces(self, over: str) -> Iterator[tuple[list[int], Tensor]]: ...
    def matrix(self) -> Tensor: ...
    def refuse_coupled(self) -> None: ...


@dataclass(frozen=True)
class Leading:
    """The leading part of every sample's singular value decomposition, ``J ~ U diag(S) Vh``."""

    U: Tensor
    """``[N, O, k]``"""
    S: Tensor
    """``[N, k]``, largest first."""
    Vh: Tensor
    """``[N, k, I]``"""


def refuse_summed(a: Products, estimated: str = "") -> None:
    """Raise where samples are added up: both ends shared, or one where an estimate needs both."""
    if a.inputs.shared and a.outputs.shared:
        raise UnsupportedError(
            f"this map from {a.inputs.words} to {a.outputs.words}, which samples share, is a sum "
            "over samples: it has products only; for a figure of every sample ask the maps that "
            "it is made of"
        )
    if estimated and a.outputs.shared:
        raise UnsupportedError(
            f"{estimated} needs products with every sample's block, and this map toward "
            f"{a.outputs.words} sums over samples; ask its transpose, whose norm and singular "
            "values are the same"
        )


def wide(t: Tensor) -> Tensor:
    """In float32 at least: squares of half precision overflow from 256 on."""
    return t.float() if t.dtype in _HALF else t


def root(total: Tensor) -> Tensor:
    """The square root, of gradient 0 at 0 as ``torch.linalg.matrix_norm`` has it, not inf."""
    zero = total == 0
    return total.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def norm_squared(a: Products) -> Tensor:
    """``sum_oi J[n,o,i]²``, ``[N]``."""
    total = wide(torch.zeros(a.samples, dtype=a.inputs.dtype, device=a.device))
    for _, piece in a.pieces(a.shorter):
        total = total + wide(piece).square().sum((1, 2))
    return total


def norm_squared_estimate(a: Products, count: int, generator: torch.Generator | None) -> Tensor:
    """The mean of ``|Jᵀ z|²`` over ``count`` vectors of signs, ``[N]``."""
    refuse_summed(a, "norm(samples=)")
    if a.inputs.shared:
        raise UnsupportedError(
            "norm(samples=) needs rows of every sample by itself, and toward parameters this map "
            "has no factors to take them from (a hook, a map after it, or create_graph=True), "
            "only their sum over samples; leave samples= away"
        )
    a.refuse_coupled()
    z = a.outputs.random(count_of(count), a.samples, generator)
    rows = wide(a.inputs.flat(a.in_turns(a.pull, z, a.inputs)))
    return rows.square().sum(2).mean(0)


def gram(a: Products) -> Tensor:
    """``J Jᵀ``, ``[N, O, O]``: summed over columns where they are fewer, else row by row."""
    if a.shorter == "columns" or a.shape[1] == 0:
        total = wide(_zeros(a, a.samples, a.shape[1], a.shape[1]))
        for _, piece in a.pieces("columns") if a.shape[1] else ():
            total = total + wide(piece) @ wide(piece).mT
        return total
    found = []
    for rows, piece in a.pieces("rows"):
        if len(rows) == a.shape[1]:  # all at once
            return wide(piece) @ wide(piece).mT
        others = [wide(piece) @ wide(other).mT for _, other in a.pieces("rows")]
        found.append(torch.cat(others, 2))
    return torch.cat(found, 1)


def kernel(a: Products) -> Tensor:
    """``<J[n,o], J[m,p]>`` toward what all samples share, ``[N, O, N, O]``."""
    if a.shape[1] == 0:
        return wide(_zeros(a, a.samples, 0, a.samples, 0))
    return torch.cat([
        torch.cat([torch.einsum("noi,mpi->nomp", piece, other) for _, other in a.pieces("rows")], 3)
        for _, piece in a.pieces("rows")
    ], 1)  # fmt: skip


def diagonal(a: Products) -> Tensor:
    """``J[n,o,o]``, ``[N, O]``."""
    _square(a, "the diagonal")
    found = [piece[:, torch.arange(len(entries)), entries] for entries, piece in a.pieces("rows")]
    return torch.cat(found, 1) if found else _zeros(a, a.samples, 0)


def trace_estimate(a: Products, count: int, generator: torch.Generator | None) -> Tensor:
    """The mean of ``zᵀ J z``, ``[N]``."""
    _square(a, "trace()")
    refuse_summed(a, "trace(samples=)")
    a.refuse_coupled()
    z = a.inputs.random(count_of(count), a.samples, generator)
    along = a.outputs.flat(a.in_turns(a.push, z, a.outputs))
    return (a.inputs.flat(z).to(along.dtype) * along).sum(2).mean(0)


def _zeros(a: Products, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=a.inputs.dtype, device=a.device)


def _square(a: Products, what: str) -> None:
    refuse_summed(a)
    if a.inputs.shared or a.shape[1] != a.shape[2]:
        raise InputError(
            f"{what} needs as many outputs as inputs, one block is {a.shape[1]} x {a.shape[2]}"
            f"{' parameters' if a.inputs.shared else ''}; for the sizes of a block use norm() or "
            "svd(k)"
        )


def count_of(count: int) -> int:
    """The number of random vectors, if it is one."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise InputTypeError(f"samples must be the number of random vectors, got {count!r}")
    if count < 1:
        raise InputError(f"samples must be at least one random vector, got {count}")
    return count


def leading(a: Products, k: int, generator: torch.Generator | None) -> Leading:
    """The ``k`` largest singular values and their vectors: power iterations on random columns."""
    refuse_summed(a)
    o, i = a.shape[1:]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= min(o, i):
        raise InputError(f"svd(k): a block is {o} x {i}, so k is from 1 to {min(o, i)}, got {k!r}")
    if a.inputs.shared:
        raise UnsupportedError(
            "svd(k) of parameters would hold vectors as long as all parameters for every sample; "
            "the singular values are the roots of torch.linalg.eigvalsh(A.gram())"
        )
    half = sorted(str(d) for d in {a.dtype, a.inputs.dtype} & _HALF)
    if half:
        raise UnsupportedError(
            f"svd(k) of a block in {half[0]}: torch.linalg has no decompositions in half "
            "precision; make the model and its inputs float32"
        )
    width = k + OVERSAMPLING
    if width >= min(o, i):
        u, s, vh = _decomposed(a.matrix())
        return Leading(u[..., :k], s[:, :k], vh[:, :k])
    refuse_summed(a, "svd(k)")
    a.refuse_coupled()
    device = drawn_on(generator, a.device)
    start = torch.randn(a.samples, i, width, generator=generator, device=device, dtype=a.dtype)
    found = torch.linalg.qr(_through(a, start.to(a.device)))[0]
    for _ in range(POWER_ITERATIONS):  # an orthonormal basis each time: rounding eats small ones
        back = torch.linalg.qr(_through(a.T, found))[0]
        found = torch.linalg.qr(_through(a, back))[0]
    small = _through(a.T, found).mT  # Qᵀ J, [N, width, I]
    u, s, vh = _decomposed(small)
    return Leading((found @ u)[..., :k], s[:, :k], vh[:, :k])


def _decomposed(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decompositions; NaN for blocks that are not finite, and for no others."""
    odd = ~blocks.isfinite().all(2).all(1)
    if not odd.any():  # LAPACK raises for the whole batch
        u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
        return u, s, vh
    found = torch.linalg.svd(blocks.masked_fill(odd[:, None, None], 0), full_matrices=False)
    u, s, vh = (t.masked_fill(odd.view(-1, *(1,) * (t.dim() - 1)), torch.nan) for t in found)
    return u, s, vh


def _through(a: Products, flat: Tensor) -> Tensor:
    """``J x`` for flat columns ``[N, I, K]``."""
    columns = a.inputs.split(flat.movedim(2, 0))
    return a.outputs.flat(a.in_turns(a.push, columns, a.outputs)).permute(1, 2, 0)
