"""``torch.autograd.Function``: whatever its author's backward says is the derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .registry import NOT_ITS_SLOPE, case

GROUP = "custom Functions"


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@case("function_plain", group=GROUP)
def function_plain() -> Any:
    net = nn.Linear(3, 3)
    return lambda x: Cube.apply(net(Cube.apply(x))), torch.randn(4, 3)


class CubeVmapped(torch.autograd.Function):
    """The newer form: ``setup_context`` and a vmap rule made by PyTorch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@case("function_with_setup_context", group=GROUP)
def function_with_setup_context() -> Any:
    net = nn.Linear(3, 2)
    return lambda x: net(CubeVmapped.apply(x)), torch.randn(4, 3)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


@case("function_once_differentiable", group=GROUP)
def function_once_differentiable() -> Any:
    net = nn.Linear(3, 3)
    return lambda x: OnceDifferentiable.apply(net(x)), torch.randn(4, 3)


class SinCos(torch.autograd.Function):
    """Two outputs; a row that reaches only one of them arrives with zeros for the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, grad_sin: Tensor, grad_cos: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_sin * x.cos() - grad_cos * x.sin()


@case("function_two_outputs", group=GROUP)
def function_two_outputs() -> Any:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        sine, cosine = SinCos.apply(x)
        return sine * 2, SinCos.apply(cosine + sine)[0]

    return f, torch.randn(3, 3)


class SinCosSparse(torch.autograd.Function):
    """The same without materialised zeros: what was not asked for comes as None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, grad_sin: Tensor | None, grad_cos: Tensor | None) -> Tensor | None:
        (x,) = ctx.saved_tensors
        total = None if grad_sin is None else grad_sin * x.cos()
        if grad_cos is not None:
            total = -grad_cos * x.sin() + (0 if total is None else total)
        return total


@case("function_materialise_off", group=GROUP)
def function_materialise_off() -> Any:
    def f(x: Tensor) -> dict[str, Tensor]:
        sine, cosine = SinCosSparse.apply(x)
        again = SinCosSparse.apply(cosine)[1]
        return {"one": sine, "other": again, "both": sine * cosine}

    return f, torch.randn(3, 3)


class ScaledLinear(torch.autograd.Function):
    """Tensors and other arguments mixed; None for what has no derivative or needs none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float, note: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        assert note == "note"
        return scale * x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        to_x = ctx.scale * grad @ weight.T if ctx.needs_input_grad[0] else None
        to_weight = ctx.scale * x.T @ grad if ctx.needs_input_grad[1] else None
        return to_x, to_weight, None, None


@case("function_other_arguments", group=GROUP)
def function_other_arguments() -> Any:
    weight = nn.Parameter(torch.randn(3, 2))
    return lambda x: ScaledLinear.apply(x.tanh(), weight, 0.5, "note"), torch.randn(4, 3)


class DropsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


@case("function_returns_none", group=GROUP, without=NOT_ITS_SLOPE)
def function_returns_none() -> Any:
    return lambda x: DropsGradient.apply(x.sin(), x.cos()), torch.randn(4, 3)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1, 1)  # not even linear in the cotangent; each row is clamped alone


@case("function_straight_through_clamped", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def function_straight_through_clamped() -> Any:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    return lambda x: second(StraightThrough.apply(first(x))) * 3, torch.randn(4, 3)


class Reversal(torch.autograd.Function):
    """Gradient reversal of domain-adversarial training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad, None


@case("function_gradient_reversal", group=GROUP, without=NOT_ITS_SLOPE)
def function_gradient_reversal() -> Any:
    trunk, label, domain = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        features = trunk(x).tanh()
        return label(features), domain(Reversal.apply(features, 0.3))

    return f, torch.randn(4, 3)


class ReadsNumbers(torch.autograd.Function):
    """The backward leaves the world of tensors, which vmap cannot follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sinh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if grad.abs().max().item() == 0.0:
            return torch.zeros_like(x)
        return torch.from_numpy(grad.numpy() * x.cosh().numpy())


@case("function_numpy_in_backward", group=GROUP)
def function_numpy_in_backward() -> Any:
    net = nn.Linear(3, 2)
    return lambda x: net(ReadsNumbers.apply(x)), torch.randn(4, 3)
