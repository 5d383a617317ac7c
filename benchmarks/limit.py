"""The attainable limit: the fewest multiply-adds at the best rate, and writing the result.

A rough bound, as the footnote of the first measurements has it: no time for activations, masks,
normalisation or memory between layers, and no credit for zeros that could be skipped.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def stages(model: nn.Module) -> list[nn.Module]:
    """The layers through which everything passes, one after the other."""
    if type(model) is not nn.Sequential:
        return [model]
    return [stage for child in model for stage in stages(child)]


def costs(model: nn.Module, x: Tensor) -> list[tuple[int, int, int, bool]]:
    """Of each stage for one sample: width in, width out, multiply-adds, whether one ``Linear``."""
    found = []
    x = x[:1].detach().requires_grad_()  # no inference-only kernels, which hide their products
    for stage in stages(model):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            y = stage(x)
        macs = counter.get_total_flops() // 2
        found.append((x.numel(), y.numel(), macs, isinstance(stage, nn.Linear)))
        x = y
    return found


def fewest(chain: list[tuple[int, int, int, bool]]) -> int:
    """Multiply-adds for one sample's Jacobian of a chain of stages, by the best order.

    ``best(j, i)`` over stages ``i..j``: one stage costs nothing if it is one ``Linear``, else
    ``min(n, m) E``; or rows are pushed down, columns up, or two Jacobians joined.

    Source: Naumann, matrix-free Jacobian chaining, arXiv 2003.05755 and 2406.11862.
    """
    count = len(chain)
    total = [0]
    for _, _, macs, _ in chain:
        total.append(total[-1] + macs)

    best: dict[tuple[int, int], int] = {}
    for length in range(1, count + 1):
        for i in range(count - length + 1):
            j = i + length - 1
            n, m = chain[i][0], chain[j][1]
            whole = total[j + 1] - total[i]
            options = [0 if length == 1 and chain[i][3] else min(n, m) * whole]
            for k in range(i, j):
                cut = chain[k][1]
                upper, lower = best[k + 1, j], best[i, k]
                options += [
                    upper + lower + m * cut * n,
                    upper + m * (total[k + 1] - total[i]),
                    lower + n * (total[j + 1] - total[k + 1]),
                ]
            best[i, j] = min(options)
    return best[0, count - 1]


def work(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Multiply-adds and bytes of the best plan for this batch, its forward included."""
    chain = costs(model, x)
    forward = sum(macs for _, _, macs, _ in chain)
    width = chain[-1][1]
    return {
        "multiply_adds": len(x) * (forward + fewest(chain)),
        "forward_multiply_adds": len(x) * forward,
        "result_bytes": x.numel() * width * x.element_size(),
    }


def _seconds(call: Callable[[], Any], device: str) -> float:
    """The best of a few calls; a rate is a bound."""
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def rates(device: str = "cpu", size: int = 1536, mebibytes: int = 128) -> dict[str, float]:
    """Multiply-adds a second of two matrix products, and bytes a second of refilling memory."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    out = torch.empty_like(a)
    found = {"mm": size**3 / _seconds(partial(torch.mm, a, b, out=out), device)}
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is not None and device == "cpu" and torch.backends.mkldnn.is_available():
        product = partial(linear, a, b, None, "none", [], "")
        found["onednn linear"] = size**3 / _seconds(product, device)
    memory = torch.empty(mebibytes << 18, device=device)
    found["write"] = memory.nbytes / _seconds(partial(memory.fill_, 1.0), device)
    return found


def seconds(need: dict[str, int], rate: dict[str, float]) -> float:
    """The least this batch can take at these rates."""
    product = max(v for k, v in rate.items() if k != "write")
    return need["multiply_adds"] / product + need["result_bytes"] / rate["write"]
