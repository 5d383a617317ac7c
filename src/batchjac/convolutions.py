"""Which kernel convolves cotangents back: chosen by measuring, once a day on each machine.

Of the kernels for a convolution toward its input the fastest differs from layer to layer, by up to
six times: the operator that autograd calls, the same product posed as a convolution of its own,
that with the channels last in memory, a matrix product for each image with ``col2im``, and our own.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from batchjac import kernels, native
from batchjac.block import Scattered
from batchjac.calibration import note, recalled
from batchjac.opaque import opaque
from batchjac.ordinary import measured, unrecorded

# Bytes of cotangents that convolutions are timed on; smaller questions than the last are not worth
# the trial, which costs a dozen times the convolution itself.
_TRIAL_BYTES = 1 << 20
_SMALL_CONVOLUTION = 1 << 20  # multiply-adds
_MANY_ROWS = 16  # as many as fill a register of any processor


@dataclass(frozen=True)
class Convolution:
    """A layer without its tensors; one entry for each axis that its kernel moves along."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int


@dataclass(frozen=True)
class Around:
    """What stands around a convolution of cotangents.

    ``last``: the channels come last in memory. ``onward``: what comes next takes any order of axes,
    so that they may stay last. ``recorded``: the product must have a derivative.
    """

    last: bool = False
    onward: bool = False
    recorded: bool = False


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
    around = Around(last, onward, not (unrecorded(g) and unrecorded(w)))
    toward_input = _fastest_convolution(
        *_trial(layer, g.shape, w.shape, sizes, g.dtype), torch.get_num_threads(), around
    )
    return toward_input(g, w, sizes, layer)


def scattered(
    few: Tensor, index: Tensor, shape: Sequence[int], w: Tensor, sizes: Sequence[int],
    layer: Convolution,
) -> Tensor | None:  # fmt: skip
    """``convolution`` of planes ``[N, C, *plane]`` that are zero but for ``few [V, N, C, P]``.

    Rows ``[V, *sizes]``, by our own kernel, which puts them into its planes itself; None where
    another one is chosen.
    """
    rows, samples = few.shape[:2]
    images, into = (rows * samples, *shape[1:]), (rows * samples, *sizes[1:])
    if not (unrecorded(few) and unrecorded(w)) or _little(images, w.shape):
        return None
    trial = _trial(layer, images, w.shape, into, few.dtype)
    if _fastest_convolution(*trial, torch.get_num_threads(), Around()) is not own:
        return None
    found = native.toward_input(
        few, w, into, layer.stride, layer.padding, layer.dilation, index, shape[2:]
    )
    return None if found is None else found.view(rows, *sizes)


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
    around: Around,
) -> TowardInput:
    """Of the kernels that agree with autograd's own on random numbers, the fastest.

    The first unless another wins clearly. ``channels_last`` spares the next convolution the copy
    that this one may need; ``posed`` on more images than are tried gains on ``backward``, which
    makes room for an input that it does not read.
    """
    trial = (layer, shape, weight, sizes, dtype)
    question = _question(*trial, around)
    others = _candidates(layer, len(shape), dtype, around)
    known = recalled(question)
    if known == "backward":
        return backward
    if known in others and _agreeing([others[known]], layer, (1, *shape[1:]), weight,
                                     (1, *sizes[1:]), dtype, around.last):  # fmt: skip
        return others[known]
    right = [*reversed(_agreeing(list(others.values()), *trial, around.last)), backward]
    names = {kernel: name for name, kernel in others.items()}
    best, least = right[0], math.inf
    times = kernels.seconds(right, *_images(shape, weight, dtype, around.last), sizes, layer)
    for kernel, seconds in zip(right, times, strict=True):
        if seconds < kernels.MARGIN * least:
            best, least = kernel, seconds
    note(question, names.get(best, "backward"))
    return best


def _question(
    layer: Convolution,
    shape: Sequence[int],
    weight: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    around: Around,
) -> str:
    return f"{layer} {shape} {weight} {sizes} {dtype} {around}"


def _candidates(
    layer: Convolution, dims: int, dtype: torch.dtype, around: Around
) -> dict[str, TowardInput]:
    """What can be tried beside the operator, by name."""
    found: dict[str, TowardInput] = {"columns": columns} if _has_columns(layer, dims) else {}
    if not around.recorded and native.fits(layer.groups, layer.transposed, dims, dtype):
        found["own"] = own
    found["posed"] = posed
    if dims != 5:  # three axes have a layout of their own, which oneDNN does not gain from
        name, kernel = (
            ("channels_last", channels_last) if around.onward
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
    if own in right and not _agrees_on_places(layer, shape, weight, sizes, near):
        right.remove(own)
    return right


def _agrees_on_places(
    layer: Convolution, shape: tuple[int, ...], weight: tuple[int, ...], sizes: tuple[int, ...],
    near: float,
) -> bool:  # fmt: skip
    """Whether our kernel gives the same where planes hold few places, of few rows and of many."""
    generator = torch.Generator().manual_seed(1)
    w = _images(shape, weight, torch.float32, False)[1]
    plane, channels = math.prod(shape[2:]), shape[1]
    few = max(1, plane // 4)
    order = torch.rand(1, channels, plane, generator=generator, device="cpu").argsort(-1)
    index = order[..., :few].contiguous()
    for rows in (1, _MANY_ROWS):
        size = (rows, 1, channels, few)
        data = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        whole = Scattered(data, index, (1, *shape[1:])).data.flatten(0, 1)
        into = (rows, *sizes[1:])
        found = native.toward_input(
            data, w, into, layer.stride, layer.padding, layer.dilation, index, shape[2:], threads=1
        )
        expected = backward(whole, w, into, layer)
        if found is None or not torch.allclose(found, expected, 1e-4, near):
            return False
    return True


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
    settings = [Around(last, onward) for last in (False, True)]
    names = {"backward", *_candidates(layer, len(shape), dtype, settings[0])}  # a file may hold any
    known = [recalled(_question(*trial, around)) for around in settings]
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
    where = opaque(_COLUMNS, _columns, _like) if isinstance(g, FakeTensor) else _columns
    found: Tensor = where(g, w, sizes, layer.stride, layer.padding)
    return found


def _has_columns(layer: Convolution, dims: int) -> bool:
    still = not layer.transposed and layer.groups == 1 and set(layer.dilation) == {1}
    return still and dims in (3, 4)


def _columns(
    g: Tensor, w: Tensor, sizes: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    like = g.new_zeros(1).expand(*sizes)
    found: Tensor = torch.ops.aten._slow_conv2d_backward.output_mask(
        g, like, w, w.shape[2:], stride, padding, [True, False, False]
    )[0]
    return found


def own(g: Tensor, w: Tensor, sizes: Sequence[int], layer: Convolution) -> Tensor:
    """Our own kernel, written for rows of cotangents: one image at a time, its planes in cache."""
    where = opaque(_OWN, _own, _like) if isinstance(g, FakeTensor) else _own
    found: Tensor = where(g, w, sizes, layer.stride, layer.padding, layer.dilation)
    return found


_COLUMNS = "columns(Tensor g, Tensor w, int[] sizes, int[] s, int[] pad) -> Tensor"
_OWN = "own(Tensor g, Tensor w, int[] sizes, int[] s, int[] pad, int[] d) -> Tensor"


def _like(g: Tensor, w: Tensor, sizes: Sequence[int], *_: Sequence[int]) -> Tensor:
    return g.new_empty(sizes)


def _own(
    g: Tensor, w: Tensor, sizes: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    found = native.toward_input(g, w, sizes, stride, padding, dilation)
    if found is None:  # what is not finite may not meet zeros
        none = (0,) * len(stride)
        layer = Convolution(tuple(stride), tuple(padding), tuple(dilation), none, False, 1)
        return backward(g, w, sizes, layer)
    return found
