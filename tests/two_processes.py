"""One of two processes that train together: ``python -m tests.two_processes RANK FILE``.

Prints the gradients after one step, as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchjac import jacobian

BUDGET = "300kB"


class Penalty(nn.Module):
    """The mean square of the Jacobian of a network, which is what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
        self.max_memory: str | None = BUDGET

    def forward(self, x: Tensor) -> Tensor:
        j = jacobian(self.net, x, create_graph=True, max_memory=self.max_memory)
        recomputed = type(j.grad_fn).__name__ == "_RecomputedBackward"
        assert recomputed == (self.max_memory is not None)
        return j.square().mean()


def data() -> tuple[Penalty, Tensor]:
    """The same in every process."""
    torch.manual_seed(0)
    return Penalty(), torch.randn(512, 4)


def main(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model, x = data()
    parallel = DistributedDataParallel(model)
    parallel(x[rank::2]).backward()
    # the last bias is in no Jacobian
    found = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
