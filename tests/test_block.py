"""A block: rows of a tensor, with axes of size 1 where they are the same all along."""

from __future__ import annotations

import pytest
import torch

from batchjac.block import Block


@pytest.mark.parametrize(
    ("shape", "repeated", "target"),
    [
        ((3,), (), (4, 3)),
        ((3,), (0,), (4, 3)),
        ((4, 1), (), (4, 3)),
        ((1, 3), (1,), (2, 4, 3)),
        ((), (), (4, 3)),
        ((4, 3), (0,), (4, 3)),
        ((2, 0), (), (5, 2, 0)),
    ],
)
def test_rows_broadcast_as_their_tensor_is(
    shape: tuple[int, ...], repeated: tuple[int, ...], target: tuple[int, ...]
):
    sizes = [1 if d in repeated else s for d, s in enumerate(shape)]
    block = Block(torch.randn(2, *sizes), shape)
    found = block.broadcast_to(target)
    assert found.shape == target
    assert found.data.numel() == block.data.numel()  # nothing is copied
    expected = torch.stack([row.broadcast_to(target) for row in block.full()])
    assert torch.equal(found.full(), expected)


def test_broadcasting_is_the_transpose_of_summing():
    shape, target = (4, 1), (2, 4, 3)
    block = Block(torch.randn(2, *shape, dtype=torch.float64), shape)
    cotangent = Block(torch.randn(2, *target, dtype=torch.float64), target)
    left = (block.broadcast_to(target).full() * cotangent.full()).sum()
    right = (block.full() * cotangent.sum_to(shape).full()).sum()
    torch.testing.assert_close(left, right)
