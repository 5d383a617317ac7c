"""The quicker kernel of max pooling: the same values, places and graph as torch's own."""

import pytest
import torch
from torch.nn import functional as F

from batchjac import pooling
from batchjac.pooling import quick_pooling

POOLS = {
    "pairs": lambda x: F.max_pool1d(x.flatten(2), 2),
    "fours": lambda x: F.max_pool1d(x.flatten(2), 4),
    "squares": lambda x: F.max_pool2d(x, 2),
    "lying": lambda x: F.max_pool2d(x, (1, 3)),
    "standing": lambda x: F.max_pool2d(x, (3, 1)),
    "layer": torch.nn.MaxPool2d(2),
    "overlapping": lambda x: F.max_pool2d(x, 2, stride=1),
    "apart": lambda x: F.max_pool2d(x, 2, stride=3),
    "padded": lambda x: F.max_pool2d(x, 2, padding=1),
    "dilated": lambda x: F.max_pool2d(x, 2, 2, dilation=2),
    "cut off": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "large": lambda x: F.max_pool2d(x, 5),
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 3),
}
QUICK = ("pairs", "fours", "squares", "lying", "standing", "layer")


@pytest.fixture
def taken(monkeypatch):
    """The windows that the quicker kernel was asked for."""
    windows = []
    original = pooling.slices

    def slices(x, high, wide):
        windows.append((high, wide))
        return original(x, high, wide)

    monkeypatch.setattr(pooling, "slices", slices)
    return windows


def image(kind, dtype):
    """Large enough for the kernel, with odd sizes; ``ties`` has few different entries."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, 21, 23, generator=generator, dtype=dtype)
    if kind == "ties":
        x = x.round()
    if kind == "nan":
        x[1, 2, 3, 4] = x[1, 2, 6, 6] = torch.nan
    if kind == "infinite":
        x[0, 0] = torch.inf
        x[0, 1] = -torch.inf
    return x.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "ties", "nan", "infinite"])
@pytest.mark.parametrize("name", POOLS)
def test_values_and_gradients_are_those_of_torch(name, kind, dtype, taken):
    x = image(kind, dtype)
    expected = POOLS[name](x)
    with quick_pooling():
        found = POOLS[name](x)
    assert bool(taken) == (name in QUICK)
    assert found.grad_fn.name() == expected.grad_fn.name()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    g = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, x, g)[0] for y in (found, expected)]
    assert torch.equal(*gradients)


def test_it_is_left_where_it_does_not_pay_or_apply(taken):
    x = image("plain", torch.float32).detach()
    with quick_pooling():
        F.max_pool2d(x, 2)  # nothing is recorded: torch keeps no places either
        F.max_pool2d(x[:1, :1].clone().requires_grad_(), 2)
        F.max_pool2d(x.half().requires_grad_(), 2)
        last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        F.max_pool2d(last, 2)
        torch.func.vmap(lambda s: F.max_pool2d(s, 2))(x.clone().requires_grad_())
    assert taken == []


def test_torch_has_its_own_again_after_an_error():
    before = torch.max_pool1d, torch.max_pool2d
    context = quick_pooling()
    context.__enter__()
    assert torch.max_pool2d is not before[1]
    assert context.__exit__(RuntimeError, RuntimeError("stop"), None) is False
    assert (torch.max_pool1d, torch.max_pool2d) == before
