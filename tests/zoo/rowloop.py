"""The shortest correct per-sample Jacobian, for trees of tensors: a third opinion.

One ``autograd.grad`` per sample and output on one forward of the whole batch. It shares no line
with ``batchjac`` and knows nothing of options; cases use it where the truth is made by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def tree_map(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same nest with every leaf changed."""
    if isinstance(tree, Mapping):
        return type(tree)({key: tree_map(change, value) for key, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(change, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(change, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **{k: tree_map(change, v) for k, v in fields.items()})
    return change(tree)


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


def call(f: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return f(*inputs)
    return f(**inputs) if isinstance(inputs, dict) else f(inputs)


def differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def jacobian(f: Callable[..., Any], inputs: Any) -> Any:
    """Outputs nested over inputs, each block [N, *out, *in]; None where there is no derivative."""

    def stand_in(value: Any) -> Any:  # not a leaf of the graph, so that f may write into it
        return value.detach().clone().requires_grad_() if differentiable(value) else value

    def one(y: Any) -> Any:
        return tree_map(lambda x: block(y, x), starts) if differentiable(y) else None

    with torch.inference_mode(False), torch.enable_grad():
        starts = tree_map(stand_in, inputs)
        outputs = call(f, tree_map(lambda x: x.clone() if differentiable(x) else x, starts))
        return tree_map(one, outputs)


def block(y: Tensor, x: Any) -> Tensor | None:
    """J[n, o] = d y[n, o] / d x[n], one backward each."""
    if not differentiable(x):
        return None
    n, width = len(y), y[0].numel()
    result = torch.zeros(n, width, *x.shape[1:], dtype=x.dtype)
    if y.requires_grad:
        flat = y.reshape(n, width)
        for sample in range(n):
            for o in range(width):
                (grad,) = torch.autograd.grad(
                    flat[sample, o], x, retain_graph=True, allow_unused=True
                )
                if grad is not None:
                    result[sample, o] = grad[sample]
    return result.view(n, *y.shape[1:], *x.shape[1:])
