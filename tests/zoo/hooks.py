"""Hooks that change what flows backward; PyTorch runs them, so their effect is the derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .registry import NOT_ITS_SLOPE, case

GROUP = "hooks"


@case("tensor_hook_scales", group=GROUP, without=NOT_ITS_SLOPE)
def tensor_hook_scales() -> Any:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)

    def f(x: Tensor) -> Tensor:
        hidden = first(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * 0.5)
        return second(hidden)

    return f, torch.randn(4, 3)


@case("tensor_hook_clamps", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def tensor_hook_clamps() -> Any:
    """Gradient clipping by value: each row is clipped by itself."""
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)

    def f(x: Tensor) -> Tensor:
        hidden = first(x).sigmoid()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad.clamp(-0.2, 0.2))
        return second(hidden)

    return f, torch.randn(4, 3)


@case("tensor_hook_clamps_one_entry", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def tensor_hook_clamps_one_entry() -> Any:
    """The limit bites in a single row of a single place: a spot check would not see it."""
    weight = torch.rand(3, 4) * 0.1
    weight[2, 3] = 0.5

    def f(x: Tensor) -> Tensor:
        hidden = x.sin()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad.clamp(-0.45, 0.45))
        return hidden @ weight.T

    return f, torch.randn(4, 4)


@case("tensor_hook_drops_small_gradients", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def tensor_hook_drops_small_gradients() -> Any:
    """Acts on weak rows only, and looks at the gradient of the whole batch."""
    weight = torch.diag(torch.tensor([1.0, 0.01, 2.0]))

    def f(x: Tensor) -> Tensor:
        hidden = x.cos()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * float(grad.abs().max() > 0.1))
        return hidden @ weight

    return f, torch.randn(4, 3)


@case("tensor_hook_clips_by_norm", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def tensor_hook_clips_by_norm() -> Any:
    """Each row of each sample is a backward of its own, so its norm is that sample's."""
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)

    def f(x: Tensor) -> Tensor:
        hidden = first(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad / grad.norm().clamp(min=0.3))
        return second(hidden)

    return f, torch.randn(4, 3)


@case("tensor_hook_replaces_nan", group=GROUP, without=NOT_ITS_SLOPE)
def tensor_hook_replaces_nan() -> Any:
    def f(x: Tensor) -> Tensor:
        y = x.relu() * 1
        if y.requires_grad:
            y.register_hook(lambda grad: grad.nan_to_num(0.0, 0.0, 0.0))
        return y.pow(0.5)

    return f, torch.tensor([[-1.0, 4.0], [0.25, 0.0], [9.0, 1.0]])


@case("tensor_hook_that_only_looks", group=GROUP)
def tensor_hook_that_only_looks() -> Any:
    net, seen = nn.Linear(3, 2), []

    def f(x: Tensor) -> Tensor:
        y = net(x)
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append(float(grad.detach().norm())))
            y.retain_grad()
        return y.sin()

    return f, torch.randn(4, 3)


@case("tensor_hook_on_the_output", group=GROUP, without=NOT_ITS_SLOPE)
def tensor_hook_on_the_output() -> Any:
    net = nn.Linear(3, 2)

    def f(x: Tensor) -> Tensor:
        y = net(x)
        if y.requires_grad:
            y.register_hook(torch.neg)
        return y

    return f, torch.randn(4, 3)


@case("tensor_hook_on_the_input", group=GROUP, without=NOT_ITS_SLOPE)
def tensor_hook_on_the_input() -> Any:
    net = nn.Linear(3, 2)

    def f(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: 2 * grad)
        return net(x).exp()

    return f, torch.randn(4, 3)


@case("hook_on_a_node", group=GROUP, without=NOT_ITS_SLOPE)
def hook_on_a_node() -> Any:
    """Hooks before and after a node of the graph itself."""
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)

    def f(x: Tensor) -> Tensor:
        hidden = first(x).tanh()
        if hidden.grad_fn is not None:
            hidden.grad_fn.register_hook(lambda ins, outs: tuple(g * 3 for g in ins))
            hidden.grad_fn.register_prehook(lambda outs: tuple(g + 0 * g for g in outs))
        return second(hidden)

    return f, torch.randn(4, 3)


class GuidedReLU(nn.Module):
    """Guided backpropagation: a full backward hook keeps only what is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.net[1].register_full_backward_hook(lambda m, gi, go: (gi[0].clamp(min=0),))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@case("module_backward_hook_guided", group=GROUP, without=NOT_ITS_SLOPE | {"compose"})
def module_backward_hook_guided() -> Any:
    return GuidedReLU(), torch.randn(4, 4)


@case("module_backward_pre_hook", group=GROUP, without=NOT_ITS_SLOPE)
def module_backward_pre_hook() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    model[1].register_full_backward_pre_hook(lambda m, go: (go[0] * 0.25,))
    return model, torch.randn(4, 3)


@case("module_backward_hooks_that_look", group=GROUP)
def module_backward_hooks_that_look() -> Any:
    """As Grad-CAM tools leave them behind: read, never return."""
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    store: list[Tensor] = []
    model[0].register_forward_hook(lambda m, i, o: store.append(o.detach()))
    model[0].register_full_backward_hook(lambda m, gi, go: store.append(go[0]))
    model[3].register_full_backward_hook(lambda m, gi, go: None)
    return model, torch.randn(4, 1, 5)


@case("forward_hooks_change_values", group=GROUP)
def forward_hooks_change_values() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model[1].register_forward_hook(lambda m, args, out: out**2 + args[0])
    return model, torch.randn(4, 3)


@case("parameter_hook", group=GROUP)
def parameter_hook() -> Any:
    """A hook on a weight has no say in the derivative toward the input."""
    model = nn.Linear(3, 2)
    model.weight.register_hook(lambda grad: grad * 100)
    return model, torch.randn(4, 3)


@case("lrp_epsilon_by_module_hooks", group=GROUP, without=NOT_ITS_SLOPE)
def lrp_epsilon_by_module_hooks() -> Any:
    """A modified backward in the way zennit writes rules: input and output hooks on one layer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def stabilise(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            factor = (out / (out + 0.1 * out.sgn())).detach()
            out.register_hook(lambda grad: grad * factor)

    for layer in (model[0], model[2]):
        layer.register_forward_hook(stabilise)
    return model, torch.randn(4, 3)
