"""Seconds of a stage, from its shapes and from what this machine was measured to do.

    seconds = products / rate + convolutions / rate + bytes / bandwidth + calls * overhead

Nothing of the user's model runs here. Rates are measured once a day, on random numbers.
"""

import functools
import math
import mmap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchjac import kernels
from batchjac.calibration import remembered
from batchjac.graph import Meta, Step
from batchjac.kernels import Convolution
from batchjac.memory import BLOCK, VIEWS

# Which edge is which factor of ``nk,ko->no``; another edge is added to the product.
_FACTORS = {
    "MmBackward0": (0, 1), "BmmBackward0": (0, 1), "AddmmBackward0": (1, 2),
    "BaddbmmBackward0": (1, 2), "AddbmmBackward0": (1, 2),
}  # fmt: skip
_CONVOLUTIONS = ("ConvolutionBackward0", "MkldnnConvolutionBackward0", "CudnnConvolutionBackward0")
_ATTENTION = "ScaledDotProduct"
# Nodes whose Jacobian depends on no sample: rows that all samples share stay so.
_CONSTANT = frozenset({
    "AddBackward0", "SubBackward0", "NegBackward0", "SumBackward0", "SumBackward1",
    "MeanBackward0", "MeanBackward1", "CatBackward0", "StackBackward0", "ConstantPadNdBackward0",
    "AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0", "CloneBackward0", "ToCopyBackward0",
    "RepeatBackward0",
})  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second; ``call`` is the seconds that one node takes at least."""

    product: float  # multiply-adds of a large matrix product
    small: float  # of a small one
    batched: float  # of a product of two matrices for each sample
    convolution: float  # toward the output
    transposed: float  # toward the input
    thin: float  # a convolution of few channels, either way
    cached: float  # bytes read and written, entry by entry, in memory that is used again
    fresh: float  # bytes written to new memory
    call: float


@dataclass(frozen=True)
class Work:
    """What one row of one sample costs, and how many nodes are called for all of them."""

    products: float = 0.0
    convolutions: float = 0.0  # multiply-adds at the rate of many channels
    thin: float = 0.0  # and at that of few
    bytes: float = 0.0
    calls: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.convolutions + other.convolutions,
            self.thin + other.thin,
            self.bytes + other.bytes,
            self.calls + other.calls,
        )


_FEW, _MANY = 4, 32  # channels
_SMALL = 1 << 19  # multiply-adds of a call below which the rate of small products holds


def seconds(work: Work, rows: int, samples: int, rates: Rates, up: bool = False) -> float:
    """The time of ``rows`` through these nodes for so many samples, in chunks for the cache."""
    times = rows * samples
    largest = times * work.products / max(1, work.calls)
    products = rates.small if largest < _SMALL else rates.product
    convolutions = rates.convolution if up else rates.transposed
    block = times * work.bytes / max(1, 2 * work.calls)  # a node reads one and writes one
    chunks = max(1, math.ceil(block / BLOCK))
    return (
        times * work.products / products
        + times * work.convolutions / convolutions
        + times * work.thin / rates.thin
        + times * work.bytes / rates.cached
        + chunks * work.calls * rates.call
    )


def joined(
    rows: int, inner: int, columns: int, samples: int, shared: int, itemsize: int, rates: Rates
) -> float:
    """The time of ``[rows, inner] [inner, columns]`` for each sample; ``shared`` factors are not.

    With one factor that all samples share it is one product; with two, of one sample alone.
    """
    each = rows * inner * columns * (1 if shared == 2 else samples)
    rate = rates.batched if shared == 0 else rates.product
    written = rows * columns * (1 if shared == 2 else samples) * itemsize
    found = rates.small if each < _SMALL else rate
    return float(each / found + written / rates.cached + rates.call)


def work(steps: Iterable[Step], samples: int) -> Work:
    """What these nodes do for one row of one sample, in either direction."""
    total = Work()
    for step in steps:
        edges = [e for e in step.edges if e is not None]
        if not edges:
            continue
        moved = 0
        if not VIEWS.fullmatch(step.name):
            moved = sum(map(_bytes, step.outputs)) + sum(_bytes(e.meta) for e in edges)
        many, few = _convolutions(step)
        total += Work(_products(step) / samples, many / samples, few / samples, moved / samples, 1)
    return total


def constant(step: Step) -> bool:
    """Whether the node's Jacobian is the same for all samples, so that shared rows stay shared."""
    if VIEWS.fullmatch(step.name) or step.name in _CONSTANT or step.name in _CONVOLUTIONS:
        return True
    factors = _FACTORS.get(step.name)
    wanted = [k for k, e in enumerate(step.edges) if e is not None]
    # toward the left factor the right one is what remains, a weight where it has no samples
    return factors is not None and step.name[:2] in ("Mm", "Ad") and wanted == [factors[0]]


def _bytes(meta: Meta) -> int:
    return math.prod(meta.shape) * meta.dtype.itemsize


def _products(step: Step) -> int:
    """Multiply-adds for one row: of a matrix product toward each wanted factor, of attention."""
    if step.name.startswith(_ATTENTION):
        # scores, and the values they weigh, forth and back
        return 4 * math.prod(step.shape) * step.shape[-2]
    total = 0
    for side, k in enumerate(_FACTORS.get(step.name, ())):
        edge = step.wanted(k)
        if edge is not None:
            total += math.prod(edge.shape) * step.shape[-1 if side == 0 else -2]
    return total


def _convolutions(step: Step) -> tuple[float, float]:
    """Multiply-adds for one row, at the rates of many and of few channels.

    Every entry of one side meets the weights of its channel. Between few and many the time for one
    is taken to change with the logarithm of the smaller number of channels.
    """
    if step.name not in _CONVOLUTIONS or not step.has("weight") or step.edges[0] is None:
        return 0.0, 0.0
    weight = [int(k) for k in step.saved("weight").shape]
    transposed = step.has("transposed") and step.saved("transposed")
    side = step.edges[0].shape if transposed else step.shape
    total = math.prod(side) * math.prod(weight[1:])
    groups = int(step.saved("groups")) if step.has("groups") else 1
    channels = min(max(min(weight[0] // groups, weight[1]), _FEW), _MANY)
    few = math.log(_MANY / channels) / math.log(_MANY / _FEW)
    return (1 - few) * total, few * total


# Orders of magnitude, to see what is too small for a plan without measuring anything.
NOMINAL = Rates(1e11, 2e10, 3e10, 1e11, 5e10, 1e10, 1e10, 4e9, 1e-5)


@functools.cache
def rates(threads: int, convolutions: bool = True) -> Rates:
    """What this machine does with so many threads, measured on small random tensors, 0.1 s.

    That is done once a day; other processes read what was found (``calibration``).
    Without ``convolutions`` theirs are not measured: each kind of kernel that torch has never run
    takes some MiB of the process.
    """
    assert threads == torch.get_num_threads()
    with torch.no_grad():
        figures = remembered("products", _products_rates)
        if convolutions:
            figures |= remembered("convolutions", _convolution_rates)
        return replace(NOMINAL, call=1 / figures.pop("calls"), **figures)


def _numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _products_rates() -> dict[str, float]:
    g, w, s = _numbers(512, 512), _numbers(512, 512), _numbers(64, 64)
    a, b = _numbers(8, 256, 32), _numbers(8, 32, 256)
    x, y = _numbers(1 << 19), _numbers(1 << 19)
    return {
        "product": g.numel() * len(w) / _best(lambda: kernels.linear(g, w)),
        "small": s.numel() * len(s) / _best(lambda: kernels.linear(s, s)),
        "batched": a.numel() * b.shape[2] / _best(lambda: torch.bmm(a, b)),
        "cached": 3 * x.nbytes / _best(lambda: torch.mul(x, y)),
        "fresh": _FRESH / _best(_touch),
        # a node is several operations and as much Python beside them
        "calls": 1 / (8 * _best(lambda: torch.mul(s[:2], s[:2]))),
    }


def _convolution_rates() -> dict[str, float]:
    layer = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)

    def rate(channels: int, size: int, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
        images, taps = _numbers(4, channels, size, size), _numbers(channels, channels, 3, 3)
        return images.numel() * taps[0].numel() / _best(lambda: kernel(images, taps))

    def down(g: Tensor, w: Tensor) -> Tensor:
        return kernels.posed(g, w, list(g.shape), layer)

    def up(x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w, padding=1)

    return {
        "convolution": rate(_MANY, 24, up),
        "transposed": rate(_MANY, 24, down),
        "thin": rate(_FEW, 32, down),
    }


_RUNS, _MOMENT = 15, 0.01  # seconds
_FRESH = 4 << 20  # bytes; all that is measured must be small beside any budget


def _touch() -> None:
    """Write to pages that the process did not have before."""
    with mmap.mmap(-1, _FRESH) as pages:
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
