"""Rows that all samples share, times a diagonal: joined with the next matrix, or multiplied out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian
from batchjac.block import Block, Scaled
from batchjac.engines import reference
from batchjac.rules import diagonal, linear
from tests.common import close

pytestmark = pytest.mark.usefixtures("float64")

N = 24  # samples: twice the widest matrix below, so that joining pays


class Branches(nn.Module):
    """The gated rows go two ways and meet again, multiplied out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(torch.relu(hidden + hidden.sin()))


def gated(gate: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), gate, nn.Linear(8, 5))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": lambda: gated(nn.ReLU()),
    "tanh": lambda: gated(nn.Tanh()),
    "sigmoid": lambda: gated(nn.Sigmoid()),
    "GELU": lambda: gated(nn.GELU()),
    "two gates": lambda: gated(nn.Sequential(nn.Tanh(), nn.ReLU())),
    "normalised": lambda: gated(nn.Sequential(nn.BatchNorm1d(8).eval(), nn.SiLU())),
    "branches": Branches,
    "deep": lambda: nn.Sequential(gated(nn.Tanh()), nn.Tanh(), nn.Linear(5, 4)),
}


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Small rows wait too; whether each time they were joined with the matrix."""
    joined: list[bool] = []
    usual = linear._joined

    def noted(g: Scaled, w: Tensor) -> Tensor | None:
        found = usual(g, w)
        joined.append(found is not None)
        return found

    monkeypatch.setattr(diagonal, "WAITING", 0)
    monkeypatch.setattr(linear, "_joined", noted)
    return joined


@pytest.mark.parametrize("mode", ["reverse", "forward", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_joined_rows_are_the_reference(
    name: str, mode: str, joins: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = MODELS[name](), torch.randn(N, 6)
    close(jacobian(model, x, mode=mode), reference.jacobian(model, x))
    assert not caplog.records, "the walk was not trusted"
    if mode != "mixed":  # where it goes is planned
        assert any(joins) == (name != "branches")


@pytest.mark.parametrize("name", MODELS)
def test_joined_rows_have_a_history(name: str, joins: list[bool]) -> None:
    model, x = MODELS[name](), torch.randn(N, 6, requires_grad=True)
    goals = [x, *model.parameters()]

    def gradients(j: Tensor) -> Any:
        total = (j.square() * torch.arange(6.0)).sum()
        return torch.autograd.grad(total, goals, allow_unused=True, materialize_grads=True)

    ours = gradients(jacobian(model, x, create_graph=True))
    assert any(joins) == (name != "branches")
    close(ours, gradients(reference.jacobian(model, x, create_graph=True)))


def test_few_samples_are_multiplied_out(joins: list[bool]) -> None:
    model, x = MODELS["tanh"](), torch.randn(4, 6)
    close(jacobian(model, x, mode="reverse"), reference.jacobian(model, x))
    assert joins == [False], "weights for all rows would be larger than the rows"


def test_what_a_gate_stops_stays_zero_beside_infinite_weights(joins: list[bool]) -> None:
    model, x = MODELS["ReLU"](), torch.randn(N, 6)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # type: ignore[index, union-attr]  # a Sequential's Linear
        model[2].weight[0, 0] = torch.inf  # type: ignore[index]  # the same
    assert torch.equal(jacobian(model, x), torch.zeros(N, 5, 6))
    assert joins == [False]


def test_the_diagonal_times_the_shared_rows_is_the_data() -> None:
    slope, rows = torch.randn(1, 7, 3), torch.randn(2, 1, 3)
    block = Scaled(Block(rows, (7, 3)), lambda data: data * slope, selects=False)
    assert (block.rows, block.writable) == (2, False)
    assert torch.equal(block.data, rows * slope)
    assert torch.equal(block.data, block.diagonal() * rows)
    assert block.to(torch.float64) is block
    assert block.to(torch.float32).data.dtype == torch.float32
