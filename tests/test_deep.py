"""Graphs with tens of thousands of nodes in a row, which PyTorch alone cannot take apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from batchjac import graph, jacobian
from batchjac.errors import CouplingError
from batchjac.testing import jacobian_in_chunks

ROOT = Path(__file__).parent.parent
DEPTH = 50_000

PROLOGUE = f"""
import gc
import torch
from batchjac import jacobian
from batchjac.errors import BatchjacError
from batchjac.testing import jacobian_in_chunks

def f(x):
    for _ in range({DEPTH}):
        x = x * 1.00001
    return x

class Keeps(torch.nn.Module):
    def forward(self, x):
        self.kept = f(x)
        return self.kept * 2

x, expected = torch.randn(4, 2, dtype=torch.float64), 1.00001 ** {DEPTH}
def right(j, times=1):
    torch.testing.assert_close(j, times * expected * torch.eye(2, dtype=j.dtype).expand(4, 2, 2))
"""
CALLS = {
    "one forward": "right(jacobian(f, x))",
    "chunks": "right(jacobian_in_chunks(f, x, 1, 1))",
    "a module that keeps its output": "right(jacobian(Keeps(), x), 2)",
    "probed": "right(jacobian(lambda x: f(x.flip(0)).flip(0), x))",
    "two outputs": "[right(j) for j in jacobian(lambda x: (f(x), f(x).clone()), x)]",
    "coupled": """
try:
    jacobian(lambda x: f(x - x.mean(0)), x)
except BatchjacError as error:
    kept = error
else:
    raise AssertionError
""",
    "an error of the function": """
def fails(x):
    y = f(x)
    y.register_hook(lambda g: 1 / 0)
    return y
try:
    jacobian(fails, x)
except ZeroDivisionError as error:
    kept = error
else:
    raise AssertionError
del kept
""",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_deep_graph_is_taken_apart(name: str) -> None:
    """In a process of its own, which a graph that is freed in one go would end."""
    script = f"{PROLOGUE}\n{CALLS[name]}\ngc.collect()\nprint('alive')"
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr


def deep(x: Tensor) -> Tensor:
    for _ in range(graph.DEEP + 1):
        x = x * 1.001
    return x


def test_nothing_is_held_after_a_call() -> None:
    x = torch.randn(4, 2)
    jacobian(deep, x)
    assert not graph.held()
    jacobian_in_chunks(deep, x, 2, 1)
    assert not graph.held()
    with pytest.raises(CouplingError):
        jacobian(lambda x: deep(x - x.mean(0)), x)
    assert not graph.held()


def test_only_deep_graphs_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("batchjac.job.hold", lambda roots: taken.append(len(roots)))
    jacobian(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), torch.randn(4, 2))
    assert taken == []
    jacobian(deep, torch.randn(4, 2))
    assert taken == [1]
    jacobian(deep, torch.randn(4, 2), create_graph=True)  # the caller's from then on
    assert taken == [1]
