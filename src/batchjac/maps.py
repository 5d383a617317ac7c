"""Linear maps known by their products: one block ``[*out] x [*in]`` for each of N samples.

A map says how columns go through it and how rows go through its transpose; all else follows.
Where all samples share what goes in (parameters), a map takes one value for all of them, and its
transpose sums over the samples. Flat indices count through all tensors in order, as ``flatten``
would: O outputs and I inputs for one sample.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac import exports, measures
from batchjac.block import Block
from batchjac.errors import InputError, UnsupportedError
from batchjac.measures import Leading
from batchjac.pulling import in_turns
from batchjac.space import Space, apart, entries_of, nested, renamed

Blocks = Sequence[Block]
Through = Callable[[Blocks], list[Block]]


class LinearMap(ABC):
    """What has products with tensors, and so blocks, a transpose and compositions.

    Laws: ``<u, A @ v> = <A.T @ u, v>``; ``(A.T).T is A``; ``A[:, c]`` equals ``A @ e_c`` and column
    c of ``A.matrix()``; ``(B @ A) @ v = B @ (A @ v)``.
    """

    @property
    @abstractmethod
    def inputs(self) -> Space:
        """What goes in."""

    @property
    @abstractmethod
    def outputs(self) -> Space:
        """What comes out."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """How many blocks there are, N."""

    @abstractmethod
    def push(self, columns: Blocks) -> list[Block]:
        """``A v`` for columns ``[K, N, *in]``, one block for each tensor."""

    @abstractmethod
    def pull(self, rows: Blocks) -> list[Block]:
        """``Aᵀ u`` for rows ``[K, N, *out]``."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """How many columns or rows go together."""

    @property
    def T(self) -> "LinearMap":
        """The transpose: it takes what this map gives, and gives what it takes."""
        return Transposed(self)

    @property
    def shape(self) -> torch.Size:
        """``[N, O, I]``."""
        return torch.Size((self.samples, self.outputs.width, self.inputs.width))

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes out."""
        return self.outputs.leaves[0].dtype

    @property
    def device(self) -> torch.device:
        """Of what comes out."""
        return self.outputs.leaves[0].device

    @torch.inference_mode(False)
    def __matmul__(self, other: Any) -> Any:
        """``A @ v``, one pass; with another map the map that applies it first."""
        if isinstance(other, LinearMap):
            return Composed(self, other)
        blocks, many = self.inputs.parts(other, "v")
        return self.outputs.nest(self.in_turns(self.push, blocks, self.outputs), many)

    def in_turns(self, go: Through, blocks: Blocks, into: Space) -> list[Block]:
        """``go`` on as many columns at a time as there is room for."""
        if blocks[0].rows == 0:
            return [
                Block(torch.zeros(0, *a.shape, dtype=a.dtype, device=a.device), a.shape)
                for a in into.leaves
            ]
        return in_turns(go, blocks, self.at_once)

    def rows(self, entries: Sequence[int]) -> Tensor:
        """Rows of every sample's block, ``[N, len(entries), I]``."""
        if not self.inputs.shared:
            self.refuse_coupled()
        return self._lines(self.pull, self.outputs, self.inputs, entries)

    def columns(self, entries: Sequence[int]) -> Tensor:
        """Columns of every sample's block, ``[N, O, len(entries)]``."""
        self.refuse_coupled()
        return self._lines(self.push, self.inputs, self.outputs, entries).transpose(1, 2)

    def _lines(self, go: Through, of: Space, into: Space, entries: Sequence[int]) -> Tensor:
        """``go`` on these entries of the identity, ``[N, len(entries), width]``."""
        measures.refuse_summed(self)
        basis = of.basis(entries)
        if not into.shared:
            return into.flat(self.in_turns(go, basis, into)).transpose(0, 1)
        singly = [apart(b) for b in basis]  # what is summed over samples has one at a time
        flat = into.flat(self.in_turns(go, singly, into))
        if flat.shape[1] == self.samples:  # beside what is shared, what is not
            own = torch.arange(self.samples, device=flat.device).repeat(len(entries))
            flat = flat[torch.arange(len(flat), device=flat.device), own].unsqueeze(1)
        lines: Tensor = flat[:, 0].unflatten(0, (len(entries), self.samples))
        return lines.transpose(0, 1)

    def refuse_coupled(self) -> None:  # noqa: B027  (most maps have nothing to refuse)
        """Raise where samples have no blocks of their own."""

    def pieces(self, over: str) -> Iterator[tuple[list[int], Tensor]]:
        """All rows, or all columns, a few at a time: which, and ``[N, rows, I]`` or ``[N, O, c]``.

        ``over``: "rows" or "columns".
        """
        count = self.shape[1] if over == "rows" else self.shape[2]
        step = max(1, self.at_once // (self.samples if self.inputs.shared else 1))
        for start in range(0, count, step):
            entries = list(range(start, min(count, start + step)))
            yield entries, (self.rows(entries) if over == "rows" else self.columns(entries))

    @property
    def shorter(self) -> str:
        """What there is less of, "rows" or "columns"; columns come in the outputs' precision."""
        exact = all(a.dtype == self.inputs.dtype for a in self.outputs.leaves)
        fewer = self.shape[2] < self.shape[1] and not self.inputs.shared
        return "columns" if exact and fewer else "rows"

    @torch.inference_mode(False)
    def matrix(self) -> Tensor:
        """Every sample's block, ``[N, O, I]``, which the map avoids. Cost: min(O, I) passes."""
        over = self.shorter
        found = [piece for _, piece in self.pieces(over)]
        if not found:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return torch.cat(found, dim=1 if over == "rows" else 2)

    def dense(self) -> Any:
        """Outputs nested over inputs, each ``[N, *out, *in]``, as ``jacobian`` gives it."""
        matrix, found, row = self.matrix(), [], 0
        for out in self.outputs.leaves:
            line, column = [], 0
            for into in self.inputs.leaves:
                part = matrix[:, row : row + out.width, column : column + into.width]
                line.append(part.reshape(self.samples, *out.inner, *into.inner).to(into.dtype))
                column += into.width
            found.append(nested(self.inputs, line))
            row += out.width
        return nested(self.outputs, found)

    @torch.inference_mode(False)
    def norm(
        self,
        *,
        squared: bool = False,
        samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The Frobenius norm of every sample's block, ``[N]``, exact or by random projection.

        Args:
            squared: ``sum_oi J[n,o,i]²`` instead of its root.
            samples: Estimate the square by the mean of ``|Jᵀ z|²`` over so many vectors of random
                signs: unbiased, of variance ``2 sum_{o != p} (J Jᵀ)[o,p]² / samples``. Its root is
                a little too small on average (Jensen).
            generator: Where random signs come from; torch's own if there is none.

        Cost: ``min(O, I)`` rows or columns, or ``samples`` rows, never all at once. Toward
        parameters O rows, and products of factors. Half precision gives float32.

        Source: Hutchinson, Communications in Statistics 19(2), 1990; the variance is its
        proposition 1 for ``J Jᵀ``.
        """
        total = self.norm_squared() if samples is None else self.norm_estimate(samples, generator)
        return total if squared else measures.root(total)

    def norm_squared(self) -> Tensor:
        """``sum_oi J[n,o,i]²``, ``[N]``."""
        return measures.norm_squared(self)

    def norm_estimate(self, samples: int, generator: torch.Generator | None) -> Tensor:
        """The mean of ``|Jᵀ z|²``, ``[N]``."""
        return measures.norm_squared_estimate(self, samples, generator)

    @torch.inference_mode(False)
    def gram(self, *, of: str = "outputs", across: bool = False) -> Tensor:
        """Inner products of the rows of every sample's block, ``J Jᵀ``, or of its columns.

        Args:
            of: ``"outputs"``: ``J Jᵀ [N, O, O]``; ``"inputs"``: ``Jᵀ J [N, I, I]``.
            across: Toward parameters, also between samples: ``[N, O, N, O]``, the empirical neural
                tangent kernel.

        Source: Jacot, Gabriel and Hongler, "Neural tangent kernel", 2018, for the kernel.
        """
        if of not in ("outputs", "inputs"):
            raise InputError(f'of must be "outputs" or "inputs", got {of!r}')
        if across:
            if self.inputs.shared:
                return measures.kernel(self)
            raise InputError(
                "across=True compares samples in what they share, and these inputs belong to one "
                'sample each; use wrt="parameters"'
            )
        if of == "inputs":
            if self.inputs.shared:
                raise UnsupportedError(
                    f"JᵀJ of {self.shape[2]} parameters for every sample; J @ v and J.T @ u give "
                    "products with it"
                )
            return measures.gram(self.T)
        return measures.gram(self)

    @torch.inference_mode(False)
    def diag(self) -> Tensor:
        """``J[n,o,o]``, ``[N, O]``: the diagonal of every square block. Cost: O passes."""
        return measures.diagonal(self)

    @torch.inference_mode(False)
    def trace(
        self, *, samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The trace of every sample's block, ``[N]``: the divergence of f.

        Args:
            samples: Estimate it by the mean of ``zᵀ J z`` over so many vectors of random signs:
                unbiased, of variance ``2 sum_{o != i} S[o,i]² / samples`` with
                ``S = (J + Jᵀ) / 2``.
            generator: Where random signs come from; torch's own if there is none.

        Source: Hutchinson, Communications in Statistics 19(2), 1990, proposition 1.
        """
        if samples is None:
            return measures.diagonal(self).sum(1)
        return measures.trace_estimate(self, samples, generator)

    @torch.inference_mode(False)
    def svd(self, k: int, *, generator: torch.Generator | None = None) -> Leading:
        """The ``k`` largest singular values of every sample's block, with their vectors.

        Exact where a block has at most ``k + 10`` rows or columns, by forming it. Otherwise by
        four power iterations on ``k + 10`` random columns: relative error of value ``j`` about
        ``(s[k + 10] / s[j])`` to the power 9.

        Args:
            k: How many, at most ``min(O, I)``.
            generator: Where the random columns come from; torch's own if there is none.

        Returns: ``U [N, O, k]``, ``S [N, k]``, ``Vh [N, k, I]``; NaN for a sample whose block is
        not finite.

        Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review
        53(2), 2011, algorithms 4.4 and 5.1.
        """
        return measures.leading(self, k, generator)

    def to_scipy(self) -> Any:
        """A SciPy ``LinearOperator`` ``[N * O, N * I]``, or ``[N * O, P]``; a product is a pass."""
        return exports.to_scipy(self)

    def to_sparse(self, layout: torch.layout = torch.sparse_coo) -> Tensor:
        """``[N * O, N * I]``, all blocks along the diagonal: COO or BSR. Cost: ``matrix()``."""
        return exports.to_sparse(self, layout)

    @torch.inference_mode(False)
    def __getitem__(self, key: Any) -> Tensor:
        """Rows, columns or blocks of every sample's matrix, dense.

        ``A[:, c]`` is ``[N, O]``, ``A[r]`` is ``[N, I]``, ``A[rows, cols]`` is ``[N, rows, cols]``:
        integers drop their axis; slices, ranges, lists and arrays of integers keep it. What there
        are fewer of is computed, rows or columns.
        """
        pair = key if isinstance(key, tuple) else (key, slice(None))
        if len(pair) != 2:
            raise InputError(
                f"A[{key!r}]: a map has two axes beside the samples, outputs and inputs; index "
                "samples by asking for the operator of those inputs"
            )
        rows, drop_rows = entries_of(pair[0], self.shape[1], "outputs")
        columns, drop_columns = entries_of(pair[1], self.shape[2], "inputs")
        if len(columns) < len(rows) or (self.inputs.shared and len(columns) < 2 * len(rows)):
            found = self.columns(columns)[:, rows]
        else:
            found = self.rows(rows)[:, :, columns]
        if drop_columns:
            found = found.squeeze(2)
        return found.squeeze(1) if drop_rows else found


@dataclass(frozen=True, eq=False)
class Transposed(LinearMap):
    """The transpose of a map."""

    of: LinearMap

    @property
    def inputs(self) -> Space:
        return self.of.outputs

    @property
    def outputs(self) -> Space:
        return self.of.inputs

    @property
    def samples(self) -> int:
        return self.of.samples

    @property
    def T(self) -> LinearMap:
        return self.of

    @property
    def at_once(self) -> int:
        return self.of.at_once

    def push(self, columns: Blocks) -> list[Block]:
        return self.of.pull(columns)

    def pull(self, rows: Blocks) -> list[Block]:
        return self.of.push(rows)

    def rows(self, entries: Sequence[int]) -> Tensor:
        return self.of.columns(entries).transpose(1, 2)

    def columns(self, entries: Sequence[int]) -> Tensor:
        return self.of.rows(entries).transpose(1, 2)

    def refuse_coupled(self) -> None:
        self.of.refuse_coupled()

    def __repr__(self) -> str:
        return f"transpose of {self.of!r}"


@dataclass(frozen=True, eq=False)
class Composed(LinearMap):
    """``outer @ inner``: the product of the two blocks of every sample, never formed."""

    outer: LinearMap
    inner: LinearMap

    def __post_init__(self) -> None:
        gives, takes = self.inner.outputs, self.outer.inputs
        if [(a.shape, a.dtype) for a in gives.leaves] != [(a.shape, a.dtype) for a in takes.leaves]:
            raise InputError(
                f"B @ A: A gives {gives.words} {self.inner.dtype}, but B takes {takes.words} "
                f"{takes.leaves[0].dtype}; they must be the same tensors in the same order"
            )
        if takes.shared:
            raise UnsupportedError(
                "B @ A: B takes parameters, which all samples share, so the product is no block "
                "for each sample; apply the maps one after the other"
            )

    @property
    def inputs(self) -> Space:
        return self.inner.inputs

    @property
    def outputs(self) -> Space:
        return self.outer.outputs

    @property
    def samples(self) -> int:
        return self.outer.samples

    @property
    def at_once(self) -> int:
        return min(self.outer.at_once, self.inner.at_once)

    def push(self, columns: Blocks) -> list[Block]:
        return self.outer.push(renamed(self.inner.push(columns), self.outer.inputs))

    def pull(self, rows: Blocks) -> list[Block]:
        return self.inner.pull(renamed(self.outer.pull(rows), self.inner.outputs))

    def refuse_coupled(self) -> None:
        self.outer.refuse_coupled()
        self.inner.refuse_coupled()

    def __repr__(self) -> str:
        return f"({self.outer!r}) after ({self.inner!r})"
