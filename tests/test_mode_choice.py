"""Which mode is taken, and what no mode can answer: refused by name, or left to reverse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import jacobian
from batchjac.capture import capture
from batchjac.cost import NOMINAL
from batchjac.engines import mixed, reference
from batchjac.engines.forward import NoForwardRule
from batchjac.engines.sweep import Kernels
from batchjac.errors import UnsupportedError
from batchjac.job import jobs
from batchjac.problem import pose
from batchjac.route import Join, Weight
from benchmarks.cases import CASES as NINE
from benchmarks.models import mlp
from tests.relatives import F64, MODES, close, made
from tests.routes import DEFAULTS, every_route, planned
from tests.zoo import CASES
from tests.zoo.verdict import difference, truth

pytestmark = pytest.mark.usefixtures("routes_are_taken")


# What cannot be answered, and who says so.


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def owned(x: Tensor) -> Tensor:
    y: Tensor = Own.apply(x.sin())  # type: ignore[no-untyped-call]
    return y.cos()


X = torch.randn(3, 4, dtype=F64)


def test_a_node_without_a_forward_rule_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r'^mode="forward": node OwnBackward has no forward'):
        jacobian(owned, X, mode="forward")


def test_a_stage_without_forward_rules_goes_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    every_route(monkeypatch)
    torch.manual_seed(0)
    layers = mlp(9, 6, 2, 6, 9)().to(F64)

    def f(x: Tensor) -> Tensor:
        y: Tensor = layers[4:](owned(layers[:4](x)))
        return y

    x = torch.randn(4, 9, dtype=F64)
    choice = planned(f, x, NOMINAL, mode="mixed")
    assert choice is not None
    assert not all(stage.forward for stage in choice.chain.stages)
    for mode in ("mixed", "auto"):
        close(jacobian(f, x, mode=mode), reference.jacobian(f, x))


def test_a_function_without_a_cut_cannot_be_mixed() -> None:
    with pytest.raises(UnsupportedError, match="through which every path"):
        jacobian(lambda x: x.sin() + x, X, mode="mixed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coupling", ["sum", "full"])
def test_coupled_samples_go_in_reverse(coupling: str, mode: str) -> None:
    with pytest.raises(UnsupportedError, match=f'coupling="{coupling}" goes in reverse'):
        jacobian(nn.Tanh(), X, coupling=coupling, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_run_in_reverse_only(mode: str) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda g: 2 * g)
        return y.cos()

    with pytest.raises(UnsupportedError, match="hooks on gradients"):
        jacobian(f, X, mode=mode)
    close(jacobian(f, X), reference.jacobian(f, X))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("falls_back")
def test_a_wrong_forward_rule_is_found_out(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = mixed.tangents

    def wrong(*arguments: Any) -> Any:
        block = real(*arguments)
        return block.with_data(block.data * 1.01)

    def wrong_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        found = 1.01 * torch.matmul(a, b)
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(mixed, "tangents", wrong)
    monkeypatch.setattr(mixed, "product", wrong_product)
    model, x = made("autoencoder")
    close(jacobian(model, x, mode="reverse"), reference.jacobian(model, x))
    close(jacobian(model, x, mode=mode), reference.jacobian(model, x))  # not trusted for that
    said = [m for m in caplog.messages if "disagree" in m]
    assert said == ["autograd and the chosen directions disagree: rows now go in reverse"]


def test_an_axis_without_entries() -> None:
    model, x = made("decoder")
    for mode in MODES:
        j = jacobian(lambda x: model(x.sum(2)), torch.zeros(*x.shape, 0, dtype=F64), mode=mode)
        assert j.shape == (4, 12, 3, 0)


@pytest.mark.usefixtures("falls_back")
def test_factors_that_are_not_finite_are_not_joined(caplog: pytest.LogCaptureFixture) -> None:
    case = next(c for c in CASES if c.name == "max_pool_of_infinite_slope")
    f, x = case.build()
    assert not difference(jacobian(f, x, mode="mixed"), truth(case), case)
    assert "the Jacobians on the way are not finite: rows now go in reverse" in caplog.messages


# Auto.


def test_few_rows_and_short_calls_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any) -> Any:
        raise AssertionError("planned")

    monkeypatch.setattr(batchjac.choose, "cuts", no)
    model, x = made("decoder")
    jacobian(model, x)
    jacobian(mlp(100, 2000, 2000, 4)(), torch.randn(8, 100))


def test_a_wide_output_goes_forward_by_itself() -> None:
    model, x = NINE[5].make()
    calls = []
    real = mixed.tangents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "tangents", lambda *a: calls.append(1) or real(*a))
        jacobian(model, x[:16])
    assert calls


def test_two_targets_share_one_walk_unless_routes_beat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    every_route(monkeypatch)
    model, x = made("autoencoder")
    wrt = ["0", "2", "4", "inputs"]
    close(jacobian(model, x, wrt=wrt), reference.jacobian(model, x, wrt=wrt))


def test_what_is_left_to_the_walk_is_costed_to_the_deepest_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Past the bottleneck by routes of their own; the walk ends before it and costs little."""
    monkeypatch.setattr(batchjac.choose, "_left", {})
    monkeypatch.setattr(batchjac.choose, "SHORT", 0.0)
    monkeypatch.setattr(batchjac.cost, "rates", lambda *_: NOMINAL)
    layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in ((300, 128), (128, 16), (16, 128))]
    model = nn.Sequential(*itertools.chain(*layers), nn.Linear(128, 300))
    problem = pose(model, torch.randn(64, 300), **{**DEFAULTS, "wrt": ["inputs", "3", "5"]})
    with capture(problem, slice(0, 64)) as captured:
        (job,) = jobs(problem, captured, slice(0, 64), Kernels())
        assert [part[1] for part in job.choices] == ["inputs", "3"]
        assert [goal.part[1] for goal in job.plain] == ["5"]


# Memory; that a budget is kept is tests/test_memory.py's.


@pytest.mark.usefixtures("falls_back")
@pytest.mark.parametrize("mode", ["mixed", "auto"])
def test_where_no_joined_jacobian_fits_rows_go_in_reverse(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    every_route(monkeypatch)
    torch.manual_seed(0)
    model, x = mlp(300, 200, 100, 200, 300)(), torch.randn(2, 300)
    right = jacobian(model, x, mode="reverse")
    found = jacobian(model, x, mode=mode, max_memory=right.nbytes + 100_000)
    torch.testing.assert_close(found, right)
    assert "max_memory does not hold the Jacobians on the way: rows now go in reverse" in (
        caplog.messages
    )


def test_the_autoencoder_is_joined_at_its_bottleneck() -> None:
    model, x = NINE[3].make()
    choice = planned(model, x, NOMINAL)
    assert choice is not None
    assert isinstance(choice.route, Join)
    assert choice.chain.widths[choice.route.above.lower] == 16


# What is found out once.


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """One entry for each call of a function of ``choose``."""
    calls: list[int] = []
    real = getattr(batchjac.choose, name)

    def noted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(batchjac.choose, name, noted)
    return calls


def test_a_question_left_to_reverse_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    every_route(monkeypatch)
    monkeypatch.setattr(batchjac.choose, "MARGIN", 1e9)
    calls = counted(monkeypatch, "cuts")
    model, x = made("decoder")
    for _ in range(3):
        jacobian(model, x)
    assert len(calls) == 1
    jacobian(model, x[:2])
    assert len(calls) == 2


@pytest.mark.usefixtures("falls_back")
def test_a_rule_that_declines_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    every_route(monkeypatch)
    monkeypatch.setattr(batchjac.choose, "_declined", set())
    asked = []

    def declines(*_: Any) -> Any:
        asked.append(1)
        raise NoForwardRule("ReluBackward0")

    monkeypatch.setattr(mixed, "tangents", declines)
    torch.manual_seed(0)
    model, x = mlp(2, 9, 300)().to(F64), torch.randn(4, 2, dtype=F64)
    right = reference.jacobian(model, x)
    for _ in range(3):
        close(jacobian(model, x), right)
    assert len(asked) == 1
    assert any("no forward rule for this case of node ReluBackward0" in m for m in caplog.messages)
    with pytest.raises(UnsupportedError, match=r"no rule for this case of node ReluBackward0"):
        jacobian(model, x, mode="forward")


def test_a_weight_is_scaled_as_its_node_scales_it() -> None:
    w = torch.randn(9, 40, dtype=F64)
    b = torch.zeros(40, dtype=F64)

    def f(x: Tensor) -> Tensor:
        return torch.addmm(b, torch.addmm(b[:9], x.tanh(), w[:, :9], alpha=3).tanh(), w, alpha=2)

    x = torch.randn(3, 9, dtype=F64)
    choice = planned(f, x, NOMINAL, mode="mixed")
    assert choice is not None
    assert any(isinstance(node, Weight) for node in choice.route)
    close(jacobian(f, x, mode="mixed"), reference.jacobian(f, x))


def test_towards_a_parameter_whose_samples_are_lost_on_the_way() -> None:
    """No rule says where the samples are below such a node, and columns need not know."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Lost(), nn.Linear(3, 5)).to(F64)
    x = torch.randn(3, 4, dtype=F64)
    found = jacobian(model, x, wrt=["0.bias", "2.bias"], mode="forward")
    close(found, reference.jacobian(model, x, wrt=["0.bias", "2.bias"]))


class Lost(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.t().reshape(-1).reshape(x.shape[1], -1).t().sin()
