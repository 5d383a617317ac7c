"""Which kernel computes a product: chosen by measuring, once in a process.

oneDNN's linear layer multiplies float32 matrices up to twice as fast as ``torch.mm`` on CPUs that
MKL does not know, and no faster on others. The operator is private to torch, so it is looked for,
checked against ``torch.mm`` and timed before it is trusted.

A convolution toward its input has four kernels, and which is fastest differs from layer to layer
by up to six times: the operator that autograd calls, the same product posed as a convolution of
its own, that with the channels last in memory, and a matrix product for each image with ``col2im``.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Below this many multiply-adds a call costs more than its arithmetic.
_SMALL = 1 << 16
# oneDNN must win by this much on the trial: noise alone must not choose it.
_MARGIN = 0.9
_TRIAL = (512, 256, 256)
# Bytes of cotangents that convolutions are timed on; smaller questions than the last are not worth
# the trial, which costs a dozen times the convolution itself.
_TRIAL_BYTES = 1 << 20
_SMALL_CONVOLUTION = 1 << 20  # multiply-adds

Linear = Callable[[Tensor, Tensor], Tensor]


def linear(g: Tensor, w: Tensor) -> Tensor:
    """``g[..., o] w[i, o]`` summed over ``o``: all rows through one matrix."""
    if _plain(g) and _plain(w) and g.numel() * w.shape[0] >= _SMALL:
        flat = g.reshape(-1, g.shape[-1])
        kernel = fastest()
        if kernel is not _mm and isinstance(g, FakeTensor):
            kernel = torch.ops.batchjac.linear
        return kernel(flat, w).view(*g.shape[:-1], w.shape[0])
    return torch.matmul(g, w.t())


def _plain(tensor: Tensor) -> bool:
    """A float32 matrix in CPU memory without a history, under no transform."""
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    return _measured(tensor) and tensor.dtype == torch.float32 and not recorded


def _measured(tensor: Tensor) -> bool:
    """Real numbers in CPU memory, under no transform: there the kernels differ much."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter, FakeTensor)
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.device.type == "cpu"
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
    g, w = (torch.randn(s, k, generator=generator, dtype=torch.float32) for s in (m, n))
    try:
        right = torch.allclose(onednn(g, w), _mm(g, w), atol=1e-3)
    except (RuntimeError, TypeError):  # another signature, another build
        return _mm
    theirs, usual = _seconds((onednn, _mm), g, w)
    return onednn if right and theirs < _MARGIN * usual else _mm


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


def _seconds(kernels: Sequence[Callable[..., Tensor]], *arguments: object) -> list[float]:
    """For each kernel the shortest of a few runs in turns: interference only lengthens a run."""
    least = [math.inf] * len(kernels)
    for _ in range(7):
        for k, kernel in enumerate(kernels):
            start = time.perf_counter()
            kernel(*arguments)
            least[k] = min(least[k], time.perf_counter() - start)
    return least


@dataclass(frozen=True)
class Convolution:
    """A layer without its tensors; one entry for each axis that its kernel moves along."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int


TowardInput = Callable[[Tensor, Tensor, Sequence[int], Convolution], Tensor]


def convolution(
    g: Tensor, w: Tensor, sizes: Sequence[int], layer: Convolution, onward: bool = False
) -> Tensor:
    """Cotangents ``g[n, o, q]`` of the layer's output, toward its input of these ``sizes``.

    ``onward``: what comes next takes any order of axes in memory, so that channels may stay last.
    """
    each = g[:1].numel() * w[:1].numel() if layer.transposed else g[:1].numel() * w[0].numel()
    if not (_measured(g) and _measured(w)) or len(g) * each < _SMALL_CONVOLUTION:
        return backward(g, w, sizes, layer)
    trial = min(len(g), max(1, _TRIAL_BYTES // g[:1].nbytes))
    trial = 1 << trial.bit_length() - 1  # few different trials for one layer
    shape = (trial, *g.shape[1:])
    last = not g.is_contiguous() and g.movedim(1, -1).is_contiguous()
    kernel = _fastest_convolution(
        layer, shape, tuple(w.shape), (trial, *sizes[1:]), g.dtype, torch.get_num_threads(),
        last, onward,
    )  # fmt: skip
    return kernel(g, w, sizes, layer)


@functools.cache
def _fastest_convolution(
    layer: Convolution,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    threads: int,
    last: bool,
    onward: bool,
) -> TowardInput:
    """Of the kernels that agree with autograd's own on random numbers, the fastest.

    The first unless another wins clearly. ``channels_last`` spares the next convolution the copy
    that this one may need; ``posed`` on more images than are tried gains on ``backward``, which
    makes room for an input that it does not read. ``last``: the channels come last in memory.
    """
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator, dtype=dtype)
    if last:
        g = g.movedim(1, -1).contiguous().movedim(-1, 1)
    w = torch.randn(weight, generator=generator, dtype=dtype)
    expected = backward(g, w, sizes, layer)
    near = 1e-5 * math.sqrt(math.prod(weight))
    right = [backward]
    for other in (columns, posed, channels_last if onward else channels_last_within):
        if other is columns and not _has_columns(layer, g):
            continue
        if g.dim() == 5 and other in (channels_last, channels_last_within):
            continue  # three axes have a layout of their own, which oneDNN does not gain from
        try:
            found = other(g, w, sizes, layer)
        except RuntimeError:  # sizes that the kernel does not take
            continue
        if found.shape == expected.shape and torch.allclose(found, expected, 1e-4, near):
            right.insert(0, other)
    best, least = right[0], math.inf
    for kernel, seconds in zip(right, _seconds(right, g, w, sizes, layer), strict=True):
        if seconds < _MARGIN * least:
            best, least = kernel, seconds
    return best


def backward(g: Tensor, w: Tensor, sizes: Sequence[int], layer: Convolution) -> Tensor:
    """The operator that autograd calls; of the input it reads the shape alone."""
    like = g.new_zeros(1).expand(*sizes)
    found: Tensor = torch.ops.aten.convolution_backward(
        g, like, w, None, layer.stride, layer.padding, layer.dilation, layer.transposed,
        layer.output_padding, layer.groups, [True, False, False],
    )[0]  # fmt: skip
    return found


def posed(g: Tensor, w: Tensor, sizes: Sequence[int], layer: Convolution) -> Tensor:
    """The adjoint of a convolution is a transposed one, and the reverse: no input to be read."""
    rest = [0] * len(layer.stride)
    if not layer.transposed:
        reached = [
            (q - 1) * s - 2 * p + d * (k - 1) + 1
            for q, s, p, d, k in zip(
                g.shape[2:], layer.stride, layer.padding, layer.dilation, w.shape[2:], strict=True
            )
        ]
        rest = [size - r for size, r in zip(sizes[2:], reached, strict=True)]
    return torch.convolution(
        g, w, None, layer.stride, layer.padding, layer.dilation, not layer.transposed, rest,
        layer.groups,
    )  # fmt: skip


def channels_last(g: Tensor, w: Tensor, sizes: Sequence[int], layer: Convolution) -> Tensor:
    """The same with the channels of every place side by side in memory, and left so."""
    if g.dim() == 3:
        flat = replace(
            layer, stride=(1, *layer.stride), padding=(0, *layer.padding),
            dilation=(1, *layer.dilation), output_padding=(0, *layer.output_padding),
        )  # fmt: skip
        wide = (*sizes[:2], 1, *sizes[2:])
        return channels_last(g.unsqueeze(2), w.unsqueeze(2), wide, flat).squeeze(2)
    laid = [t.contiguous(memory_format=torch.channels_last) for t in (g, w)]
    return posed(laid[0], laid[1], sizes, layer)


def channels_last_within(g: Tensor, w: Tensor, sizes: Sequence[int], layer: Convolution) -> Tensor:
    """The same, its result in the usual order."""
    return channels_last(g, w, sizes, layer).contiguous()


def columns(g: Tensor, w: Tensor, sizes: Sequence[int], layer: Convolution) -> Tensor:
    """``w^T g`` for each image, its taps added where they belong; best toward few channels."""
    if g.dim() == 3:
        flat = replace(layer, stride=(1, *layer.stride), padding=(0, *layer.padding))
        wide = (*sizes[:2], 1, *sizes[2:])
        return columns(g.unsqueeze(2), w.unsqueeze(2), wide, flat).squeeze(2)
    where = _columns if not isinstance(g, FakeTensor) else torch.ops.batchjac.columns
    found: Tensor = where(g, w, sizes, layer.stride, layer.padding)
    return found


def _has_columns(layer: Convolution, g: Tensor) -> bool:
    still = not layer.transposed and layer.groups == 1 and set(layer.dilation) == {1}
    return still and g.dim() in (3, 4)


# Kernels that compilers may not look into, as operators that they call. ``_slow_conv2d_backward``
# says nothing of its result's shape; oneDNN's linear is lowered for weights that are constants.
_operators = torch.library.Library("batchjac", "DEF")
_operators.define("linear(Tensor g, Tensor w) -> Tensor")
_operators.define("columns(Tensor g, Tensor w, int[] sizes, int[] s, int[] pad) -> Tensor")


@torch.library.impl(_operators, "linear", "CPU")
def _linear(g: Tensor, w: Tensor) -> Tensor:
    """The fastest linear layer."""
    return fastest()(g, w)


@torch.library.impl(_operators, "linear", "Meta")
def _linear_shape(g: Tensor, w: Tensor) -> Tensor:
    return g.new_empty(g.shape[0], w.shape[0])


@torch.library.impl(_operators, "columns", "CPU")
def _columns(
    g: Tensor, w: Tensor, sizes: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    like = g.new_zeros(1).expand(*sizes)
    found: Tensor = torch.ops.aten._slow_conv2d_backward.output_mask(
        g, like, w, w.shape[2:], stride, padding, [True, False, False]
    )[0]
    return found


@torch.library.impl(_operators, "columns", "Meta")
def _columns_shape(g: Tensor, w: Tensor, sizes: Sequence[int], *_: Sequence[int]) -> Tensor:
    return g.new_empty(sizes)
