"""Derivatives inside the function: torch.func, and autograd called by the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from .registry import case

GROUP = "transforms inside"


@case("vmap_inside", group=GROUP)
def vmap_inside() -> Any:
    net = nn.Linear(3, 2)
    return lambda x: vmap(lambda row: net(row).tanh() * row.norm())(x), torch.randn(4, 3)


@case("functional_call_inside", group=GROUP)
def functional_call_inside() -> Any:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    doubled = {name: p.detach() * 2 for name, p in net.named_parameters()}
    return lambda x: functional_call(net, doubled, (x,)) + net(x), torch.randn(4, 3)


@case("weights_per_sample_by_vmap", group=GROUP)
def weights_per_sample_by_vmap() -> Any:
    """An ensemble: one network, stacked weights, every member on every sample."""
    nets = [nn.Linear(3, 2) for _ in range(3)]
    stacked = {k: torch.stack([dict(n.named_parameters())[k].detach() for n in nets]) for k in
               ("weight", "bias")}  # fmt: skip
    base = nn.Linear(3, 2)

    def f(x: Tensor) -> Tensor:
        members = vmap(lambda weights: functional_call(base, weights, (x,)).sin())(stacked)
        return members.transpose(0, 1)

    return f, torch.randn(3, 3)


@case("func_grad_inside", group=GROUP)
def func_grad_inside() -> Any:
    """A conservative field: the gradient of a learnt potential, taken sample by sample."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    return vmap(grad(lambda row: net(row).squeeze())), torch.randn(4, 3)


@case("func_jvp_and_vjp_inside", group=GROUP)
def func_jvp_and_vjp_inside() -> Any:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3))

    def f(x: Tensor) -> Tensor:
        _, forward = jvp(net, (x,), (x.sin(),))
        value, pull = vjp(net, x)
        return forward + pull(value)[0]

    return f, torch.randn(4, 3)


@case("jacobians_inside", group=GROUP)
def jacobians_inside() -> Any:
    """A contractive penalty: Jacobian and Hessian of a small net as features of a larger one."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))

    def one(row: Tensor) -> Tensor:
        back, ahead = jacrev(net)(row), jacfwd(net)(row)
        bent = hessian(lambda r: net(r).sum())(row)
        return torch.stack([back.square().sum(), ahead.det(), bent.trace()])

    return vmap(one), torch.randn(3, 2)


class ForceField(nn.Module):
    """Energy and forces of a molecule; the forces are autograd's, with a graph of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(1, 6), nn.SiLU(), nn.Linear(6, 1))

    def energy(self, places: Tensor) -> Tensor:
        i, j = torch.triu_indices(places.shape[1], places.shape[1], 1)
        distance = (places[:, i] - places[:, j]).norm(dim=2, keepdim=True)
        return self.pair(distance).sum(dim=(1, 2))

    def forward(self, places: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            if not places.requires_grad:
                places = places.detach().requires_grad_()
            energy = self.energy(places)
            (slope,) = torch.autograd.grad(energy.sum(), places, create_graph=True)
        return {"energy": energy, "forces": -slope}


@case("energy_and_forces", group=GROUP)
def energy_and_forces() -> Any:
    return ForceField(), torch.randn(3, 3, 2)


@case("hamiltonian_network", group=GROUP)
def hamiltonian_network() -> Any:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def f(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        momentum, force = slope.chunk(2, dim=1)
        return torch.cat([force, -momentum], dim=1)

    return f, torch.randn(4, 4)


@case("physics_residual", group=GROUP)
def physics_residual() -> Any:
    """u_t + u u_x - nu u_xx of a network u(t, x), by nested autograd."""
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def f(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            u = net(x)
            (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 1].sum(), x, create_graph=True)
        return first[:, 0] + u.squeeze(1) * first[:, 1] - 0.01 * second[:, 1]

    return f, torch.randn(4, 2)


@case("langevin_steps_inside", group=GROUP)
def langevin_steps_inside() -> Any:
    """Unrolled gradient descent on an energy: differentiating through an optimiser."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 1))

    def f(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            for _ in range(2):
                (slope,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
                z = z - 0.3 * slope
        return z

    return f, torch.randn(4, 3)


class FastWeights(nn.Module):
    """MAML: an inner step on the parameters themselves, by autograd, for every sample anew."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        answers = []
        with torch.enable_grad():
            for sample in x:
                support, query = sample.view(2, 2)
                loss = (self.net(support) - 1).square().sum()
                slope = torch.autograd.grad(loss, self.net.weight, create_graph=True)[0]
                answers.append(((self.net.weight - 0.1 * slope) @ query).sin())
        return torch.stack(answers)


@case("inner_step_on_the_parameters", group=GROUP)
def inner_step_on_the_parameters() -> Any:
    return FastWeights(), torch.randn(3, 4)


@case("inner_loop_without_second_order", group=GROUP, without={"directional"})
def inner_loop_without_second_order() -> Any:
    """First-order MAML's trick: the inner gradient is a constant to the outer one."""
    net = nn.Linear(3, 1)

    def f(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(net(z).sin().sum(), z)
        return x.exp() - slope

    return f, torch.randn(4, 3)
