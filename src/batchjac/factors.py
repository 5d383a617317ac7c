"""Gradients of a matrix, one for each row and sample, as the products that they are.

A layer that applies a matrix ``w [g, c, k]`` at positions ``p`` (tokens, pixels; one for a plain
Linear) to activations ``a`` has toward ``w``, with cotangents ``d``,

    G[v,n][g,c,k] = sum_p d[v,n,g,c,p] a[n,g,k,p].

Its rows need not be formed for their inner products. With ``q[n,m,g] = a[n,g]ᵀ a[m,g] [P, P]``,

    <G[v,n], G[w,m]> = sum_g <d[v,n,g] q[n,m,g], d[w,m,g]>,

which takes ``P² (K + V C) + V² C P`` multiply-adds for all rows of two samples. Forming the rows
takes ``V C K P`` a sample and their products ``V² C K``. Operations decide, layer by layer. Where
one matrix is used several times its gradients add up before anything is multiplied: their positions
are positions of one longer sum.

Source: Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, for the norm at
one position; Rochette, Manoel and Tramel, arXiv 1912.06015, for convolutions; Novak, Sohl-Dickstein
and Schoenholz, "Fast finite width neural tangent kernel", 2022, for choosing by operations.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from batchjac.block import Block


@dataclass(frozen=True)
class Sizes:
    """Of the equations above: rows, samples, groups, channels, entries of a kernel, positions."""

    v: int
    n: int
    g: int
    c: int
    k: int
    p: int

    @property
    def entries(self) -> int:
        """Of the parameter."""
        return self.g * self.c * self.k

    @property
    def forming(self) -> int:
        """Multiply-adds that form all rows."""
        return self.v * self.n * self.entries * self.p

    def meeting(self, pairs: int, rows: int) -> int:
        """Multiply-adds for so many pairs of samples by factors; ``rows`` of one meet each row."""
        each = self.p**2 * (self.k + self.v * self.c) + self.v * rows * self.c * self.p
        return pairs * self.g * each


@dataclass(frozen=True)
class Pair:
    """One use of the matrix: ``cotangent [V, N, g, c, P]``, ``activation [N, g, *K, *P]``.

    The activation is a view, of which ``last`` axes are positions: its windows may overlap.
    """

    cotangent: Tensor
    activation: Tensor
    last: int

    def of(self, samples: slice) -> "Pair":
        return Pair(self.cotangent[:, samples], self.activation[samples], self.last)

    @cached_property
    def columns(self) -> Tensor:
        """``a[n,g,k,p]``, dense."""
        a = self.activation
        positions = a.dim() - self.last
        kernel = a.shape[2:positions].numel()
        return a.reshape(*a.shape[:2], kernel, a.shape[positions:].numel())


@dataclass
class Factored:
    """``G [V*N, *shape]``, rows first, as the sum of products of pairs.

    ``kernel_first``: the parameter is laid out ``[k, c]``, as the matrix of ``x @ w`` is, instead
    of ``[g, c, k]``. Law: ``block()`` is the rows that the rule of the node would have given.
    """

    pairs: tuple[Pair, ...]
    shape: tuple[int, ...]
    kernel_first: bool = False
    rest: Block | None = field(default=None)  # what came without factors

    @property
    def sizes(self) -> Sizes:
        """Of all pairs together."""
        v, n, g, c, _ = self.pairs[0].cotangent.shape
        k = self.pairs[0].activation[0, 0].numel() // self._positions[0]
        return Sizes(v, n, g, c, k, sum(self._positions))

    @property
    def _positions(self) -> list[int]:
        return [pair.cotangent.shape[4] for pair in self.pairs]

    def of(self, samples: slice) -> "Factored":
        """The same for some samples."""
        return replace(self, pairs=tuple(pair.of(samples) for pair in self.pairs))

    @cached_property
    def columns(self) -> Tensor:
        """``a [N, g, K, P]`` of all pairs."""
        return _joined([pair.columns for pair in self.pairs])

    @cached_property
    def cotangent(self) -> Tensor:
        """``d [N, g, V, C, P]`` of all pairs."""
        return _joined([pair.cotangent for pair in self.pairs]).permute(1, 2, 0, 3, 4).contiguous()

    def transposed(self, shape: tuple[int, ...]) -> "Factored":
        """The same rows where the parameter is seen as its transpose."""
        rest = self.rest and Block(self.rest.data.mT, shape)
        return replace(self, shape=shape, kernel_first=not self.kernel_first, rest=rest)

    def take(self, other: object) -> None:
        """Add what else reaches the parameter: pairs side by side where they are laid out alike."""
        alike = (
            isinstance(other, Factored)
            and other.rest is None
            and (other.shape, other.kernel_first) == (self.shape, self.kernel_first)
            and other.sizes.entries == self.sizes.entries
            and other.sizes.g == self.sizes.g
        )
        if alike and isinstance(other, Factored):
            self.pairs += other.pairs
            return
        # a ``Gathered``, whose protocol lies further down
        block = other if isinstance(other, Block) else other.block()  # type: ignore[attr-defined]
        self.rest = block if self.rest is None else self.rest.plus(block)

    def block(self) -> Block:
        """All rows, formed: ``[V*N, *shape]``."""
        letters = "vngkc" if self.kernel_first else "vngck"
        total = torch.zeros(())
        for k, pair in enumerate(self.pairs):
            part = torch.einsum(f"vngcp,ngkp->{letters}", pair.cotangent, pair.columns)
            total = part if k == 0 else total + part
        found = Block(total.reshape(-1, *self.shape), self.shape)
        return found if self.rest is None else found.plus(self.rest)

    def rows(self, most: int) -> Iterator[Tensor]:
        """Pieces ``[N, V, entries]`` of all rows, of at most about ``most`` entries each."""
        size = self.sizes
        step = max(1, most // (size.n * size.v * size.k))
        few = max(1, most // (size.g * size.k * size.p))  # samples whose activations are unrolled
        for group in range(size.g):
            for first in range(0, size.c, step):
                found = []
                for start in range(0, size.n, few):
                    part = self if few >= size.n else self.of(slice(start, start + few))
                    d = _joined([q.cotangent[:, :, group, first : first + step]
                                 for q in part.pairs])  # fmt: skip
                    n, c, p = d.shape[1:]
                    flat = d.transpose(0, 1).reshape(n, size.v * c, p)
                    found.append((flat @ part.columns[:, group].mT).reshape(n, size.v, -1))
                yield found[0] if len(found) == 1 else torch.cat(found)


def _joined(parts: list[Tensor]) -> Tensor:
    """Side by side along the positions."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def norms(f: Factored, most: int) -> Tensor:
    """``|G[v,n]|²``, ``[N, V]``; intermediate tensors have at most about ``most`` entries."""
    size = f.sizes
    formed = size.meeting(size.n, 1) > size.forming + size.v * size.n * size.entries
    found = []
    for part in _some(f, most, 1 if formed else size.g * size.p**2):
        if formed:
            total = sum(piece.square().sum(2) for piece in part.rows(most))
        else:
            d = part.cotangent
            total = (_weighted(part) * d).sum((1, 3, 4))
        found.append(total)
    return torch.cat(found)  # type: ignore[arg-type]  # sum() of tensors may be the int 0


def grams(f: Factored, most: int) -> Tensor:
    """``<G[v,n], G[w,n]>``, ``[N, V, V]``."""
    size = f.sizes
    formed = size.meeting(size.n, size.v) > size.forming + size.v**2 * size.n * size.entries
    found = []
    for part in _some(f, most, 1 if formed else size.g * size.p**2):
        if formed:
            total = sum(piece @ piece.mT for piece in part.rows(most))
        else:
            total = _flat(_weighted(part)) @ _flat(part.cotangent).mT
        found.append(total)
    return torch.cat(found)  # type: ignore[arg-type]  # as above


def meets(f: Factored, total: Tensor, most: int) -> None:
    """Add ``<G[v,n], G[w,m]>`` to the upper half of ``total [N*V, N*V]``."""
    size, rows = f.sizes, f.sizes.v * f.sizes.n
    pairs = size.n * (size.n + 1) // 2
    formed = size.forming + rows**2 * size.entries // 2
    if size.p == 1:
        _meet_once(f, total)
    elif size.meeting(pairs, size.v) < formed:
        _meet(f, total, most)
    else:
        for piece in f.rows(most):
            add_products(total, piece.reshape(rows, -1))


def _meet_once(f: Factored, total: Tensor) -> None:
    """One position: the product of two small Grams."""
    n, g, v, c, _ = f.cotangent.shape
    for group in range(g):
        a = f.columns[:, group, :, 0]
        d = f.cotangent[:, group].reshape(n * v, c)
        weights = (a @ a.T).repeat_interleave(v, 0).repeat_interleave(v, 1)
        total += weights * (d @ d.T)


def _meet(f: Factored, total: Tensor, most: int) -> None:
    """Each sample's factors with those of the later ones, and its own."""
    n, g, v, c, p = f.cotangent.shape
    a, d = f.columns, f.cotangent
    few = max(1, most // (g * p * max(p, v * c)))
    for first in range(n):
        for start in range(first, n, few):
            stop = min(n, start + few)
            q = a[first].mT @ a[start:stop]  # [m, g, P, P]
            z = d[first].reshape(g, v * c, p) @ q
            part = z.reshape(-1, g, v, c, p)
            found = _flat(part) @ _flat(d[start:stop]).mT  # [m, V, V]
            total[first * v : (first + 1) * v, start * v : stop * v] += found.transpose(
                0, 1
            ).flatten(1)


def add_products(total: Tensor, rows: Tensor, step: int = 128) -> None:
    """Add ``rows rowsᵀ`` to the upper half of ``total``, whole blocks at a time."""
    for start in range(0, len(rows), step):
        total[start : start + step, start:] += rows[start : start + step] @ rows[start:].T


def contracted(f: Factored, weights: Tensor) -> Tensor:
    """``sum_vn weights[v,n] G[v,n]``, in the parameter's shape."""
    letters = "gkc" if f.kernel_first else "gck"
    total = torch.zeros(())
    for k, pair in enumerate(f.pairs):
        d = torch.einsum("vn,vngcp->ngcp", weights.to(pair.cotangent), pair.cotangent)
        part = torch.einsum(f"ngcp,ngkp->{letters}", d, pair.columns)
        total = part if k == 0 else total + part
    return total.reshape(f.shape)


def _some(f: Factored, most: int, beside: int) -> Iterator[Factored]:
    """A few samples at a time, with ``beside`` entries for each of them beside the factors."""
    size = f.sizes
    each = max(size.g * size.p * max(size.k, size.v * size.c), beside)
    few = max(1, most // each)
    if few >= size.n:
        yield f
        return
    for start in range(0, size.n, few):
        yield f.of(slice(start, start + few))


def _weighted(f: Factored) -> Tensor:
    """``d q`` with each sample's own ``q``, ``[N, g, V, C, P]``."""
    a, d = f.columns, f.cotangent
    q = a.mT @ a
    return (d.flatten(2, 3) @ q).reshape(d.shape)


def _flat(d: Tensor) -> Tensor:
    """``[N, g, V, C, P]`` as ``[N, V, g C P]``."""
    return d.transpose(1, 2).flatten(2)
