"""Activations that are not kept: checkpointing of both kinds, and saved-tensor hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from . import rowloop
from .registry import NOISY, case

GROUP = "checkpointing"


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.block = nn.Sequential(
            nn.Linear(6, 6), nn.GELU(), nn.Dropout(dropout), nn.Linear(6, 6), nn.LayerNorm(6)
        )
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.head(hidden + checkpoint(self.block, hidden, use_reentrant=self.reentrant))

    def kept(self, x: Tensor) -> Tensor:
        """The same function with nothing recomputed."""
        hidden = self.first(x)
        return self.head(hidden + self.block(hidden))


def without_checkpoint(model: Any, x: Tensor) -> Tensor:
    """The truth for what ``autograd.grad`` refuses: the row loop on the function kept whole."""
    return rowloop.jacobian(model.kept, x)


@case("checkpoint_non_reentrant", group=GROUP)
def checkpoint_non_reentrant() -> Any:
    return Checkpointed(reentrant=False), torch.randn(4, 4)


@case("checkpoint_reentrant", group=GROUP, expected=without_checkpoint)
def checkpoint_reentrant() -> Any:
    return Checkpointed(reentrant=True), torch.randn(4, 4)


# The recomputation must draw the masks of the forward again.
@case("checkpoint_non_reentrant_dropout", group=GROUP, without=NOISY)
def checkpoint_non_reentrant_dropout() -> Any:
    return Checkpointed(reentrant=False, dropout=0.4).train(), torch.randn(4, 4)


@case("checkpoint_reentrant_dropout", group=GROUP, expected=without_checkpoint, without=NOISY)
def checkpoint_reentrant_dropout() -> Any:
    return Checkpointed(reentrant=True, dropout=0.4).train(), torch.randn(4, 4)


class Kept:
    """A function, not a module: the parameters are out of the library's sight."""

    def __init__(self) -> None:
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 2)

    def __call__(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x * 2, use_reentrant=True))

    def kept(self, x: Tensor) -> Tensor:
        return self.head(self.block(x * 2))


@case("checkpoint_reentrant_in_a_function", group=GROUP, expected=without_checkpoint)
def checkpoint_reentrant_in_a_function() -> Any:
    """A reentrant backward runs autograd inside: no gradient may be left in the parameters."""
    return Kept(), torch.randn(4, 4)


@case("checkpoint_nested", group=GROUP)
def checkpoint_nested() -> Any:
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def block(x: Tensor) -> Tensor:
        return outer(checkpoint(lambda y: inner(y).tanh(), x, use_reentrant=False)).sin()

    return lambda x: checkpoint(block, x, use_reentrant=False), torch.randn(4, 4)


@case("checkpoint_sequential", group=GROUP)
def checkpoint_sequence() -> Any:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(4)))
    return lambda x: checkpoint_sequential(layers, 2, x, use_reentrant=False), torch.randn(4, 4)


@case("checkpoint_several_inputs_and_outputs", group=GROUP)
def checkpoint_several_inputs_and_outputs() -> Any:
    net = nn.Bilinear(3, 2, 4)

    def block(a: Tensor, b: Tensor, power: int) -> tuple[Tensor, Tensor]:
        y = net(a, b)
        return y.tanh() ** power, y.exp()

    def f(a: Tensor, b: Tensor) -> Tensor:
        left, right = checkpoint(block, a, b, 2, use_reentrant=False)
        return left * right

    return f, (torch.randn(4, 3), torch.randn(4, 2))


@case("saved_tensors_offloaded", group=GROUP)
def saved_tensors_offloaded() -> Any:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(1))

    def f(x: Tensor) -> Tensor:
        with save_on_cpu():
            return net(x)

    return f, torch.randn(4, 4)


@case("saved_tensors_packed", group=GROUP)
def saved_tensors_packed() -> Any:
    """Saved values are kept as NumPy arrays and rebuilt when asked for."""
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Sigmoid(), nn.MaxPool1d(2), nn.Flatten())

    def f(x: Tensor) -> Tensor:
        pack, unpack = (lambda t: t.detach().numpy().copy()), torch.from_numpy
        with saved_tensors_hooks(pack, unpack):
            return net(x) ** 2

    return f, torch.randn(3, 2, 5)
