"""Which kernel computes a product: chosen by measuring, once a day on each machine.

oneDNN's linear layer multiplies float32 matrices up to twice as fast as ``torch.mm`` on CPUs that
MKL does not know, and no faster on others. The operator is private to torch, so it is looked for,
checked against ``torch.mm`` and timed before it is trusted. So is our own product of a batch of
matrices beside ``torch.bmm``, which it beats two- to threefold on such CPUs.

What was chosen is kept on disk (``calibration``). A process that finds a choice there does not
measure again, but it still compares what was chosen with torch's own kernel on random numbers.
``convolutions`` does the same for convolutions.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from batchjac import native
from batchjac.calibration import note, recalled
from batchjac.opaque import opaque
from batchjac.ordinary import single, unrecorded
from batchjac.plain import unrounded
from batchjac.product import recorded

# Below this many multiply-adds a call costs more than its arithmetic.
SMALL = 1 << 16
# Below this many a product with a history is left to autograd, whose own node costs less.
LARGE = 1 << 22
# oneDNN must win by this much on the trial: noise alone must not choose it.
MARGIN = 0.9
_TRIAL = (512, 256, 256)
_CHECK = (24, 40, 32)  # of the same to see only whether it is right
_BATCHED_TRIAL, _BATCHED_CHECK = (32, 96, 24, 80), (3, 19, 7, 80)

Linear = Callable[[Tensor, Tensor], Tensor]


def linear(g: Tensor, w: Tensor) -> Tensor:
    """``g[..., o] w[i, o]`` summed over ``o``: all rows through one matrix."""
    if g.dim() > 2 and not g.is_contiguous() and g.transpose(0, 1).is_contiguous():
        return linear(g.transpose(0, 1), w).transpose(0, 1)  # samples first, without a copy
    work = g.numel() * w.shape[0]
    real = not isinstance(g, FakeTensor)
    if real and torch.is_grad_enabled() and work >= LARGE and single(g) and single(w):
        return recorded(_multiply, g.reshape(-1, g.shape[-1]), w).view(*g.shape[:-1], w.shape[0])
    if unrecorded(g) and unrecorded(w) and work >= SMALL:
        flat = g.reshape(-1, g.shape[-1])
        kernel = fastest()
        if kernel is not _mm and isinstance(g, FakeTensor):
            kernel = opaque("linear(Tensor g, Tensor w) -> Tensor", _fastest_product, _rows_by_rows)
        return kernel(flat, w).view(*g.shape[:-1], w.shape[0])
    return torch.matmul(g, w.t())


def _multiply(g: Tensor, w: Tensor) -> Tensor:
    """The same of matrices, wherever a derivative of it is computed: under a transform too."""
    return fastest()(g, w) if single(g) and single(w) else torch.matmul(g, w.t())


@functools.cache
@unrounded()
def fastest() -> Linear:
    """oneDNN's linear where it is present, right and faster than ``torch.mm``, else that."""
    onednn = _onednn()
    if onednn is None or not _right(onednn):
        note(_LINEAR, LINEAR[False])
        return _mm
    known = chosen_linear()
    if known is None:
        theirs, usual = seconds((onednn, _mm), *_matrices(_TRIAL))
        known = LINEAR[theirs < MARGIN * usual]
        note(_LINEAR, known)
    return onednn if known == LINEAR[True] else _mm


LINEAR = ("torch.mm", "oneDNN linear")
_LINEAR = "linear"


def chosen_linear() -> str | None:
    """Which of ``LINEAR`` large matrix products use; None where that was not measured yet."""
    known = recalled(_LINEAR)
    return known if known in LINEAR else None


def _matrices(sizes: tuple[int, int, int]) -> list[Tensor]:
    m, k, n = sizes
    return [_random((size, k)) for size in (m, n)]


def _right(linear: Linear) -> bool:
    """Whether it computes what ``torch.mm`` does, with the signature that we know."""
    g, w = _matrices(_CHECK)
    try:
        return torch.allclose(linear(g, w), _mm(g, w), atol=1e-3)
    except (RuntimeError, TypeError):  # another signature, another build
        return False


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


def seconds(kernels: Sequence[Callable[..., Tensor]], *arguments: object) -> list[float]:
    """For each kernel the shortest of a few runs in turns: interference only lengthens a run."""
    least = [math.inf] * len(kernels)
    for _ in range(7):
        for k, kernel in enumerate(kernels):
            start = time.perf_counter()
            kernel(*arguments)
            least[k] = min(least[k], time.perf_counter() - start)
    return least


def _fastest_product(g: Tensor, w: Tensor) -> Tensor:
    return fastest()(g, w)


def _rows_by_rows(g: Tensor, w: Tensor) -> Tensor:
    return g.new_empty(g.shape[0], w.shape[0])


Batched = Callable[..., Tensor]


def batched(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a[n,i,k] b[n,k,j]`` for each ``n``."""
    real = not isinstance(a, FakeTensor) and not isinstance(b, FakeTensor)
    if real and unrecorded(a) and unrecorded(b) and math.prod(a.shape) * b.shape[2] >= SMALL:
        right = b if b.stride(2) == 1 else b.contiguous()
        if native.multiplies(a, right) and (out is None or out.stride(2) == 1):
            return fastest_batched()(a, right, out=out)
    return torch.bmm(a, b, out=out)


@functools.cache
@unrounded()
def fastest_batched() -> Batched:
    """Our own product where it is right and faster than ``torch.bmm``, else that."""
    shapes = [((n, i, k), (n, k, j)) for n, i, k, j in (_BATCHED_CHECK, _BATCHED_TRIAL)]
    check, trial = ([_random(left), _random(right)] for left, right in shapes)
    right = torch.allclose(native.product(*check), torch.bmm(*check), atol=1e-4)
    known = recalled(_BATCHED)
    if right and known not in BATCHED:
        ours, usual = seconds((native.product, torch.bmm), *trial)
        known = BATCHED[ours < MARGIN * usual]
        note(_BATCHED, known)
    return native.product if right and known == BATCHED[True] else torch.bmm


BATCHED = ("torch.bmm", "our own")
_BATCHED = "batched"


def chosen_batched() -> str | None:
    """Which of ``BATCHED`` products of many matrices use; None where that was not measured yet."""
    if native.library() is None:
        return BATCHED[False]
    known = recalled(_BATCHED)
    return known if known in BATCHED else None


def _random(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
