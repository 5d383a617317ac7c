"""The inverse of many small matrices from their factors, by blocks, in batched products.

LAPACK inverts them one after another, at a small part of the speed of a batched product: of 256
matrices of 64 x 64 in float32 on one thread, the factors take 4 ms, solving with the identity
another 11 to 16, and what is here 7. The inverses of the triangular factors come block by
block, and are multiplied.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, section 14.2: block
methods for triangular inverses; section 14.3.3: the inverse as the product of those of the
factors, whose error bound is that of the other methods.
"""

import torch
from torch import Tensor

_LEAF = 16  # rows of the blocks on the diagonal, which are inverted element by element
_MATRICES = 32  # from so many on. Source: 16 matrices of 64 rows were level, 64 of 128 faster


def pays(j: Tensor) -> bool:
    """Whether the blocks fit, and are faster than LAPACK, for these matrices."""
    n, rows, _ = j.shape
    blocks, rest = divmod(rows, _LEAF)
    halves = rest == 0 and blocks > 1 and blocks & (blocks - 1) == 0
    return j.device.type == "cpu" and n >= _MATRICES and halves


def inverse_from(m: Tensor, pivots: Tensor) -> Tensor:
    """``J^-1`` from ``J^T = P L U``, given as ``m = (L U)^T`` in one array ``[N, n, n]``.

    The lower triangle of m is U^T, what is above the diagonal is L^T, whose diagonal is 1. So
    ``J^-1 = P (L^T)^-1 (U^T)^-1``. Both are inverted together, as lower triangles: U^T and L.
    """
    x = _leaves(m)
    while 2 * x.shape[3] < m.shape[1]:
        x = _joined(x, m)
    return _permuted(_product(*_halves(x, m)), pivots)


def _leaves(m: Tensor) -> Tensor:
    """The inverses of the blocks on the diagonal, ``[2, blocks, N, 16, 16]``."""
    n, rows, _ = m.shape
    count = rows // _LEAF
    diagonal = m.view(n, count, _LEAF, count, _LEAF).diagonal(dim1=1, dim2=3)  # [N, row, col, k]
    both = m.new_empty(2, count, n, _LEAF, _LEAF)
    both[0], both[1] = diagonal.permute(3, 0, 1, 2), diagonal.permute(3, 0, 2, 1)
    last = both.view(-1, _LEAF * _LEAF).t().contiguous().view(_LEAF, _LEAF, -1)
    last.diagonal(dim1=0, dim2=1)[last.shape[2] // 2 :] = 1
    found = _substituted(last).view(_LEAF * _LEAF, -1)
    return found.t().contiguous().view(2, count, n, _LEAF, _LEAF)


def _substituted(t: Tensor) -> Tensor:
    """Inverses of lower triangular ``[row, column, matrix]``, column by column of t."""
    x = torch.zeros_like(t)
    x.diagonal(dim1=0, dim2=1).fill_(1)
    for k in range(len(t)):
        done = x[k, : k + 1].div_(t[k, k])
        x[k + 1 :, : k + 1].addcmul_(t[k + 1 :, k].unsqueeze(1), done.unsqueeze(0), value=-1)
    return x


def _halves(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours x taken together: ``[A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]``.

    Its three parts, ``[matrices, b, b]`` each, in the order of x.
    """
    _, count, n, b, _ = x.shape
    below = x.new_empty(2, count // 2, n, b, b)
    for k in range(count // 2):
        one, two = slice(2 * k * b, 2 * k * b + b), slice(2 * k * b + b, 2 * k * b + 2 * b)
        below[0, k], below[1, k] = m[:, two, one], m[:, one, two].mT
    first, last = x[:, 0::2].reshape(-1, b, b), x[:, 1::2].reshape(-1, b, b)
    corner = torch.bmm(last, torch.bmm(below.view(-1, b, b), first)).neg_()
    return first, corner, last


def _joined(x: Tensor, m: Tensor) -> Tensor:
    """Inverses of blocks of twice the size."""
    _, count, n, b, _ = x.shape
    first, corner, last = _halves(x, m)
    out = x.new_zeros(len(first), 2 * b, 2 * b)
    out[:, :b, :b], out[:, b:, :b], out[:, b:, b:] = first, corner, last
    return out.view(2, count // 2, n, 2 * b, 2 * b)


def _product(first: Tensor, corner: Tensor, last: Tensor) -> Tensor:
    """``(L^-1)^T (U^T)^-1`` from the parts of U^T and of L, without their zeros."""
    (a, at), (b, bt), (c, ct) = (p.unflatten(0, (2, -1)) for p in (first, corner, last))
    n, half, _ = a.shape
    out: Tensor = a.new_empty(n, 2 * half, 2 * half)
    out[:, :half, :half] = torch.baddbmm(torch.bmm(at.mT, a), bt.mT, b)
    out[:, :half, half:] = torch.bmm(bt.mT, c)
    out[:, half:, :half] = torch.bmm(ct.mT, b)
    out[:, half:, half:] = torch.bmm(ct.mT, c)
    return out


def _permuted(y: Tensor, pivots: Tensor) -> Tensor:
    """``P y``, where P stands for these swaps."""
    n, rows, _ = y.shape
    p = torch.lu_unpack(y, pivots, unpack_data=False)[0]
    order = (p @ torch.arange(rows, dtype=y.dtype, device=y.device)).long()  # row r is row order[r]
    flat = (order + rows * torch.arange(n, device=y.device).unsqueeze(1)).flatten()
    found: Tensor = y.view(n * rows, rows).index_select(0, flat).view_as(y)
    return found
