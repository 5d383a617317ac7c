"""The inverse of many small matrices from their factors, by blocks, in batched products.

LAPACK inverts them one after another, at a small part of the speed of a batched product: of 256
matrices of 64 x 64 in float32 on one thread, the factors take 4 ms, solving with the identity
another 11 to 16, and what is here 7 to 9. The inverses of the triangular factors come block by
block, and are multiplied.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, section 14.2: block
methods for triangular inverses; section 14.3.3: the inverse as the product of those of the
factors, whose error bound is that of the other methods.
"""

import torch
from torch import Tensor

_LEAF = 8  # rows of the blocks on the diagonal, which are inverted element by element
# Where it is faster than torch.linalg.inv. Source: timed at one thread, 16 to 256 rows and 16 to
# 4096 matrices: 1.6 times at 64 rows, 1.4 at 128; level at 32 rows, and at 16 matrices of 64.
_ROWS, _MATRICES = 48, 32


def pays(j: Tensor) -> bool:
    """Whether the blocks are faster than LAPACK for these matrices."""
    n, rows, _ = j.shape
    return j.device.type == "cpu" and n >= _MATRICES and rows >= _ROWS and rows % _LEAF == 0


def inverse_from(m: Tensor, pivots: Tensor) -> Tensor:
    """``J^-1`` from ``J^T = P L U``, given as ``m = (L U)^T`` in one array ``[N, n, n]``.

    The lower triangle of m is U^T, what is above the diagonal is L^T, whose diagonal is 1. So
    ``J^-1 = P (L^T)^-1 (U^T)^-1``.
    """
    lower, upper = _blocks(m)
    _join(m, lower, upper, 0, m.shape[1])
    return _permuted(torch.bmm(upper, lower), pivots)


def _blocks(m: Tensor) -> tuple[Tensor, Tensor]:
    """Both inverses, in the blocks on the diagonal alone; zeros elsewhere."""
    n, rows, _ = m.shape
    shape = (n, rows // _LEAF, _LEAF, rows // _LEAF, _LEAF)
    diagonal = m.view(shape).diagonal(dim1=1, dim2=3)  # [n, row, column, block]
    # the upper ones as their transposes, so that all are lower; samples and blocks last
    both = torch.stack([diagonal.permute(1, 2, 0, 3), diagonal.permute(2, 1, 0, 3)], 2)
    for i in range(_LEAF):
        both[i, i, 1] = 1
    found = _substituted(both.flatten(2)).view(both.shape)
    lower, upper = torch.zeros_like(m), torch.zeros_like(m)
    lower.view(shape).diagonal(dim1=1, dim2=3).copy_(found[:, :, 0].permute(2, 0, 1, 3))
    upper.view(shape).diagonal(dim1=1, dim2=3).copy_(found[:, :, 1].permute(2, 1, 0, 3))
    return lower, upper


def _substituted(t: Tensor) -> Tensor:
    """Inverses of lower triangular ``[row, column, matrix]``, row by row."""
    x = torch.zeros_like(t)
    for i in range(len(t)):
        x[i, i] = 1
        for j in range(i):
            x[i, : j + 1].addcmul_(t[i, j], x[j, : j + 1], value=-1)
        x[i, : i + 1].div_(t[i, i])
    return x


def _join(m: Tensor, lower: Tensor, upper: Tensor, start: int, stop: int) -> None:
    """The rest of both inverses between these rows.

    ``[A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]``, and the same mirrored.
    """
    if stop - start == _LEAF:
        return
    middle = start + (stop - start + _LEAF) // (2 * _LEAF) * _LEAF
    one, two = slice(start, middle), slice(middle, stop)
    _join(m, lower, upper, start, middle)
    _join(m, lower, upper, middle, stop)
    below = torch.bmm(m[:, two, one], lower[:, one, one])
    lower[:, two, one] = torch.bmm(lower[:, two, two], below).neg_()
    above = torch.bmm(m[:, one, two], upper[:, two, two])
    upper[:, one, two] = torch.bmm(upper[:, one, one], above).neg_()


def _permuted(y: Tensor, pivots: Tensor) -> Tensor:
    """``P y``, where P stands for these swaps, the first of them outermost."""
    n, rows, _ = y.shape
    swaps = (pivots.mT - 1).long()
    order = torch.arange(rows, device=y.device).unsqueeze(1).repeat(1, n)
    for k in range(rows):
        here, there = order[k : k + 1].clone(), order.gather(0, swaps[k : k + 1])
        order.scatter_(0, swaps[k : k + 1], here)
        order[k : k + 1] = there
    # row k of y goes to row order[k]; the other way round they can be taken whole
    back = torch.empty_like(order).scatter_(
        0, order, torch.arange(rows, device=y.device).unsqueeze(1).expand(rows, n)
    )
    flat = (back + rows * torch.arange(n, device=y.device)).mT.reshape(-1)
    return y.reshape(n * rows, rows).index_select(0, flat).view_as(y)
