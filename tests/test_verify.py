"""When the rows of a graph are compared with autograd: once, and again when they are made anew."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, verify
from batchjac.engines import reference
from batchjac.rules import registry
from batchjac.testing import jacobian_in_chunks

F64 = torch.float64


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each output was compared."""
    count, agrees = Counter[str](), verify.agrees

    def counted(job: Any, sinks: Any) -> bool | None:
        count[job.path] += 1
        return agrees(job, sinks)

    monkeypatch.setattr(verify, "agrees", counted)
    return count


def batch(samples: int = 8) -> Tensor:
    return torch.rand(samples, 3, dtype=F64)


def test_once_whatever_the_chunks(compared: Counter[str]) -> None:
    class Apart(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin(), x.cumprod(1)

    model = Apart()
    jacobian_in_chunks(model, batch(), 2, 3)
    assert compared == {"[0]": 1, "[1]": 1}
    jacobian(model, batch(5))
    jacobian(model, batch(1))
    assert compared == {"[0]": 1, "[1]": 1}


@pytest.mark.parametrize("before", [{"coupling": "full"}, {"samples": 1}])
def test_a_wrong_rule_is_found_although_another_way_was_right(
    before: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is right with every sample by itself says nothing about the rule for all of them."""
    model = nn.Sequential(nn.Linear(3, 2)).to(F64)
    rule = registry._RULES["AddmmBackward0"]

    def wrong(*args: Any) -> Any:
        assert rule.per_sample is not None
        return [b and b.with_data(2 * b.data) for b in rule.per_sample(*args)]

    broken = replace(rule, per_sample=wrong)
    monkeypatch.setitem(registry._RULES, "AddmmBackward0", broken)
    options = dict(before)
    jacobian(model, batch(options.pop("samples", 8)), wrt="0.weight", **options)
    assert not caplog.messages
    x = batch()
    expected = reference.jacobian(model, x, wrt="0.weight")
    torch.testing.assert_close(jacobian(model, x, wrt="0.weight"), expected)
    assert "disagree" in caplog.text
