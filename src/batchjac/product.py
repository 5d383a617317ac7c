"""A product with a matrix by a kernel without a derivative of its own, recorded by autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Multiply = Callable[[Tensor, Tensor], Tensor]


def recorded(multiply: Multiply, g: Tensor, w: Tensor) -> Tensor:
    """``multiply(g [m, o], w [i, o]) = g wᵀ``, differentiable any number of times."""
    if torch.is_grad_enabled() and (g.requires_grad or w.requires_grad):
        # torch gives Function.apply no types
        product: Tensor = _Recorded.apply(multiply, g, w)  # type: ignore[no-untyped-call]
        return product
    return multiply(g, w)


class _Recorded(torch.autograd.Function):
    """``y = g wᵀ``: toward ``g`` it is ``ȳ w``, toward ``w`` it is ``ȳᵀ g``, both such products."""

    @staticmethod
    def forward(ctx: Any, multiply: Multiply, g: Tensor, w: Tensor) -> Tensor:
        ctx.multiply = multiply
        ctx.save_for_backward(g, w)
        return multiply(g, w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = gradients
        g, w = ctx.saved_tensors
        _, left, right = ctx.needs_input_grad
        return (
            None,
            recorded(ctx.multiply, y, w.t()) if left else None,
            recorded(ctx.multiply, y.t(), g.t()) if right else None,
        )
