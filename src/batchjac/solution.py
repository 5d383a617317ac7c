"""What one call found: the nested Jacobian, and the function's value in the chunks it came in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac.errors import BatchAxisError
from batchjac.tree import Tree, flatten


@dataclass(frozen=True)
class Solution:
    """The nested Jacobian, and the value of the function in the chunks it was computed in."""

    chunks: Sequence[tuple[int, Tree]]
    jacobian: Any

    def value(self) -> Any:
        """The function's own value, its chunks joined along the samples."""
        if len(self.chunks) == 1:
            tree = self.chunks[0][1]
            return tree.build(tree.leaves)
        trees = [tree for _, tree in self.chunks]
        if any(tree.paths != trees[0].paths for tree in trees):
            raise BatchAxisError(
                "the value of f is nested differently from one chunk of samples to the next; ask "
                "for jacobian alone, or raise max_memory so that one chunk holds all samples"
            )
        columns = zip(*(tree.leaves for tree in trees), strict=True)
        sizes = [count for count, _ in self.chunks]
        joined = [_joined(c, sizes, p) for c, p in zip(columns, trees[0].paths, strict=True)]
        return trees[0].build(joined)


def kept(values: Tree, asked: bool, history: bool) -> Tree:
    """What stays of the value of one chunk: nothing but its nesting unless it was asked for."""
    if history:
        return values
    return flatten(values.map(detached if asked else lambda leaf: None))


def detached(leaf: Any) -> Any:
    """The value without its history; a small part of a large tensor would keep all of it."""
    if not isinstance(leaf, Tensor):
        return leaf
    part = leaf.layout == torch.strided and leaf.untyped_storage().nbytes() > 2 * leaf.nbytes
    return leaf.detach().clone() if part else leaf.detach()


def _joined(column: Sequence[Any], sizes: Sequence[int], path: str) -> Any:
    """One leaf of all chunks: joined where it has the samples, else the same in every chunk."""
    if not isinstance(column[0], Tensor):
        return column[-1]
    if all(t.dim() > 0 and t.shape[0] == n for t, n in zip(column, sizes, strict=True)):
        return torch.cat(list(column))
    if all(torch.equal(t, column[0]) for t in column):
        return column[0]
    raise BatchAxisError(
        f"output{path} has no batch axis and differs from one chunk of samples to the next; ask "
        "for jacobian alone, or raise max_memory so that one chunk holds all samples"
    )
