"""What a call says of itself: the plan, and one line that names the nodes without a rule."""

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac.plan import Plan

F64 = torch.float64


def told(
    caplog: pytest.LogCaptureFixture, f: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[str, list[str]]:
    """The plan as logged, and the lines about nodes without a rule."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="batchjac"):
        batchjac.jacobian(f, x)
    plans = [m for m in caplog.messages if m.startswith("plan\n")]
    assert len(plans) == 1
    return plans[0], [m for m in caplog.messages if m.startswith("nodes without a rule")]


def test_all_rules(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(F64)
    plan, slow = told(caplog, net, torch.randn(5, 3, dtype=F64))
    assert slow == []
    assert "without rule" not in plan
    assert "AddmmBackward0, TanhBackward0" in plan
    assert "5 of 5 in one forward" in plan
    assert "2 of 2 in one walk" in plan
    assert "proved from the graph" in plan


def test_a_node_without_a_rule_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def f(x: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(x.unsqueeze(2) * x.unsqueeze(1)).sum(2)

    plan, slow = told(caplog, f, torch.rand(4, 3, dtype=F64))
    assert slow == ["nodes without a rule, called themselves: LinalgMatrixExpBackward0 (vmap)"]
    assert "without rule  LinalgMatrixExpBackward0: vmap" in plan
    assert "independence  probed" in plan


def test_hooks_change_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda g: 2 * g)
        return y

    plan, _ = told(caplog, f, torch.rand(4, 3, dtype=F64))
    assert "engine        rows" in plan


def test_a_plan_does_not_change() -> None:
    ways = {"MulBackward0": "rule"}
    plan = Plan(1, 1, 1, 1, "walk", "not asked", ways)
    ways["SinBackward0"] = "rows"
    assert plan.slow == {}
    # what mypy objects to is what must fail
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rows = 2  # type: ignore[misc]  # frozen
    with pytest.raises(TypeError):
        plan.kernels["SinBackward0"] = "rows"  # type: ignore[index]  # read-only
