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
        changed = {key: tree_map(change, value) for key, value in tree.items()}
        return type(tree)(**changed) if type(tree) is not dict else changed
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


def jacobian(f: Callable[..., Any], inputs: Any, create_graph: bool = False) -> Any:
    """Outputs nested over inputs, each block [N, *out, *in]; None where there is no derivative.

    With ``create_graph`` the result has a history back to inputs that require a gradient.
    """

    def stand_in(value: Any) -> Any:
        if not differentiable(value) or (create_graph and value.requires_grad):
            return value
        return value.detach().clone().requires_grad_()

    def one(y: Any) -> Any:
        return tree_map(lambda x: block(y, x, create_graph), starts) if differentiable(y) else None

    with torch.inference_mode(False), torch.enable_grad():
        starts = tree_map(stand_in, inputs)
        # copies are not leaves of the graph, so that f may write into them
        outputs = call(f, tree_map(lambda x: x.clone() if differentiable(x) else x, starts))
        with torch.enable_grad():  # f may have switched it off
            return tree_map(one, outputs)


def block(y: Tensor, x: Any, create_graph: bool) -> Tensor | None:
    """J[n, o] = d y[n, o] / d x[n], one backward each."""
    if not differentiable(x):
        return None
    shape = (len(y), *y.shape[1:], *x.shape[1:])
    if not y.requires_grad or 0 in shape:
        return torch.zeros(shape, dtype=x.dtype)
    rows = []
    for sample, outputs in enumerate(y.reshape(len(y), -1)):
        for value in outputs:
            (grad,) = torch.autograd.grad(
                value, x, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
            rows.append(torch.zeros_like(x[sample]) if grad is None else grad[sample])
    return torch.stack(rows).view(shape)
