"""A block times a tensor of its own shape that has no rows: what a diagonal does."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from batchjac.block import Block, Scaled, Waiting
from batchjac.ordinary import ordinary


def wide(tensor: Tensor, dims: int) -> Tensor:
    """A tensor that is broadcast to ``dims`` axes, with a row axis of size 1 before them.

    One without axes stays so: torch promotes dtypes differently for those.
    """
    have = tensor.dim()
    if have == 0:
        return tensor
    if have == dims:
        return tensor.unsqueeze(0)
    return tensor.reshape((1,) * (1 + dims - have) + tuple(tensor.shape))


def times(block: Block, factor: Tensor) -> Block:
    """``g[v, ...] * factor[...]``, the factor broadcast to the block's shape."""
    return block.with_data(block.data * wide(factor, len(block.shape)))


def times_last(block: Block, factor: Tensor) -> Block:
    """The same, in place where the rows may be overwritten: for the last use of a block."""
    if block.writable and factor.dtype == block.data.dtype:
        block.data.mul_(alike(wide(factor, len(block.shape)), block.data))
        return block
    slope = wide(factor, len(block.shape))
    if isinstance(block, Scaled) and _shared(slope):
        return Scaled(times(block.shared, factor), block.scale, block.selects)
    return passed(block, slope, lambda data: data * slope)


# Rows of fewer entries are multiplied out at once: holding them back costs more.
WAITING = 1 << 16


def passed(
    block: Block, diagonal: Tensor, scale: Callable[[Tensor], Tensor], selects: bool = False
) -> Block:
    """Rows through a diagonal, at once; where all samples share them, when they are read.

    They wait as matrices only: of images, joined with the next convolution, they came out 3 %
    faster to 40 % slower, since weights for all rows are large and a chunk often holds one row.
    """
    if isinstance(block, Scaled) and diagonal.dtype == block.shared.data.dtype:
        before = block.scale
        return Scaled(block.shared, lambda data: scale(before(data)), block.selects or selects)
    if (
        len(block.shape) == 2
        and block.data.shape[1] == 1 < block.shape[0]
        and block.rows > 1
        and block.rows * math.prod(block.shape) >= WAITING
        and not _shared(diagonal)
        and diagonal.dtype == block.data.dtype
        and ordinary(block.data)
    ):
        return Scaled(block, scale, selects)
    return block.with_data(scale(block.data))


def _shared(diagonal: Tensor) -> bool:
    """Whether a diagonal ``[1, *shape]`` is the same for all samples."""
    return diagonal.dim() < 2 or diagonal.shape[1] == 1


def alike(tensor: Tensor, data: Tensor) -> Tensor:
    """What is to meet the rows ``data [V, *s]``, its axes in memory in the order of theirs.

    One copy serves all rows; where the orders differ, a product takes several times as long.
    """
    if data.is_contiguous() or tensor.dim() != data.dim() or 1 in tensor.shape[1:]:
        return tensor
    order = sorted(range(1, data.dim()), key=data.stride, reverse=True)
    order.insert(0, 0)
    back = sorted(range(data.dim()), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def beside(block: Block, tensor: Tensor) -> Tensor:
    """A tensor of the block's shape, with an axis of rows, in their order in memory."""
    tensor = wide(tensor, len(block.shape))
    return tensor if isinstance(block, Waiting) else alike(tensor, block.data)


def scaled(block: Block, factor: complex) -> Block:
    """``g conj(factor)``; untouched where the factor is 1."""
    return block if factor == 1 else block.with_data(block.data * factor.conjugate())


def keep(block: Block, mask: Tensor) -> Block:
    """The block where ``mask`` holds and 0 elsewhere, also where the block is inf or nan.

    ``threshold_backward`` does that at the speed of a product; ``where`` takes three times as long.
    """
    mask = wide(mask, len(block.shape))
    data = block.data
    if not data.is_floating_point():
        return block.with_data(torch.where(mask, data, data.new_zeros(())))
    return block.with_data(torch.ops.aten.threshold_backward(data, mask.to(data.dtype), 0))


def zero(block: Block) -> Block:
    """No change anywhere: rows of zeros, repeated along all axes."""
    return block.with_data(block.data.new_zeros((block.rows,) + (1,) * len(block.shape)))


def opened(data: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows of such a tensor, the last axis full: repeated, a gate takes four times as long."""
    repeated = bool(shape) and data.shape[-1] == 1
    return data.expand(*data.shape[:-1], shape[-1]).contiguous() if repeated else data
