"""Checkpointed parts run as plain Python: once, right, and with torch as it was afterwards."""

from typing import Any, ClassVar

import pytest
import torch
import torch.utils.checkpoint as checkpoints
from torch import Tensor, nn

import batchjac


class Net(nn.Module):
    """A checkpointed body between two layers; counts how often the body runs.

    In a list of the class: what a module's own list gathers is undone with the rest.
    """

    runs: ClassVar[list[int]] = []

    def __init__(self, reentrant: bool | None, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.inner = nn.Linear(4, 4)
        self.body = nn.Sequential(self.inner, nn.Dropout(dropout), nn.GELU())
        self.reentrant = reentrant

    def run(self, x: Tensor) -> Tensor:
        self.runs.append(len(x))
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.reentrant is None:
            return self.last(self.run(hidden))
        return self.last(checkpoints.checkpoint(self.run, hidden, use_reentrant=self.reentrant))


KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved-hooks"])


def pair(reentrant: bool, **options: Any) -> tuple[Net, Net, Tensor]:
    plain, checked = Net(None, **options).double(), Net(reentrant, **options).double()
    return plain, checked, torch.randn(5, 3, dtype=torch.float64)


@KINDS
@pytest.mark.parametrize("wrt", [None, "inner", "inner.weight", "parameters"])
def test_the_answer_is_that_without_a_checkpoint(reentrant: bool, wrt: str | None) -> None:
    plain, checked, x = pair(reentrant)
    want, found = (batchjac.jacobian(net, x, wrt=wrt) for net in (plain, checked))
    assert float(torch.cat([t.flatten() for t in _tensors(want)]).abs().sum()) > 0
    torch.testing.assert_close(found, want)


def _tensors(answer: Any) -> list[Tensor]:
    return list(answer.values()) if isinstance(answer, dict) else [answer]


@KINDS
def test_the_body_runs_once(reentrant: bool) -> None:
    _, checked, x = pair(reentrant)
    Net.runs.clear()
    batchjac.jacobian(checked, x)
    assert Net.runs == [5]


@KINDS
def test_a_dropout_mask_is_that_of_the_plain_run(reentrant: bool) -> None:
    plain, checked, x = pair(reentrant, dropout=0.5)
    found = []
    for net in (plain, checked):
        torch.manual_seed(7)
        found.append(batchjac.jacobian(net.train(), x))
    torch.testing.assert_close(found[1], found[0])


@KINDS
def test_one_can_train_through_it_and_nothing_is_left(reentrant: bool) -> None:
    plain, checked, x = pair(reentrant)
    slopes = []
    for net in (plain, checked):
        j = batchjac.jacobian(net, x, create_graph=True)
        slopes.append(torch.autograd.grad(j.square().sum(), net.inner.weight)[0])
        assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(slopes[1], slopes[0])


def test_torch_is_as_it_was_also_after_an_error() -> None:
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    before = [getattr(checkpoints, name) for name in names]

    def fails(x: Tensor) -> Tensor:
        assert checkpoints.CheckpointFunction is not before[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        batchjac.jacobian(fails, torch.randn(2, 3))
    assert [getattr(checkpoints, name) for name in names] == before


class Exact(nn.Module):
    """A model that switches autocast off for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.layers(x)
            return y


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward", "mixed"])
def test_the_callers_autocast_is_for_the_forward_alone(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, x = Exact(), torch.randn(7, 6)
    expected = batchjac.jacobian(model, x, mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = batchjac.jacobian(model, x, mode=mode)
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not caplog.records
