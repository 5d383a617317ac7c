"""Matrix products: the other factor, applied to all rows at once.

Every product is a sentence of index letters, ``y[out] = sum a[left] b[right]``, as ``nk,ko->no``.
Its two gradients are the sentences read backwards, ``g[v out] conj(b[right]) -> v left``, and which
letter is the sample says which factor the samples share. An axis of size 1 in the block stands for
one that is repeated; ``einsum`` then sums the other factor alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.apart import each_sample, split
from batchjac.rules.pointwise import scaled
from batchjac.rules.registry import Blocks, rule
from batchjac.samples import SHARED, Place, SampleAxis, broadcast


@dataclass(frozen=True)
class Product:
    """``y[out] = beta * c + alpha * sum a[left] b[right]``; the saved names of ``a`` and ``b``."""

    left: str
    right: str
    out: str
    names: tuple[str, str]
    added: bool = False  # there is a ``c``, the first edge, broadcast to the output


PRODUCTS = {
    "MmBackward0": Product("nk", "ko", "no", ("self", "mat2")),
    "BmmBackward0": Product("bnk", "bko", "bno", ("self", "mat2")),
    "MvBackward0": Product("nk", "k", "n", ("self", "vec")),
    "DotBackward0": Product("k", "k", "", ("self", "tensor")),
    "AddmmBackward0": Product("nk", "ko", "no", ("mat1", "mat2"), added=True),
    "AddmvBackward0": Product("nk", "k", "n", ("mat", "vec"), added=True),
    "AddrBackward0": Product("n", "o", "no", ("vec1", "vec2"), added=True),
    "BaddbmmBackward0": Product("bnk", "bko", "bno", ("batch1", "batch2"), added=True),
    "AddbmmBackward0": Product("bnk", "bko", "no", ("batch1", "batch2"), added=True),
}


@dataclass(frozen=True)
class Factor:
    """A wanted factor: the index of its edge, its letters, and the other factor."""

    edge: int
    mine: str
    others: str
    other: Tensor


def _factors(step: Step) -> list[Factor]:
    """The factors whose gradient is wanted, each with the conjugate of the other one."""
    product = PRODUCTS[step.name]
    a = len(step.edges) - 2
    turns = ((a, product.left, product.right, 1), (a + 1, product.right, product.left, 0))
    return [
        Factor(k, mine, others, step.saved(product.names[name]).conj())
        for k, mine, others, name in turns
        if step.edges[k] is not None
    ]


def _place(step: Step, at: SampleAxis, letters: str) -> Place:
    letter = PRODUCTS[step.name].out[at.dim]
    dim = letters.find(letter)
    return SHARED if dim < 0 else SampleAxis(dim, at.outer, at.inner)


def _samples(step: Step, at: SampleAxis) -> list[Place]:
    """The factor that has the sample's letter has the samples there; the other has none."""
    product = PRODUCTS[step.name]
    places: list[Place] = [_place(step, at, product.left), _place(step, at, product.right)]
    if product.added:
        c = step.edges[0]
        places.insert(0, None if c is None else broadcast(at, step.shape, c.shape))
    return [None if e is None else p for e, p in zip(step.edges, places, strict=True)]


def _added(step: Step, g: Block) -> tuple[Block | None, Block]:
    """The block toward ``c`` and the block of the product, each with its scalar."""
    if not PRODUCTS[step.name].added:
        return None, g
    toward = None if step.edges[0] is None else scaled(g, step.saved("beta"))
    return toward, scaled(g, step.saved("alpha"))


def _per_sample(step: Step, blocks: Blocks, at: SampleAxis) -> Sequence[Block | None]:
    """``nk,ko->no`` with samples ``n = r s t``: ``g[v,r,s,t,o] conj(a[r,s,t,k]) -> v s k o``."""
    (g,) = blocks
    assert g is not None
    c, g = _added(step, g)
    found: list[Block | None] = [None] * len(step.edges)
    if c is not None and step.edges[0] is not None:
        found[0] = each_sample(c, at, step.edges[0].shape)
    out = PRODUCTS[step.name].out
    letter = out[at.dim]
    rows = split(g.data, g.shape, at, at.dim + 1)
    for f in _factors(step):
        apart = [letters.replace(letter, "rst") for letters in (out, f.others)]
        other = split(f.other, g.shape, at, f.others.index(letter))
        data = torch.einsum(f"v{apart[0]},{apart[1]}->vs{f.mine}", rows, other)
        found[f.edge] = _block(step, f, data.flatten(0, 1))
    return found


def _block(step: Step, factor: Factor, data: Tensor) -> Block:
    edge = step.edges[factor.edge]
    assert edge is not None
    return Block(data, edge.shape)


@rule(*PRODUCTS, samples=_samples, per_sample=_per_sample)
def product(step: Step, blocks: Blocks) -> Sequence[Block | None]:
    """``y = sum a[left] b[right]``: ``g[v out] conj(b[right])`` and ``g[v out] conj(a[left])``."""
    (g,) = blocks
    assert g is not None
    c, g = _added(step, g)
    found: list[Block | None] = [None] * len(step.edges)
    found[0] = c  # when nothing is added this is the first factor, filled in below
    out = PRODUCTS[step.name].out
    for f in _factors(step):
        data = torch.einsum(f"v{out},{f.others}->v{f.mine}", g.data, f.other)
        found[f.edge] = _block(step, f, data)
    return found
