"""Kernels that are chosen by measuring: each equals autograd's own, and so does what is chosen."""

import pytest
import torch

from batchjac import convolutions
from batchjac.convolutions import Around, Convolution

# (dims, stride, padding, dilation, output padding, transposed, groups, channels in, out, kernel)
LAYERS = {
    "plain": (2, 1, 0, 1, 0, False, 1, 4, 6, 3),
    "padded": (2, 1, 1, 1, 0, False, 1, 4, 6, 3),
    "strided": (2, 2, 1, 1, 0, False, 1, 3, 6, 3),
    "pointwise, strided": (2, 2, 0, 1, 0, False, 1, 4, 6, 1),
    "dilated": (2, 1, 2, 2, 0, False, 1, 4, 6, 3),
    "grouped": (2, 3, 1, 1, 0, False, 2, 4, 6, 3),
    "one axis": (1, 2, 2, 1, 0, False, 1, 1, 6, 5),
    "three axes": (3, 2, 1, 1, 0, False, 1, 2, 3, 3),
    "transposed": (2, 2, 1, 1, 1, True, 1, 4, 6, 3),
    "transposed, grouped, one axis": (1, 3, 1, 1, 2, True, 2, 4, 6, 3),
    "transposed, wide output padding": (1, 1, 1, 3, 2, True, 1, 2, 3, 3),
}


def layer(name, dtype, images=3, size=11):
    """Cotangents, a weight, the input's sizes and the layer."""
    dims, *numbers, transposed, groups, before, after, k = LAYERS[name]
    spec = Convolution(*((number,) * dims for number in numbers), transposed, groups)
    first, second = (before, after // groups) if transposed else (after, before // groups)
    w = torch.randn(first, second, *(k,) * dims, dtype=dtype)
    x = torch.randn(images, before, *(size,) * dims, dtype=dtype)
    y = torch.convolution(
        x,
        w,
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        transposed,
        spec.output_padding,
        groups,
    )
    return torch.randn_like(y), w, x.shape, spec


KERNELS = [
    convolutions.posed,
    convolutions.columns,
    convolutions.channels_last,
    convolutions.channels_last_within,
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_convolution_kernels_equal_the_operator(name, kernel):
    g, w, sizes, spec = layer(name, torch.float64)
    if kernel is convolutions.columns and not convolutions._has_columns(spec, g.dim()):
        assert spec.transposed or spec.groups > 1 or max(spec.dilation) > 1 or g.dim() == 5
        return
    if kernel in KERNELS[2:] and g.dim() == 5:
        return  # three axes have a layout of their own
    expected = convolutions.backward(g, w, sizes, spec)
    if "wide" in name:  # it reaches further than the input: shapes show it, and it is not chosen
        assert kernel(g, w, sizes, spec).shape != expected.shape
        return
    torch.testing.assert_close(kernel(g, w, sizes, spec), expected)


@pytest.mark.parametrize("onward", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_the_chosen_convolution_equals_the_operator(name, dtype, last, onward, monkeypatch):
    monkeypatch.setattr(convolutions, "_SMALL_CONVOLUTION", 0)
    convolutions._fastest_convolution.cache_clear()
    g, w, sizes, spec = layer(name, dtype, images=5)
    if last:
        g = g.movedim(1, -1).contiguous().movedim(-1, 1)
    found = convolutions.convolution(g, w, sizes, spec, onward)
    torch.testing.assert_close(
        found, convolutions.backward(g, w, sizes, spec), rtol=1e-4, atol=1e-4
    )
    assert convolutions._fastest_convolution.cache_info().currsize == 1


def test_a_kernel_that_is_wrong_is_not_chosen(monkeypatch):
    for name in ("posed", "columns", "channels_last_within", "own"):
        monkeypatch.setattr(convolutions, name, lambda g, w, sizes, layer: torch.zeros(sizes))
    g, w, sizes, spec = layer("strided", torch.float32)
    convolutions._fastest_convolution.cache_clear()
    shapes = (tuple(g.shape), tuple(w.shape), tuple(sizes))
    chosen = convolutions._fastest_convolution(spec, *shapes, torch.float32, 1, Around())
    convolutions._fastest_convolution.cache_clear()
    assert chosen is convolutions.backward


@pytest.mark.parametrize("kernel", KERNELS)
def test_convolution_kernels_can_be_differentiated_again(kernel):
    g, w, sizes, spec = layer("strided", torch.float64, images=1, size=5)
    g.requires_grad_()
    w.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kernel(a, b, sizes, spec), (g, w))
