"""Matrix products: the other factors, applied to all rows at once.

Every product is a sentence of index letters, ``y[out] = sum a[left] b[right]``, as ``nk,ko->no``.
Its gradients are the sentences read backwards, ``g[v out] conj(b[right]) -> v left``, and which
letter is the sample says which factors the samples share. An axis of size 1 in the block stands for
one that is repeated; ``einsum`` then sums the other factor alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac import kernels
from batchjac.block import Block, Scaled
from batchjac.factors import Factored, Pair
from batchjac.graph import Step
from batchjac.rules.apart import each_sample, split
from batchjac.rules.diagonal import scaled
from batchjac.rules.pointwise import only
from batchjac.rules.registry import Blocks, forward, rule
from batchjac.samples import SHARED, Place, SampleAxis, broadcast


@dataclass(frozen=True)
class Product:
    """``y[out] = beta * c + alpha * sum a[.] b[.] ...``: each factor's letters and saved name."""

    factors: tuple[str, ...]
    out: str
    names: tuple[str, ...]
    added: bool = False  # there is a ``c``, the first edge, broadcast to the output


PRODUCTS = {
    "MmBackward0": Product(("nk", "ko"), "no", ("self", "mat2")),
    "BmmBackward0": Product(("bnk", "bko"), "bno", ("self", "mat2")),
    "MvBackward0": Product(("nk", "k"), "n", ("self", "vec")),
    "DotBackward0": Product(("k", "k"), "", ("self", "tensor")),
    "VdotBackward0": Product(("k", "k"), "", ("self", "other")),
    "AddmmBackward0": Product(("nk", "ko"), "no", ("mat1", "mat2"), added=True),
    "AddmvBackward0": Product(("nk", "k"), "n", ("mat", "vec"), added=True),
    "AddrBackward0": Product(("n", "o"), "no", ("vec1", "vec2"), added=True),
    "BaddbmmBackward0": Product(("bnk", "bko"), "bno", ("batch1", "batch2"), added=True),
    "AddbmmBackward0": Product(("bnk", "bko"), "no", ("batch1", "batch2"), added=True),
}
REAL = ("TrilinearBackward0", "VdotBackward0")  # torch conjugates otherwise here, or not at all
LETTERS = "abcdefghijklm"  # none that the sentences below use


def _product(step: Step) -> Product:
    """The sentence of a node; three factors of any shape (``nn.Bilinear``) say it themselves."""
    if step.name != "TrilinearBackward0":
        return PRODUCTS[step.name]
    gone = [step.saved(name) for name in ("expand1", "expand2", "expand3", "sumdim")]
    count = len(step.shape) + len(gone[-1])
    *factors, out = ("".join(LETTERS[d] for d in range(count) if d not in g) for g in gone)
    return Product(tuple(factors), out, ("i1", "i2", "i3"))


@dataclass(frozen=True)
class Factor:
    """A wanted factor: the index of its edge, its letters, and the other factors."""

    edge: int
    mine: str
    letters: tuple[str, ...]
    others: tuple[Tensor, ...]


def _factors(step: Step, product: Product) -> list[Factor]:
    """The factors whose gradient is wanted, each with the conjugates of the other ones."""
    found = []
    for k, mine in enumerate(product.factors):
        edge = k + product.added
        if step.edges[edge] is not None:
            rest = [j for j in range(len(product.factors)) if j != k]
            others = tuple(step.saved(product.names[j]).conj() for j in rest)
            letters = tuple(product.factors[j] for j in rest)
            found.append(Factor(edge, mine, letters, others))
    return found


def _samples(step: Step, at: SampleAxis) -> list[Place]:
    """A factor that has the sample's letter has the samples there; the others have none."""
    product = _product(step)
    dims = [letters.find(product.out[at.dim]) for letters in product.factors]
    places: list[Place] = [SHARED if d < 0 else SampleAxis(d, at.outer, at.inner) for d in dims]
    if product.added:
        c = step.edges[0]
        places.insert(0, None if c is None else broadcast(at, step.shape, c.shape))
    return [None if e is None else p for e, p in zip(step.edges, places, strict=True)]


def _added(step: Step, product: Product, g: Block) -> tuple[Block | None, Block]:
    """The block toward ``c`` and the block of the product, each with its scalar."""
    if not product.added:
        return None, g
    toward = None if step.edges[0] is None else scaled(g, step.saved("beta"))
    return toward, scaled(g, step.saved("alpha"))


def _per_sample(step: Step, blocks: Blocks, at: SampleAxis) -> Any:
    """``nk,ko->no`` with samples ``n = r s t``: ``g[v,r,s,t,o] conj(a[r,s,t,k]) -> v s k o``."""
    product = _product(step)
    c, g = _added(step, product, only(blocks))
    if step.name in REAL and g.data.is_complex():
        return NotImplemented
    found: list[Block | None] = [None] * len(step.edges)
    if c is not None and step.edges[0] is not None:
        found[0] = each_sample(c, at, step.edges[0].shape)
    letter = product.out[at.dim]
    rows = split(g.data, g.shape, at, at.dim + 1)
    for f in _factors(step, product):
        sentence = ",".join(("v" + product.out, *f.letters)).replace(letter, "rst")
        others = [
            split(other, g.shape, at, letters.index(letter)) if letter in letters else other
            for letters, other in zip(f.letters, f.others, strict=True)
        ]
        data = torch.einsum(f"{sentence}->vs{f.mine}", rows, *others)
        found[f.edge] = _block(step, f, data.flatten(0, 1))
    return found


def _apart(step: Step, blocks: Blocks, at: SampleAxis) -> Any:
    """The same, where the sample's letter is one of two in the output, not yet multiplied.

    The output's other letter is then the channel; what the sample axis holds beside the samples,
    tokens for instance, are the positions.
    """
    product = _product(step)
    plain = len(product.out) == len(product.factors) == 2
    if not plain or only(blocks).data.is_complex():
        return _per_sample(step, blocks, at)
    c, g = _added(step, product, only(blocks))
    edges = step.edges
    found: list[Any] = [None] * len(edges)
    if c is not None and edges[0] is not None:
        found[0] = each_sample(c, at, edges[0].shape)
    letter = product.out[at.dim]
    channel = 1 - at.dim
    rows = split(g.spread(0, 1), g.shape, at, at.dim + 1)  # v, and r s t with the channel
    cotangent = rows.movedim(4 if channel == 1 else 1, 1)  # v c r s t
    cotangent = cotangent.permute(0, 3, 1, 2, 4).flatten(3).unsqueeze(2)  # v s 1 c (r t)
    for f in _factors(step, product):
        (letters,), (other,) = f.letters, f.others
        if product.out[channel] not in f.mine or len(f.mine) != 2:
            return _per_sample(step, blocks, at)
        where = letters.index(letter)
        apart = split(other, g.shape, at, where).movedim(where + 1, 0)  # s, and r t with k
        kernel = apart.movedim(1 if where else 3, 1).unsqueeze(1)  # s 1 k r t
        edge = edges[f.edge]
        assert edge is not None
        first = f.mine.index(product.out[channel]) == 1
        found[f.edge] = Factored((Pair(cotangent, kernel, 2),), edge.shape, kernel_first=first)
    return found


def _block(step: Step, factor: Factor, data: Tensor) -> Block:
    edge = step.edges[factor.edge]
    assert edge is not None
    return Block(data, edge.shape)


@rule(
    *PRODUCTS, "TrilinearBackward0", samples=_samples, per_sample=_per_sample, fresh=True,
    factors=_apart,
)  # fmt: skip
def products(step: Step, blocks: Blocks) -> Any:
    """``y = sum a[left] b[right]``: ``g[v out] conj(b[right])`` and ``g[v out] conj(a[left])``."""
    product = _product(step)
    c, g = _added(step, product, only(blocks))
    if step.name in REAL and g.data.is_complex():
        return NotImplemented
    found: list[Block | None] = [None] * len(step.edges)
    found[0] = c  # when nothing is added this is the first factor, filled in below
    for f in _factors(step, product):
        found[f.edge] = _block(step, f, _toward(product, f, g))
    return found


def _toward(product: Product, f: Factor, g: Block) -> Tensor:
    """The sentence read backwards; a matrix that all rows go through has a kernel of its own."""
    matrix = _matrix(product, f)
    if matrix is not None and (isinstance(g, Scaled) or g.data.shape[-1] == matrix.shape[-1]):
        return _through(g, matrix)
    sentence = ",".join(("v" + product.out, *f.letters))
    return torch.einsum(f"{sentence}->v{f.mine}", g.data, *f.others)


def _through(g: Block, w: Tensor) -> Tensor:
    """``sum_o g[v,n,o] w[i,o]``.

    Where ``g[v,n,o] = r[v,o] d[n,o]``, the rows that all samples share are first joined with the
    matrix: ``sum_o d[n,o] (r[v,o] w[i,o])`` is one product for all rows, and ``[V, N, o]`` is never
    there. A 64-128-64 block takes three quarters of the time, a decoder of 784 outputs a sixth.
    """
    if isinstance(g, Scaled) and len(g.shape) == 2:
        joined = _joined(g, w)
        if joined is not None:
            found = kernels.linear(g.diagonal().expand(1, *g.shape)[0], joined.flatten(0, 1))
            apart: Tensor = found.unflatten(1, joined.shape[:2])
            return apart.transpose(0, 1)
    return kernels.linear(g.data, w)


# Source: 16 to 512 columns and 256 to 4,096 samples, on the machine of NUMBERS.md: from 256 columns
# on, the product of the rows costs so much more than making them that joining gains nothing.
WIDEST = 128


def _joined(g: Scaled, w: Tensor) -> Tensor | None:
    """``r[v,o] w[i,o]`` as ``[V, i, o]``, where that is to be made rather than the rows."""
    if w.shape[0] > min(WIDEST, g.shape[0] // 2):
        return None
    joined: Tensor = g.shared.data.expand(g.rows, 1, g.shape[1]) * w.contiguous()
    if g.selects and not joined.detach().sum().isfinite():
        return None  # 0 times inf
    return joined


def _matrix(product: Product, f: Factor) -> Tensor | None:
    """The other factor where it is one matrix, or one expanded to a batch as in ``nn.Linear``."""
    sentence = (product.out, f.mine, *f.letters)
    other = f.others[0]
    if sentence == ("no", "nk", "ko"):
        return other
    repeated = sentence == ("bno", "bnk", "bko") and other.stride(0) == 0 and len(other) > 0
    return other[0] if repeated else None


@forward(*PRODUCTS, "TrilinearBackward0")
def products_forward(step: Step, blocks: Blocks) -> Any:
    """``y = beta c + alpha sum a b``: ``beta t_c + alpha (sum t_a b + sum a t_b)``."""
    product = _product(step)
    total: Block | None = None
    for f in _factors(step, product):
        tangent = blocks[f.edge]
        if tangent is not None:
            part = Block(_from(product, f, tangent), step.shape)
            total = part if total is None else total.plus(part)
    if product.added:
        total = None if total is None else scaled(total, step.saved("alpha"))
        if blocks[0] is not None:
            c = scaled(blocks[0], step.saved("beta")).broadcast_to(step.shape)
            total = c if total is None else total.plus(c)
    return [total]


def _from(product: Product, f: Factor, t: Block) -> Tensor:
    """The sentence read forwards; a matrix that all rows go through has a kernel of its own.

    A letter that is summed over and is no other factor's must be there at full size.
    """
    matrix = _matrix(product, f)
    if matrix is not None and (isinstance(t, Scaled) or t.data.shape[-1] == matrix.shape[0]):
        return _through(t, matrix.t())
    known = product.out + "".join(f.letters)
    data = t.spread(*(d for d, letter in enumerate(f.mine) if letter not in known))
    sentence = ",".join(("v" + f.mine, *f.letters))
    return torch.einsum(f"{sentence}->v{product.out}", data, *f.others)
