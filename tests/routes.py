"""What the planner chose for a model, without computing its Jacobian."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from batchjac import choose, cost, pace
from batchjac.capture import capture
from batchjac.choose import Choice
from batchjac.cost import Rates
from batchjac.engines.sweep import Kernels
from batchjac.job import Job, jobs
from batchjac.pace import Pace
from batchjac.problem import pose

DEFAULTS: dict[str, Any] = {
    "wrt": None, "of": None, "outputs": None, "mode": "auto", "coupling": "error",
    "create_graph": False, "batched": True,
}  # fmt: skip


def every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``mode="auto"`` plan for small models too, and take whatever is predicted to be best."""
    monkeypatch.setattr(choose, "_left", {})
    monkeypatch.setattr(choose, "FEW_ROWS", 0)
    monkeypatch.setattr(choose, "SHORT", 0.0)
    monkeypatch.setattr(choose, "MARGIN", 0.0)


def one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``mode="auto"`` predict that autograd's engine is faster, whatever the rows and nodes."""
    always = lambda graph, seeds, other=0.0: Pace(2.0, 1.0) if seeds.rows else None  # noqa: E731
    monkeypatch.setattr(pace, "singly", always)


def planned(f: Any, x: Tensor, rates: Rates, **options: Any) -> Choice | None:
    """The choice for one output and one input."""
    problem = pose(f, x, **{**DEFAULTS, **options})
    samples = slice(0, problem.samples)
    with pytest.MonkeyPatch.context() as patch, capture(problem, samples) as captured:
        every_route(patch)
        patch.setattr(cost, "rates", lambda *_: rates)
        (job,) = jobs(problem, captured, samples, Kernels())
        return next(iter(job.choices.values()), None)


def walk_by(monkeypatch: pytest.MonkeyPatch, walk: Any) -> None:
    """Let another function do all walks, those of probes and those of the answer."""
    for module in ("job", "engines.compiled", "engines.mixed"):
        monkeypatch.setattr(f"batchjac.{module}.walk", walk)


__all__ = ["Job", "every_route", "one_row_at_a_time", "planned", "walk_by"]
