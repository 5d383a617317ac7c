"""What a call says of itself: the plan, and one line that names the nodes without a rule."""

import dataclasses
import itertools
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import choose, cost
from batchjac.cost import NOMINAL
from batchjac.plan import Plan
from tests.routes import every_route

F64 = torch.float64


def told(
    caplog: pytest.LogCaptureFixture, f: Callable[[Tensor], Tensor], x: Tensor, mode: str = "auto"
) -> tuple[str, list[str]]:
    """The plan as logged, and the lines about nodes without a rule."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="batchjac"):
        batchjac.jacobian(f, x, mode=mode)
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


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_directions_are_said_in_words(caplog: pytest.LogCaptureFixture) -> None:
    plan, _ = told(caplog, mlp(2, 30, 400), torch.randn(40, 2), "forward")
    lines = [line for line in plan.splitlines() if line.startswith("directions")]
    assert "predicted" in lines[0]
    assert "in plain reverse" in lines[0]
    assert lines[1].endswith("passes: 0 rows of a stage down, 6 columns up, "
                             "0 multiply-adds a sample in joins")  # fmt: skip
    assert [line.split(maxsplit=1)[1] for line in lines[2:]] == [
        f"{a} <- {b}  forward: 2 columns up, 400 rows otherwise  [{name}]"
        for a, b, name in ((400, 30, "Addmm"), (30, 30, "Relu"), (30, 2, "Addmm"))
    ]
    assert "rules         AddmmBackward0, ReluBackward0" in plan


def test_a_join_is_said_with_its_sizes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_route(monkeypatch)
    monkeypatch.setattr(cost, "rates", lambda *_: NOMINAL)
    plan, _ = told(caplog, mlp(300, 100, 4, 100, 300), torch.randn(40, 300))
    assert "directions    joined: 300 x 4 x 300" in plan
    assert "its weight: one linear layer  [Addmm]" in plan


def test_plain_reverse_is_said_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = told(caplog, nn.Tanh(), torch.randn(5, 3))
    assert "directions    plain reverse" in plan.splitlines()  # too small to think of more
    every_route(monkeypatch)
    monkeypatch.setattr(cost, "rates", lambda *_: NOMINAL)
    monkeypatch.setattr(choose, "MARGIN", 1.3)
    plan, _ = told(caplog, mlp(300, 40, 4), torch.randn(40, 300))
    assert "directions    plain reverse: predicted" in plan
