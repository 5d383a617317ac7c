"""Kernels of our own, in C: convolutions toward their inputs, and products of thin matrices.

Installing batchjac compiles the C files beside this one, once for each set of vector instructions,
where there is a C compiler. Everything here is one more candidate for the choices in
``kernels`` and ``convolutions``: without the compiled files torch's own kernels do the same work.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

VERSION = 3  # of the functions' arguments, as in product.c
# Which file fits what torch finds the processor able to do.
LEVELS = {"AVX512": "avx512", "AVX2": "avx2"}
BASE = "base"
# The product writes so many columns at once at least; narrower results are left to torch.
NARROWEST = 16


def levels() -> list[str]:
    """The sets of vector instructions that the processor has, the widest first."""
    every = [*LEVELS.values(), BASE]
    return every[every.index(LEVELS.get(torch.backends.cpu.get_cpu_capability(), BASE)) :]


def described() -> str:
    """Whether there are compiled kernels, in words."""
    found = library()
    if found is not None:
        return f"compiled: {Path(found._name).stem}"
    return "not compiled: install batchjac again where there is a C compiler (cc), to be faster"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels for this machine; None where there are none, or older ones."""
    for level in levels():
        try:
            found = ctypes.CDLL(str(Path(__file__).with_name(f"kernels_{level}.so")))
            if found.batchjac_version() == VERSION:
                return found
        except (OSError, AttributeError):  # not compiled, or for another system
            continue
    return None


def fits(groups: int, transposed: bool, dims: int, dtype: torch.dtype) -> bool:
    """Whether ``toward_input`` can do a layer: plain, of one or two axes, in float32."""
    plain = groups == 1 and not transposed and dims in (3, 4)
    return plain and dtype == torch.float32 and library() is not None


_SIZES = ("images", "o", "p", "q", "c", "h", "w", "k", "l", "gr", "go", "gp", "gq",
          "s", "t", "a", "b", "d", "e", "index", "rows", "places")  # fmt: skip
_FACTORS = ("n", "i", "k", "j", "an", "ai", "ak", "bn", "bk", "yn", "yi")


_DECLINED = 2  # what ``toward_input`` may say


class _Convolution(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _SIZES]


class _Product(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _FACTORS]


def toward_input(
    g: Tensor, w: Tensor, sizes: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], index: Tensor | None = None, plane: Sequence[int] = (),
    threads: int | None = None,
) -> Tensor | None:  # fmt: skip
    """``sum_{o,k} g[r,o,q] w[o,c,k]`` over ``q s + k d - pad = p``: images ``[r,c,p]``.

    Of one axis or two, in float32 without a history. With an ``index [n,o,j]``, ``g`` is zero but
    for ``g[v,n,o,j]`` at these places of its ``plane``, flattened, and ``r`` goes over ``v n``.
    None where an entry of ``w`` is not finite, since it would meet zeros beside the images, where a
    place is in no plane, and where planes have more than 2^31 entries.
    Cost: one copy of ``g``; beside the result the planes of one image for each thread.
    """
    kernels = library()
    assert kernels is not None
    assert g.dtype == w.dtype == torch.float32
    found = g.new_empty(tuple(sizes))
    if found.numel() == 0 or g.numel() == 0:
        return found.zero_()
    w = w.contiguous()
    one, none = ((1,), (0,)) if len(sizes) == 3 else ((), ())
    if index is None:
        images, channels, *plane = g.shape
        steps: tuple[int, ...] = (*g.stride()[:2], *none, *g.stride()[2:])
        places = (0, 1, 0)
    else:
        g, index = g.contiguous(), index.contiguous()
        assert index.dtype == torch.int64
        assert index.shape == g.shape[1:]
        images, channels, steps = len(g) * len(index), g.shape[2], (0, 0, 0, 0)
        places = (index.data_ptr(), len(g), g.shape[3])
    shape = _Convolution(
        images, channels, *one, *plane, sizes[1], *one, *sizes[2:], *one, *w.shape[2:], *steps,
        *one, *stride, *none, *padding, *one, *dilation, *places,
    )  # fmt: skip
    threads = min(threads or torch.get_num_threads(), images)  # each holds the planes of one image
    failed = kernels.batchjac_toward_input(_at(g), _at(w), _at(found), ctypes.byref(shape), threads)
    if failed == _DECLINED:
        return None
    if failed:
        raise MemoryError(f"no memory to convolve {tuple(g.shape)} back with {tuple(w.shape)}")
    return found


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Whether ``product`` takes these: float32 in memory, the result's columns wide enough."""
    return (
        a.dtype == b.dtype == torch.float32
        and b.stride(2) == 1
        and b.shape[2] >= NARROWEST
        and library() is not None
    )


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a[n,i,k] b[n,k,j]``, as ``torch.bmm``; of a sample that all share, the first axis is 1."""
    kernels = library()
    assert kernels is not None
    samples = max(len(a), len(b))
    if out is None:
        out = a.new_empty(samples, a.shape[1], b.shape[2])
    assert multiplies(a, b)
    assert out.dtype == torch.float32
    assert out.stride(2) == 1
    shape = _Product(
        samples, a.shape[1], a.shape[2], b.shape[2],
        a.stride(0) if len(a) > 1 else 0, a.stride(1), a.stride(2),
        b.stride(0) if len(b) > 1 else 0, b.stride(1),
        out.stride(0), out.stride(1),
    )  # fmt: skip
    kernels.batchjac_product(_at(a), _at(b), _at(out), ctypes.byref(shape), torch.get_num_threads())
    return out


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
