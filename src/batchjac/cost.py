"""Seconds of a stage, from its shapes and from what this machine was measured to do.

    seconds = sum over kinds of work: amount / rate + calls * overhead

The kinds are those of ``Work``: each has a rate of its own in ``Rates``, measured once a day on
random numbers. Nothing of the user's model runs here. ``python -m benchmarks.prediction`` compares
what comes out with what is measured.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from batchjac import speed
from batchjac.calibration import remembered
from batchjac.graph import Meta, Slot, Step
from batchjac.memory import BLOCK, VIEWS
from batchjac.plain import unrounded

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


# Passes over what flows through a node, where one read and one write are not all. A norm's backward
# sums each row twice, then reads it again; softmax multiplies, sums, subtracts and multiplies.
# Source: counted in rules/norm.py and rules/softmax.py.
_PASSES = {
    "NativeLayerNormBackward0": 5, "NativeGroupNormBackward0": 5, "SoftmaxBackward0": 3,
    "LogSoftmaxBackward0": 3,
}  # fmt: skip
# An entry-wise node makes its factor from what was saved, in every walk, and then multiplies.
_OWN_FACTOR = 2
# Calls of torch of a node, in those of a view or a product of two tensors, 25 us each. Source:
# timed node by node on blocks of a few KB, one thread: 80 to 150 us for matrix products and splits,
# 110 to 210 for pooling, 60 to 100 for norms, 8 for a sum, and 30 operations in
# rules/attention.py.
_CALLS = {
    "AddBackward": 0, "Mm": 4, "Addmm": 4, "Bmm": 4, "Baddbmm": 4, "Addbmm": 4,
    "Convolution": 4, "Split": 4, "UnsafeSplit": 4, "Unbind": 4, "MaxPool": 4,
    "NativeLayerNorm": 3, "NativeGroupNorm": 3, "NativeBatchNorm": 3, "ScaledDotProduct": 30,
}  # fmt: skip
# Views of the forward whose transpose writes zeros around, or several pieces into one.
_FILLING = (
    "SelectBackward", "SliceBackward", "Split", "UnsafeSplit", "Unbind", "Chunk", "Diagonal",
    "AsStrided", "Unfold",
)  # fmt: skip
# What leaves rows in another order in memory than that of their axes, and what then copies them.
_TURNS = ("TransposeBackward", "PermuteBackward", "TBackward")
_JOINS = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "CloneBackward")
_POOLS = ("MaxPool", "AdaptiveMaxPool", "FractionalMaxPool")
# Scores are written, shifted and scaled in place, and read by two products: six passes. What
# comes is put in order and multiplied by the output; three products come out.
# Source: rules/attention.py, ``_change`` and ``_products``.
_SCORE_PASSES, _HEAD_PASSES = 6, 6


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second; ``call`` is the seconds that one node takes at least."""

    product: float  # multiply-adds of a matrix product; a small one takes its calls' time
    batched: float  # of a product of two matrices for each sample
    heads: float  # of narrow matrices for each head of each sample
    convolution: float  # toward the output
    transposed: float  # toward the input
    thin: float  # a convolution of one channel, either way
    cached: float  # bytes read and written, entry by entry, in memory that is used again
    copied: float  # bytes read and written in another order of axes
    scattered: float  # entries put to places that are looked up, zeros around them included
    fresh: float  # bytes written to new memory
    call: float


@dataclass(frozen=True)
class Work:
    """What one row of one sample costs, and how many nodes are called for all of them."""

    products: float = 0.0
    convolutions: float = 0.0  # multiply-adds at the rate of many channels
    thin: float = 0.0  # and at that of few
    bytes: float = 0.0
    calls: int = 0  # of torch, for all rows and samples of a chunk
    heads: float = 0.0  # multiply-adds of attention
    filled: float = 0.0  # bytes that are written on the way down alone
    copied: float = 0.0  # bytes, into another order
    scattered: float = 0.0  # entries

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.convolutions + other.convolutions,
            self.thin + other.thin,
            self.bytes + other.bytes,
            self.calls + other.calls,
            self.heads + other.heads,
            self.filled + other.filled,
            self.copied + other.copied,
            self.scattered + other.scattered,
        )

    @property
    def multiply_adds(self) -> float:
        """Of all kinds."""
        return self.products + self.heads + self.convolutions + self.thin


# Channels of the narrower side. From about 24 on a convolution is as fast as it gets. Source: 15
# layers with 1 to 64 channels in, 1 thread, the fastest kernel of each in 1e9 multiply-adds a
# second: 1 channel 11, 2: 18, 3: 29, 6: 26, 16: 55 to 75, 32: 70 to 89, 64: 98.
_FEW, _MANY = 1, 24
# The share of ``cached`` that is left for blocks as large as a walk's may be. It is not measured on
# the machine, since that would take more memory than some are promised. Source: 24 to 32 GB/s for
# ReLU, tanh and batch norm on blocks of 12 to 16 MB, where two MB are multiplied at 75.
_LARGE = 0.4
# Bytes of the largest result that is written where an earlier one was freed: larger ones come as
# new pages every time. Source: mallopt(3), M_MMAP_THRESHOLD.
_REUSED = 32 << 20
# A call around its walk, in calls of a node: the graph is recorded, pruned, searched for cuts and
# proved to keep samples apart, memory is counted, rows are seeded. Source: tanh networks of 1 to 64
# layers of 16 on one thread, 1.2 ms and 65 us more for each of its 3 to 129 nodes where a node of
# the walk takes 17 us; GRU and encoder with 30 to 70 us for each of 425 and 78.
_ASKED, _ASKED_OF_NODE = 60, 1.3


# Calls of a join beside its product: both sides are graphs of their own, whose cut every path was
# proved to pass, and are looked at for what is not finite. Source: the deep network of the suite, 8
# ms more for 7 joins.
_JOINED = 40


def read(rates: Rates) -> float:
    """The time to take a linear layer's weight: that of calling it, its arithmetic aside."""
    return _CALLS["Mm"] * rates.call


def asked(nodes: int, rates: Rates) -> float:
    """The time of a call that is none of its walk's, for a graph of so many nodes."""
    return (_ASKED + _ASKED_OF_NODE * nodes) * rates.call


def written(size: int, rates: Rates) -> float:
    """The time to write a result of so many bytes: a small one goes where the last one was."""
    return size / (_LARGE * rates.cached if size <= _REUSED else rates.fresh)


def seconds(work: Work, rows: int, samples: int, rates: Rates, up: bool = False) -> float:
    """The time of ``rows`` through these nodes for so many samples, in chunks for the cache."""
    times = rows * samples
    convolutions = rates.convolution if up else rates.transposed
    moved = work.bytes if up else work.bytes + work.filled
    block = times * moved / max(1, 2 * work.calls)  # one read and one written, if in one call
    chunks = max(1, math.ceil(block / BLOCK))
    return (
        times * work.products / rates.product
        + times * work.heads / rates.heads
        + times * work.convolutions / convolutions
        + times * work.thin / rates.thin
        + times * moved * _byte(block / chunks, rates)
        + times * work.copied / rates.copied
        + times * work.scattered / rates.scattered
        + chunks * work.calls * rates.call
    )


def _byte(block: float, rates: Rates) -> float:
    """Seconds for a byte of blocks of this size, between those in the cache and large ones."""
    share = min(1.0, block / BLOCK)
    return (1 - share + share / _LARGE) / rates.cached


def joined(
    rows: int, inner: int, columns: int, samples: int, shared: int, itemsize: int, rates: Rates
) -> float:
    """The time of ``[rows, inner] [inner, columns]`` for each sample; ``shared`` factors are not.

    With one factor that all samples share it is one product; with two, of one sample alone.
    """
    each = rows * inner * columns * (1 if shared == 2 else samples)
    rate = rates.batched if shared == 0 else rates.product
    result = rows * columns * (1 if shared == 2 else samples) * itemsize
    return float(each / rate + result / rates.cached + _JOINED * rates.call)


def work(steps: Iterable[Step], samples: int) -> Work:
    """What these nodes do for one row of one sample, in either direction."""
    total = Work()
    turned: set[Slot] = set()  # whose rows come in another order in memory
    for step in steps:
        if any(step.edges):
            total += _of_node(step, samples, (step.node, 0) in turned)
            _turn(step, turned)
    return total


def _turn(step: Step, turned: set[Slot]) -> None:
    """Note whether the node's rows arrive in another order; those before it keep theirs."""
    keeps = (step.node, 0) in turned and not step.name.startswith(_JOINS)
    if step.name.startswith(_TURNS) or (keeps and VIEWS.fullmatch(step.name)):
        turned.update((e.node, e.slot) for e in step.edges if e is not None)


def _of_node(step: Step, samples: int, turned: bool) -> Work:
    """What one node does for one row of one of these samples."""
    moved = sum(map(_bytes, step.outputs)) + sum(_bytes(e.meta) for e in step.edges if e)
    filled = copied = heads = scattered = 0
    if step.name.startswith(_FILLING):
        moved, filled = 0, moved
    elif turned and step.name.startswith(_JOINS):
        moved, copied = 0, moved
    elif VIEWS.fullmatch(step.name):
        moved = 0
    elif step.name.startswith(_POOLS):
        # zeros are written and cotangents read, each with a place of eight bytes
        moved, scattered = moved + 8 * math.prod(step.shape), math.prod(step.shape)
    elif step.name.startswith(_ATTENTION):
        heads = _heads(step)
        scores = heads // 4 // step.shape[-1] * step.outputs[0].dtype.itemsize
        own = _bytes(step.outputs[0])
        moved, copied = _HEAD_PASSES * own + _SCORE_PASSES * scores, 2 * own
    elif not constant(step):
        moved *= _PASSES.get(step.name, 1 if step.name in _FACTORS else _OWN_FACTOR)
    many, few = _convolutions(step)
    return Work(
        products=_products(step) / samples,
        convolutions=many / samples,
        thin=few / samples,
        bytes=moved / samples,
        calls=_calls(step.name),
        heads=heads / samples,
        filled=filled / samples,
        copied=copied / samples,
        scattered=scattered / samples,
    )


@functools.cache
def _calls(name: str) -> int:
    return next((n for kind, n in _CALLS.items() if name.startswith(kind)), 1)


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
    """Multiply-adds of a matrix product for one row, toward each wanted factor."""
    total = 0
    for side, k in enumerate(_FACTORS.get(step.name, ())):
        edge = step.wanted(k)
        if edge is not None:
            total += math.prod(edge.shape) * step.shape[-1 if side == 0 else -2]
    return total


def _heads(step: Step) -> int:
    """Multiply-adds of attention for one row: scores, and the values they weigh, forth and back."""
    keys = step.saved("key").shape[-2] if step.has("key") else step.shape[-2]
    return 4 * math.prod(step.shape) * int(keys)


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
NOMINAL = Rates(
    product=1e11, batched=3e10, heads=2e10, convolution=1e11, transposed=5e10,
    thin=1e10, cached=3e10, copied=1e10, scattered=1e9, fresh=4e9, call=1e-5,
)  # fmt: skip


@functools.cache
@unrounded()
def rates(threads: int, convolutions: bool = True) -> Rates:
    """What this machine does with so many threads, measured on small random tensors, 0.1 s.

    That is done once a day; other processes read what was found (``calibration``).
    Without ``convolutions`` theirs are not measured: each kind of kernel that torch has never run
    takes some MiB of the process.
    """
    assert threads == torch.get_num_threads()
    with torch.no_grad():
        figures = remembered("products", speed.products) | remembered("memory", speed.memory)
        if convolutions:
            figures |= remembered("convolutions", speed.convolutions)
        return replace(NOMINAL, call=1 / figures.pop("calls"), **figures)
