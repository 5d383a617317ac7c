"""What each of two processes does for tests/test_distributed.py: ``python -m tests.processes``.

They meet by a file and talk over the loopback; each prints what it found as JSON.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from batchjac import jacobian, value_and_jacobian

WORLD, STEPS = 2, 3
PATIENCE = datetime.timedelta(seconds=60)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data() -> Tensor:
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss_of(y: Tensor, j: Tensor) -> Tensor:
    """A flow's; DDP waits for a gradient of every parameter, so the value must count too."""
    return y.square().sum(1).mean() / 2 - torch.linalg.slogdet(j).logabsdet.mean()


def shared(rank: int, max_memory: int | None) -> dict[str, Any]:
    """``DistributedDataParallel``: each process has every second sample."""
    net = network()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first: list[Any] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        mine = data()[rank::WORLD]
        loss_of(
            *value_and_jacobian(model, mine, create_graph=True, max_memory=max_memory)
        ).backward()
        first = first or [p.grad.tolist() for p in net.parameters() if p.grad is not None]
        optimizer.step()
    return {"gradients": first, "parameters": [p.tolist() for p in net.parameters()]}


def sharded(rank: int, max_memory: int | None) -> dict[str, Any]:
    """``fully_shard``: each process has half of every parameter, and all samples."""
    net = network()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    found = jacobian(net, data(), max_memory=max_memory).tolist()
    loss = loss_of(*value_and_jacobian(net, data(), create_graph=True))
    try:
        loss.backward()
    except RuntimeError as error:
        return {"jacobian": found, "error": str(error)}
    return {"jacobian": found, "error": ""}


def main(what: str, rank: str, meeting: str, max_memory: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=WORLD, timeout=PATIENCE
    )
    act = {"shared": shared, "sharded": sharded}[what]
    print(json.dumps(act(int(rank), int(max_memory) or None)))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
