"""What this machine does in a second, on small random numbers: 0.1 s, once a day (``calibration``).

All that is measured must be small beside any budget of memory.
"""

import math
import mmap
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from batchjac import kernels, native
from batchjac.convolutions import Convolution, channels_last_within, columns, own, posed

_RUNS, _MOMENT = 15, 0.01  # seconds
_FRESH = 4 << 20  # bytes


def _numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def products() -> dict[str, float]:
    """Multiply-adds a second of matrix products, and calls of a node a second."""
    g, w, s = _numbers(512, 512), _numbers(512, 512), _numbers(2, 64)
    a, b = _numbers(8, 256, 32), _numbers(8, 32, 256)
    q, k = _numbers(128, 160, 16), _numbers(128, 16, 32)  # 5 rows of 32 queries, 32 keys
    return {
        "product": g.numel() * len(w) / _best(lambda: kernels.linear(g, w)),
        "batched": a.numel() * b.shape[2] / _best(lambda: kernels.batched(a, b)),
        "heads": q.numel() * k.shape[2] / _best(lambda: kernels.batched(q, k)),
        # a node is several operations and as much Python beside them
        "calls": 1 / (6.5 * _best(lambda: torch.mul(s[:2], s[:2]))),
    }


def memory() -> dict[str, float]:
    """Bytes and entries a second."""
    x, y = _numbers(1 << 19), _numbers(1 << 19)
    turned = _numbers(256, 32, 8, 16).permute(2, 1, 0, 3)  # rows before heads of 16
    pooled, places = _numbers(4, 64, 196), 4 * torch.arange(196, device="cpu").expand(4, 64, 196)
    return {
        "cached": 2 * x.nbytes / _best(lambda: torch.mul(x, y)),  # as a block: y is the node's own
        "copied": 2 * turned.nbytes / _best(turned.contiguous),
        "scattered": pooled.numel()
        / _best(lambda: pooled.new_zeros(4, 64, 784).scatter_(-1, places, pooled)),
        "fresh": _FRESH / _best(_touch),
    }


def convolutions() -> dict[str, float]:
    """Multiply-adds a second of convolutions, both ways."""
    layer = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    images, taps = _numbers(4, 32, 24, 24), _numbers(32, 32, 3, 3)
    sizes, count = list(images.shape), images.numel() * taps[0].numel()
    # toward one channel, by whichever kernel is fastest, as ``convolutions`` would choose
    few, one = _numbers(16, 8, 24, 24), _numbers(8, 1, 3, 3)
    ours = [own] if native.library() else []
    toward = [posed, columns, channels_last_within, *ours]
    wide = min(_best(lambda k=k: k(images, taps, sizes, layer)) for k in (posed, *ours))  # type: ignore[misc]  # mypy does not infer lambdas with defaults
    thin = min(_best(lambda k=k: k(few, one, [16, 1, 24, 24], layer)) for k in toward)  # type: ignore[misc]  # mypy does not infer lambdas with defaults
    return {
        "convolution": count / _best(lambda: torch.conv2d(images, taps, padding=1)),
        "transposed": count / wide,
        "thin": few.numel() * one[0].numel() / thin,
    }


def _pages(size: int) -> mmap.mmap:
    """New memory of this process alone, as malloc gets it: shared pages are slower to map."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _touch() -> None:
    """Write to pages that the process did not have before."""
    with _pages(_FRESH) as pages:
        torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


def _best(run: Callable[[], object]) -> float:
    """The shortest of a few runs, as many as fit into a moment: interference only lengthens one."""
    run()
    least, until = math.inf, time.perf_counter() + _MOMENT
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        least = min(least, now - start)
        if now > until:
            break
    return max(least, 1e-9)
