"""Which kernel computes a product: chosen by measuring, once in a process.

oneDNN's linear layer multiplies float32 matrices up to twice as fast as ``torch.mm`` on CPUs that
MKL does not know, and no faster on others. The operator is private to torch, so it is looked for,
checked against ``torch.mm`` and timed before it is trusted.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

# Below this many multiply-adds a call costs more than its arithmetic.
_SMALL = 1 << 16
# oneDNN must win by this much on the trial: noise alone must not choose it.
_MARGIN = 0.9
_TRIAL = (512, 256, 256)

Linear = Callable[[Tensor, Tensor], Tensor]


def linear(g: Tensor, w: Tensor) -> Tensor:
    """``g[..., o] w[i, o]`` summed over ``o``: all rows through one matrix."""
    if _plain(g) and _plain(w) and g.numel() * w.shape[0] >= _SMALL:
        flat = g.reshape(-1, g.shape[-1])
        return fastest()(flat, w).view(*g.shape[:-1], w.shape[0])
    return torch.matmul(g, w.t())


def _plain(tensor: Tensor) -> bool:
    """A float32 matrix in CPU memory without a history, under no transform."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and torch._C._functorch.peek_interpreter_stack() is None
    )


@functools.cache
def fastest() -> Linear:
    """oneDNN's linear where it is present, right and faster than ``torch.mm``, else that."""
    onednn = _onednn()
    if onednn is None:
        return _mm
    m, k, n = _TRIAL
    generator = torch.Generator().manual_seed(0)
    g, w = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    try:
        right = torch.allclose(onednn(g, w), _mm(g, w), atol=1e-3)
    except (RuntimeError, TypeError):  # another signature, another build
        return _mm
    faster = _seconds(onednn, g, w) < _MARGIN * _seconds(_mm, g, w)
    return onednn if right and faster else _mm


def _mm(g: Tensor, w: Tensor) -> Tensor:
    return torch.mm(g, w.t())


def _onednn() -> Linear | None:
    if not torch.backends.mkldnn.is_available():
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None:
        return None

    def onednn(g: Tensor, w: Tensor) -> Tensor:
        product: Tensor = operator(g, w, None, "none", [], "")
        return product

    return onednn


def _seconds(kernel: Linear, g: Tensor, w: Tensor) -> float:
    """The shortest of a few runs, which interference only lengthens."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        kernel(g, w)
        times.append(time.perf_counter() - start)
    return min(times)
