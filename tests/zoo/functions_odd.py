"""``torch.autograd.Function`` with habits: what authors do although, or because, nobody looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .registry import BY_PLACE, NOT_ITS_SLOPE, case

GROUP = "custom Functions"


class DirtyDouble(torch.autograd.Function):
    """Writes its input in place and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@case("function_marks_dirty", group=GROUP)
def function_marks_dirty() -> Any:
    net = nn.Linear(3, 3)
    return lambda x: DirtyDouble.apply(net(x)).sin(), torch.randn(4, 3)


class TopOne(torch.autograd.Function):
    """An integer output that is marked non-differentiable beside a float one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = x.max(dim=1)
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)
        ctx.width = x.shape[1]
        return values, places

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        return grad.unsqueeze(1) * nn.functional.one_hot(places, ctx.width)


@case("function_non_differentiable_output", group=GROUP)
def function_non_differentiable_output() -> Any:
    def f(x: Tensor) -> Tensor:
        values, places = TopOne.apply(x)
        return torch.stack([values * places, values.sin()], dim=1)

    return f, torch.randn(4, 3)


class SavesItsIntermediate(torch.autograd.Function):
    """Runs autograd itself, inside both of its halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            y = torch.tanh(inner) * inner
        ctx.inner, ctx.y = inner, y
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.autograd.grad(ctx.y, ctx.inner, grad, retain_graph=True)[0]


@case("function_with_autograd_inside", group=GROUP)
def function_with_autograd_inside() -> Any:
    net = nn.Linear(3, 2)
    return lambda x: net(SavesItsIntermediate.apply(x)), torch.randn(4, 3)


class SymmetricSquareRoot(torch.autograd.Function):
    """A matrix function whose backward solves a Sylvester equation by an eigenbasis."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        ctx.save_for_backward(values.sqrt(), vectors)
        return vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        inner = vectors.mT @ grad @ vectors / (roots.unsqueeze(-1) + roots.unsqueeze(-2))
        return vectors @ inner @ vectors.mT


@case("function_matrix_square_root", group=GROUP)
def function_matrix_square_root() -> Any:
    def f(x: Tensor) -> Tensor:
        return SymmetricSquareRoot.apply(x @ x.mT + torch.eye(3, dtype=x.dtype))

    return f, torch.randn(3, 3, 2)


class WritesIntoItsCotangent(torch.autograd.Function):
    """Forbidden by the manual and common in the wild: the incoming gradient is scaled in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.mul_(3)


@case("function_writes_into_its_cotangent", group=GROUP)
def function_writes_into_its_cotangent() -> Any:
    net = nn.Linear(3, 2)
    return lambda x: net(WritesIntoItsCotangent.apply(x.sin()) * 1) ** 2, torch.randn(4, 3)


class UnitGradient(torch.autograd.Function):
    """Every sample's gradient is brought to length one: not linear, but sample by sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm(dim=1, keepdim=True).clamp(min=1e-12)


@case("function_unit_gradient", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def function_unit_gradient() -> Any:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    return lambda x: second(UnitGradient.apply(first(x))), torch.randn(4, 3)


class BranchesOnItsCotangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        if not grad.any():
            return None
        return grad * ctx.saved_tensors[0].exp()


@case("function_branches_on_its_cotangent", group=GROUP, without=BY_PLACE)
def function_branches_on_its_cotangent() -> Any:
    return lambda x: BranchesOnItsCotangent.apply(x).tril(), torch.randn(3, 3)


class ReturnsMore(torch.autograd.Function):
    """Outputs that are no tensors stand between those that are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flag: bool) -> tuple[int, Tensor, None, Tensor]:
        return 3, x * 2, None, x + 1

    @staticmethod
    def backward(ctx: Any, _: None, double: Tensor, __: None, more: Tensor) -> tuple[Any, ...]:
        return 2 * double + more, None


@case("function_returns_other_things", group=GROUP)
def function_returns_other_things() -> Any:
    def f(x: Tensor) -> Tensor:
        three, double, nothing, more = ReturnsMore.apply(x.sin(), True)
        assert nothing is None
        return three * double * more

    return f, torch.randn(4, 3)


class PassesThrough(torch.autograd.Function):
    """Returns one of its inputs unchanged and ignores that another needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y * weight.sum()

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, None, Tensor]:
        return a, None, b * 2


@case("function_passes_an_input_through", group=GROUP, without=NOT_ITS_SLOPE)
def function_passes_an_input_through() -> Any:
    weight = nn.Parameter(torch.randn(3))

    def f(x: Tensor) -> Tensor:
        a, b = PassesThrough.apply(x.sin(), weight, x.cos())
        return a * b.detach() + b

    return f, torch.randn(4, 3)


class CounterInBackward(torch.autograd.Function):
    """Alters attributes of its context at every backward, as loggers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.calls = 0
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.calls += 1
        return grad * 2


@case("function_stateful_context", group=GROUP)
def function_stateful_context() -> Any:
    return lambda x: CounterInBackward.apply(x).cos(), torch.randn(3, 3)
