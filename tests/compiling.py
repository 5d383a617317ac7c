"""Walks compiled by a compiler of the test's own, and what a call says of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from batchjac.memory import Chunk
from batchjac.problem import pose
from batchjac.solve import solve

Module = torch.fx.GraphModule


class Counted:
    """A compiler that leaves the graph as it is, and counts."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    def __call__(self, module: Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*tensors: Tensor) -> Any:
            self.ran += 1
            return module(*tensors)

        return run


def answer(
    f: Callable[..., Any], x: Any, compiler: Any, fixed: Chunk | None = None, **options: Any
) -> Any:
    """``jacobian`` by a compiler of the test's own."""
    asked = {
        **dict.fromkeys(("wrt", "of", "outputs")), "mode": "reverse", "coupling": "error",
        "create_graph": False, "batched": True, **options,
    }  # fmt: skip
    out = asked.pop("out", None)
    problem = replace(pose(f, x, **asked, compile=True), compiler=compiler)
    return solve(problem, None, out, fixed).jacobian


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def walks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """How the last call says its walks were computed."""
    plans = [r.getMessage() for r in caplog.records if r.getMessage().startswith("plan")]
    said = [line for line in plans[-1].splitlines() if line.startswith("compiled")]
    return [line.removeprefix("compiled").strip() for line in said]


def kinds(caplog: pytest.LogCaptureFixture, call: int) -> list[str]:
    """The kinds of nodes that a call says it went through."""
    plans = [r.getMessage() for r in caplog.records if r.getMessage().startswith("plan")]
    (said,) = [line for line in plans[call].splitlines() if line.startswith("rules")]
    return said.split()[1:]
