"""Peak memory of an operator's figures: ``python -m tests.peak_operator across 128 512``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchjac
from tests.peak import small_conv
from tests.resident import level, main, status


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 2048), nn.Tanh(), nn.Linear(2048, 2048), nn.Tanh(),
                         nn.Linear(2048, 10))  # fmt: skip


Ask = Callable[[Any], Tensor]
CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str | None, Ask]] = {
    "across": (small_conv, (96, 1, 28, 28), "parameters", lambda a: a.gram(across=True)),
    "within": (small_conv, (256, 1, 28, 28), "parameters", lambda a: a.gram()),
    "norm": (wide, (256, 256), "parameters", lambda a: a.norm()),
    "wide": (wide, (64, 256), "parameters", lambda a: a.gram(across=True)),
    "inputs": (small_conv, (512, 1, 28, 28), None, lambda a: a.gram()),
    "products": (small_conv, (512, 1, 28, 28), None, lambda a: a.T @ torch.ones(a.samples, 10)),
}


def measure(name: str, budget: int) -> dict[str, Any]:
    """Bytes above the level after a warm-up on two samples, of the operator and what it gives."""
    torch.manual_seed(0)
    model, shape, wrt, ask = CALLS[name]
    f, x = model(), torch.randn(shape)
    ask(batchjac.operator(f, x[:2], wrt=wrt))
    before = level()
    found = ask(batchjac.operator(f, x, wrt=wrt, max_memory=budget))
    return {"peak": status("VmHWM") - before, "result": found.nbytes,
            "rows": len(x) * 10 * sum(p.numel() for p in f.parameters()) * 4}  # fmt: skip


if __name__ == "__main__":
    main(measure)
