"""NaN in the data hides no coupling, and refuses nothing that is independent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian
from batchjac.engines import reference
from batchjac.errors import CouplingError
from tests.coupled import COUPLED, norm_1d

Function = Callable[..., Any]
N, F64 = 6, torch.float64
ENGINES = [jacobian, reference.jacobian]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def broken(where: str) -> Tensor:
    x = torch.randn(N, 4)
    if where == "one number":
        x[2, 1] = torch.nan
    elif where == "one sample":
        x[0] = torch.nan
    elif where == "infinite":
        x[1] = torch.inf
    elif where == "all but one":
        x[1:] = torch.nan
    else:
        x[:] = torch.nan
    return x


def unproved(x: Tensor) -> Tensor:
    """The sine, on a way on which the proof loses the samples."""
    return x.sin().flip(0).flip(0)


PLACES = ["one number", "one sample", "infinite", "all but one", "all"]


@pytest.mark.parametrize("engine", ENGINES, ids=["walk", "reference"])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", [name for name in COUPLED if name != "sorted"])
def test_coupled_samples_are_refused(name: str, where: str, engine: Function) -> None:
    with pytest.raises(CouplingError):
        engine(COUPLED[name](), broken(where))


@pytest.mark.parametrize("engine", ENGINES, ids=["walk", "reference"])
@pytest.mark.parametrize("where", PLACES)
def test_what_is_in_order_is_not_moved(where: str, engine: Function) -> None:
    """NaN are sorted to the end, and stay where they are if they are there."""
    x = broken(where)
    if where in ("all but one", "all"):
        assert engine(COUPLED["sorted"](), x).shape == (N, 4, 4)
        return
    with pytest.raises(CouplingError):
        engine(COUPLED["sorted"](), x)


@pytest.mark.parametrize("engine", ENGINES, ids=["walk", "reference"])
def test_coupled_inputs_of_a_parameter_are_refused(engine: Function) -> None:
    with pytest.raises(CouplingError):
        engine(norm_1d(), broken("one sample"), wrt="3.weight")


def test_coupled_samples_behind_a_hook_are_refused() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.square()
        y.register_hook(lambda g: 2 * g)
        return y - y.std(0)

    with pytest.raises(CouplingError):
        jacobian(f, broken("one sample"))


def independent() -> dict[str, Function]:
    """Nothing is proved where a node has no rule or hides the axis of the samples."""
    return {
        "a proof": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        "evaluation": norm_1d().eval(),
        "flipped twice": unproved,
        "one by one": lambda x: torch.stack([row.sin() * row.sum() for row in x]),
        "hooked": _hooked,
    }


def _hooked(x: Tensor) -> Tensor:
    y = x.sin()
    y.register_hook(lambda g: 2 * g)
    return y


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", independent())
def test_independent_samples_pass(name: str, where: str) -> None:
    f, x = independent()[name], broken(where)
    found, expected = jacobian(f, x), reference.jacobian(f, x)
    torch.testing.assert_close(found, expected, equal_nan=True)
    whole = x.isfinite().all(1)
    assert found[whole].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES, ids=["walk", "reference"])
def test_a_kink_is_no_coupling(engine: Function) -> None:
    """The root of nothing has an infinite derivative, which makes NaN of no cotangent at all."""

    def length(x: Tensor) -> Tensor:
        return unproved(x) + x.square().sum(1, keepdim=True).sqrt()

    x = torch.randn(N, 4)
    x[3] = 0
    assert engine(length, x)[3].isnan().all()
    assert engine(length, 0 * x).isnan().all()


@pytest.mark.parametrize("engine", ENGINES, ids=["walk", "reference"])
def test_constant_data_hide_no_coupling(engine: Function) -> None:
    with pytest.raises(CouplingError):
        engine(lambda x: x / x.std(0), torch.ones(N, 4))


def test_what_cannot_be_seen_is_said() -> None:
    """A model that has diverged, behind a node without a rule."""
    model = nn.Linear(4, 2)
    nn.init.constant_(model.weight, torch.nan)
    assert jacobian(model, torch.randn(N, 4)).isnan().all()
    with pytest.raises(CouplingError, match=r"cannot be seen: all gradients of 6 of 6 .* NaN in"):
        jacobian(lambda x: model(unproved(x)), torch.randn(N, 4))


def test_a_function_that_refuses_other_numbers() -> None:
    def only_these(x: Tensor) -> Tensor:
        if not x.isnan().any():
            raise ArithmeticError("these are not the numbers")
        return unproved(x)

    with pytest.raises(CouplingError, match="cannot be seen: all gradients of 1 of 6"):
        jacobian(only_these, broken("one sample"))


def test_frozen_statistics_of_broken_data() -> None:
    """Whether a normalisation is over samples is decided although one of them is NaN."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x.sin().flip(0)).flip(0)
            return y

    found = jacobian(Hidden(), broken("one sample"), coupling="frozen")
    assert found.shape == (N, 4, 4)


def test_random_numbers_of_the_caller_stay() -> None:
    net = nn.Sequential(norm_1d(), nn.Dropout(0.5))
    x, state = broken("one sample"), torch.get_rng_state()
    with pytest.raises(CouplingError):
        reference.jacobian(net, x)
    assert torch.equal(state, torch.get_rng_state())
