"""The two training steps that are measured, and every way to take them.

A step is: value and Jacobian of a block, a quantity of linear algebra, a loss, and its gradients by
the parameters. A way makes, from a model and some samples, a call that does all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap

from batchjac import linalg
from benchmarks.models import mlp
from benchmarks.ways import diagonal, rows

Loss = Callable[[Tensor, Tensor], Tensor]
Taken = tuple[Any, list[Any]]
"""The loss, and its gradient by every parameter in the order of the model."""


class Added(nn.Module):
    """``x + body(x)``: a residual block."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


def inverse_loss(y: Tensor, inverse: Tensor) -> Tensor:
    """``|y|² + |J⁻¹|²``, the mean over samples."""
    return (y.square().sum(1) + inverse.square().sum((1, 2))).mean()


def flow_loss(y: Tensor, logdet: Tensor) -> Tensor:
    """The negative log-likelihood of a flow under a standard normal, but for a constant."""
    return (y.square().sum(1) / 2 - logdet).mean()


def block() -> nn.Module:
    """Seed 5's: 64 to 64 by 128 hidden.

    The second layer begins near the first's transpose, which keeps the condition number below ten:
    beyond some thousands the ways would differ in float32 by more than an error shows.
    """
    model = mlp(64, 128, 64, activation=nn.Tanh)()
    # mlp builds Linear, Tanh, Linear
    first, last = model[0].weight, model[2].weight  # type: ignore[index]
    with torch.no_grad():
        nn.init.orthogonal_(first)
        last.copy_(first.T + 0.02 * torch.randn_like(last))
    return model


def flow() -> nn.Module:
    """Two residual blocks in 32 dimensions."""
    return nn.Sequential(*(Added(mlp(32, 64, 32, activation=nn.Tanh)()) for _ in range(2)))


@dataclass(frozen=True)
class Step:
    """A block, its width, and which function of its Jacobian enters the loss."""

    name: str
    build: Callable[[], nn.Module]
    width: int
    of: str
    """``"inverse"`` or ``"slogdet"``."""
    budget: int
    """Bytes of `max_memory` for the larger batch."""

    def make(self, samples: int) -> tuple[nn.Module, Tensor]:
        """The model with trainable parameters, and its inputs; the same every time."""
        torch.manual_seed(0)
        return self.build(), torch.randn(samples, self.width)

    def loss(self, y: Tensor, j: Tensor) -> Tensor:
        """From a Jacobian that is there, as everyone without `batchjac.linalg` has to."""
        if self.of == "inverse":
            return inverse_loss(y, torch.linalg.inv(j))
        return flow_loss(y, torch.linalg.slogdet(j).logabsdet)


STEPS = (
    Step("inverse, 64-128-64", block, 64, "inverse", budget=160 << 20),
    Step("flow, 32 dimensions", flow, 32, "slogdet", budget=64 << 20),
)

Call = Callable[[], Taken]
Prepare = Callable[[Step, nn.Module, Tensor], Call]
Both = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def trained(both: Both) -> Prepare:
    """A step from a function that gives the value and a differentiable Jacobian."""

    def prepare(step: Step, model: nn.Module, x: Tensor) -> Call:
        parameters = list(model.parameters())

        def call() -> Taken:
            loss = step.loss(*both(model, x))
            return loss, list(torch.autograd.grad(loss, parameters))

        return call

    return prepare


def ours(bounded: bool) -> Prepare:
    """`batchjac.linalg` from the model, the value from a forward of its own."""

    def prepare(step: Step, model: nn.Module, x: Tensor) -> Call:
        parameters = list(model.parameters())
        limit = step.budget if bounded else None

        def call() -> Taken:
            y = model(x)
            if step.of == "inverse":
                inverse = linalg.inverse(model, x, create_graph=True, max_memory=limit)
                loss = inverse_loss(y, inverse)
            else:
                found = linalg.slogdet(model, x, create_graph=True, max_memory=limit)
                loss = flow_loss(y, found.logabsdet)
            return loss, list(torch.autograd.grad(loss, parameters))

        return call

    return prepare


def row_loop(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``autograd.grad(..., create_graph=True)`` once per output."""
    x = x.detach().requires_grad_()
    y = model(x)
    found = [torch.autograd.grad(column.sum(), x, create_graph=True)[0] for column in y.T]
    return y, torch.stack(found, 1)


def graph_vmap(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """All rows in one ``autograd.grad(..., is_grads_batched=True)``."""
    x = x.detach().requires_grad_()
    y = model(x)
    (j,) = torch.autograd.grad(y, x, rows(y), is_grads_batched=True, create_graph=True)
    return y, j.transpose(0, 1)


def vmap_of(jacobian: Callable[..., Any]) -> Both:
    """``vmap(jacrev(f, has_aux=True))``: the value comes from the same forward."""

    def both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        def twice(sample: Tensor) -> tuple[Tensor, Tensor]:
            y = model(sample[None])[0]
            return y, y

        j, y = vmap(jacobian(twice, has_aux=True))(x)
        return y, j

    return both


def functional(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``functional.jacobian(vectorize=True)``, then what belongs to one sample."""
    y = model(x)
    j: Any = torch.autograd.functional.jacobian(model, x, create_graph=True, vectorize=True)
    return y, diagonal(j, y.shape, x.shape)


def sum_trick(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Seed 5's answer: the Jacobian of the sum over samples, vectorized."""
    j: Any = torch.autograd.functional.jacobian(
        lambda t: model(t).sum(0), x, create_graph=True, vectorize=True
    )
    return model(x), j.movedim(1, 0)


def in_jax(step: Step, model: nn.Module, x: Tensor) -> Call:
    from benchmarks.in_jax import training_step

    return training_step(step.of, model, x)


OURS, BOUNDED, JAX = "batchjac", "batchjac, max_memory", "JAX"
WAYS: dict[str, Prepare] = {
    OURS: ours(bounded=False),
    BOUNDED: ours(bounded=True),
    "row loop": trained(row_loop),
    "graph-level vmap": trained(graph_vmap),
    "vmap(jacrev)": trained(vmap_of(jacrev)),
    "vmap(jacfwd)": trained(vmap_of(jacfwd)),
    "functional.jacobian": trained(functional),
    "sum trick": trained(sum_trick),
    JAX: in_jax,
}
