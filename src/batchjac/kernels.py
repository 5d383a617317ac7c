"""Which kernel computes a product: chosen by measuring, once a day on each machine.

oneDNN's linear layer multiplies float32 matrices up to twice as fast as ``torch.mm`` on CPUs that
MKL does not know, and no faster on others. The operator is private to torch, so it is looked for,
checked against ``torch.mm`` and timed before it is trusted.

Of the kernels for a convolution toward its input the fastest differs from layer to layer, by up to
six times: the operator that autograd calls, the same product posed as a convolution of its own,
that with the channels last in memory, and a matrix product for each image with ``col2im``.

What was chosen is kept on disk (``calibration``). A process that finds a choice there does not
measure again, but it still compares what was chosen with autograd's own kernel on random numbers.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from batchjac.calibration import note, recalled
from batchjac.ordinary import measured, single, unrecorded
from batchjac.plain import unrounded
from batchjac.product import recorded

# Below this many multiply-adds a call costs more than its arithmetic.
SMALL = 1 << 16
# Below this many a product with a history is left to autograd, whose own node costs less.
LARGE = 1 << 22
# oneDNN must win by this much on the trial: noise alone must not choose it.
_MARGIN = 0.9
_TRIAL = (512, 256, 256)
_CHECK = (24, 40, 32)  # of the same to see only whether it is right
# Bytes of cotangents that convolutions are timed on; smaller questions than the last are not worth
# the trial, which costs a dozen times the convolution itself.
_TRIAL_BYTES = 1 << 20
_SMALL_CONVOLUTION = 1 << 20  # multiply-adds

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
            kernel = _opaque("linear")
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
        theirs, usual = _seconds((onednn, _mm), *_matrices(_TRIAL))
        known = LINEAR[theirs < _MARGIN * usual]
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
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, k, generator=generator, dtype=torch.float32, device="cpu") for s in (m, n)
    ]


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
    if not (measured(g) and measured(w)) or _little(g.shape, w.shape):
        return backward(g, w, sizes, layer)
    last = not g.is_contiguous() and g.movedim(1, -1).is_contiguous()
    kernel = _fastest_convolution(
        *_trial(layer, g.shape, w.shape, sizes, g.dtype), torch.get_num_threads(), last, onward
    )
    return kernel(g, w, sizes, layer)


def _little(shape: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether the trial would cost more than it can gain."""
    return math.prod(shape) * math.prod(weight[1:]) < _SMALL_CONVOLUTION


def _trial(
    layer: Convolution,
    shape: Sequence[int],
    weight: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Convolution, tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype]:
    """The question that is measured for this one: so many images as cotangents fit a trial."""
    most = max(1, _TRIAL_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
    images = 1 << min(shape[0], most).bit_length() - 1  # few different trials for one layer
    return layer, (images, *shape[1:]), tuple(weight), (images, *sizes[1:]), dtype


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
    trial = (layer, shape, weight, sizes, dtype)
    question = _question(*trial, last, onward)
    others = _candidates(layer, len(shape), onward)
    known = recalled(question)
    if known == "backward":
        return backward
    if known in others and _agreeing([others[known]], layer, (1, *shape[1:]), weight,
                                     (1, *sizes[1:]), dtype, last):  # fmt: skip
        return others[known]
    right = [*reversed(_agreeing(list(others.values()), *trial, last)), backward]
    names = {kernel: name for name, kernel in others.items()}
    best, least = right[0], math.inf
    times = _seconds(right, *_images(shape, weight, dtype, last), sizes, layer)
    for kernel, seconds in zip(right, times, strict=True):
        if seconds < _MARGIN * least:
            best, least = kernel, seconds
    note(question, names.get(best, "backward"))
    return best


def _question(
    layer: Convolution,
    shape: Sequence[int],
    weight: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    last: bool,
    onward: bool,
) -> str:
    return f"{layer} {shape} {weight} {sizes} {dtype} {last} {onward}"


def _candidates(layer: Convolution, dims: int, onward: bool) -> dict[str, TowardInput]:
    """What can be tried beside the operator, by name."""
    found: dict[str, TowardInput] = {"columns": columns} if _has_columns(layer, dims) else {}
    found["posed"] = posed
    if dims != 5:  # three axes have a layout of their own, which oneDNN does not gain from
        name, kernel = (
            ("channels_last", channels_last) if onward
            else ("channels_last_within", channels_last_within)
        )  # fmt: skip
        found[name] = kernel
    return found


def _images(
    shape: Sequence[int], weight: Sequence[int], dtype: torch.dtype, last: bool
) -> tuple[Tensor, Tensor]:
    """Random cotangents and taps."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    if last:
        g = g.movedim(1, -1).contiguous().movedim(-1, 1)
    return g, torch.randn(weight, generator=generator, dtype=dtype, device="cpu")


def _agreeing(
    others: Sequence[TowardInput],
    layer: Convolution,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    last: bool,
) -> list[TowardInput]:
    """Those that give what autograd's own gives."""
    g, w = _images(shape, weight, dtype, last)
    expected = backward(g, w, sizes, layer)
    near = 1e-5 * math.sqrt(math.prod(weight))
    right = []
    for other in others:
        try:
            found = other(g, w, sizes, layer)
        except RuntimeError:  # sizes that the kernel does not take
            continue
        if found.shape == expected.shape and torch.allclose(found, expected, 1e-4, near):
            right.append(other)
    return right


def chosen_convolution(
    layer: Convolution,
    shape: Sequence[int],
    weight: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    onward: bool,
) -> list[str]:
    """The names of the kernels for cotangents of this shape, one for each order of channels.

    Empty where that was not measured yet; ``backward`` where it is too small to be.
    """
    if _little(shape, weight):
        return ["backward"]
    trial = _trial(layer, shape, weight, sizes, dtype)
    names = {"backward", *_candidates(layer, len(shape), onward)}  # a file may hold any
    known = [recalled(_question(*trial, last, onward)) for last in (False, True)]
    return list(dict.fromkeys(k for k in known if k in names))


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
    where = _opaque("columns") if isinstance(g, FakeTensor) else _columns
    found: Tensor = where(g, w, sizes, layer.stride, layer.padding)
    return found


def _has_columns(layer: Convolution, dims: int) -> bool:
    still = not layer.transposed and layer.groups == 1 and set(layer.dilation) == {1}
    return still and dims in (3, 4)


@functools.cache
def _operators() -> torch.library.Library:
    """Kernels that compilers may not look into, as operators that they call; made when one does.

    ``_slow_conv2d_backward`` says nothing of its result's shape; oneDNN's linear is lowered for
    weights that are constants.
    """
    made = torch.library.Library("batchjac", "FRAGMENT")
    made.define("linear(Tensor g, Tensor w) -> Tensor")
    made.define("columns(Tensor g, Tensor w, int[] sizes, int[] s, int[] pad) -> Tensor")
    made.impl("linear", lambda g, w: fastest()(g, w), "CPU")
    made.impl("linear", lambda g, w: g.new_empty(g.shape[0], w.shape[0]), "Meta")
    made.impl("columns", _columns, "CPU")
    made.impl("columns", lambda g, w, sizes, s, pad: g.new_empty(sizes), "Meta")
    return made


def _opaque(name: str) -> Callable[..., Tensor]:
    _operators()
    found: Callable[..., Tensor] = getattr(torch.ops.batchjac, name)
    return found


def _columns(
    g: Tensor, w: Tensor, sizes: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    like = g.new_zeros(1).expand(*sizes)
    found: Tensor = torch.ops.aten._slow_conv2d_backward.output_mask(
        g, like, w, w.shape[2:], stride, padding, [True, False, False]
    )[0]
    return found
