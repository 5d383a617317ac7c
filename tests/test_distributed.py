"""Two processes and gloo over the loopback: the gradients of one process on all samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from batchjac import jacobian
from tests import processes
from tests.common import close

LIMIT = 120  # seconds for both to end; a process that waits for the other gives up after 60


def in_two(what: str, folder: Path, max_memory: int = 0) -> list[dict[str, Any]]:
    """What both processes printed; neither outlives this call."""
    meeting = folder / "meeting"
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.processes", what, str(rank),
             str(meeting), str(max_memory)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(processes.WORLD)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(running, said, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out) for out, _ in said]


def alone() -> tuple[list[Any], list[Any]]:
    """Gradients of the first step and parameters after the last: one process, nested autograd."""
    net, first = processes.network(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(processes.STEPS):
        optimizer.zero_grad()
        x = processes.data().requires_grad_()
        y = net(x)
        rows = [torch.autograd.grad(c.sum(), x, create_graph=True)[0] for c in y.T]
        processes.loss_of(y, torch.stack(rows, 1)).backward()
        first = first or [p.grad.clone() for p in net.parameters() if p.grad is not None]
        optimizer.step()
    return first, [p.detach() for p in net.parameters()]


def tensors(found: list[Any]) -> list[torch.Tensor]:
    return [torch.tensor(f, dtype=torch.float64) for f in found]


@pytest.mark.parametrize("max_memory", [0, 6000], ids=["whole", "in chunks"])
def test_two_processes_share_a_batch(max_memory: int, tmp_path: Path) -> None:
    gradients, parameters = alone()
    for found in in_two("shared", tmp_path, max_memory):
        close(tensors(found["gradients"]), gradients)
        close(tensors(found["parameters"]), parameters)
    assert not torch.equal(parameters[0], next(processes.network().parameters()))


def test_parameters_in_shards(tmp_path: Path) -> None:
    """The Jacobian is right. Its history is not to be had, in torch itself: shards are let go."""
    truth = jacobian(processes.network(), processes.data())
    for found in in_two("sharded", tmp_path):
        close(torch.tensor(found["jacobian"], dtype=torch.float64), truth)
        assert "storage of size 0" in found["error"]
