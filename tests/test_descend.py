"""A module and what is below it: in torch's own order, under torch's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import descend


class Both(nn.Module):
    """One tensor as a parameter and as a buffer, under two names each; and empty entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(2))
        self.again = self.first
        self.register_buffer("kept", self.first)
        self.register_buffer("twice", self.first)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)
        self.child: nn.Module | None = None


class Hidden(nn.Module):
    """Names its parameters as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.other = nn.Parameter(torch.ones(3))

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield "other", self.other


class Above(nn.Module):
    """Keeps a child of its own to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.kept = nn.Linear(2, 2), nn.BatchNorm1d(2)

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        yield "", self


def shared() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.Sequential(nn.BatchNorm1d(2), layer), layer)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


def circle() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("above", nn.Sequential())
    model.above.__dict__["_modules"]["root"] = model
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Linear(2, 2),
    "a module twice": shared,
    "a parameter twice": tied,
    "a parameter and buffer": Both,
    "in a circle": circle,
    "nested": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False
    ),
    "own names": Hidden,
    "own names below": lambda: nn.Sequential(Hidden(), nn.Linear(2, 2)),
    "own modules": Above,
    "own modules below": lambda: nn.Sequential(nn.Linear(2, 2), Above()),
    "traced": lambda: torch.jit.trace(shared().eval(), torch.ones(3, 2)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # still in use
def test_the_same_as_torch_says(name: str) -> None:
    model = MODELS[name]()
    assert named(descend.modules(model)) == named(model.named_modules())
    parameters, buffers = descend.tensors(model)
    assert named(parameters) == named(model.named_parameters())
    assert named(buffers) == named(model.named_buffers())
    assert list(map(key, descend.parameters(model))) == list(map(key, model.parameters()))


def named(found: Any) -> list[tuple[str, int]]:
    return [(name, key(value)) for name, value in found]


def key(value: nn.Module | Tensor) -> int:
    """A scripted module makes a new tensor object every time it is asked for one."""
    return value.data_ptr() if isinstance(value, Tensor) else id(value)
