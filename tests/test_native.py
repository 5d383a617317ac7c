"""Our own kernels in C, for each set of vector instructions, beside torch's in double precision."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from batchjac import convolutions, kernels, native
from batchjac.convolutions import Convolution

if native.library() is None:
    pytest.skip("the kernels were not compiled: there is no C compiler", allow_module_level=True)

LEVELS = native.levels()


@pytest.fixture(params=LEVELS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The library for a set of instructions that this machine has."""
    monkeypatch.setattr(native, "levels", lambda: [request.param])
    native.library.cache_clear()
    library = native.library()
    assert library is not None
    assert request.param in library._name
    yield request.param
    native.library.cache_clear()


def near(found: Tensor, expected: Tensor, terms: int) -> None:
    """Of standard normal numbers, so many products to a sum, in single precision."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * max(1, terms) ** 0.5 * 8


def drawn(seed: int) -> tuple[Tensor, Tensor, list[int], Convolution]:
    """A layer of any size, and cotangents in any order of axes."""
    pick = random.Random(seed)
    dims = pick.choice((1, 2))

    def several(least: int, most: int) -> tuple[int, ...]:
        return tuple(pick.randint(least, most) for _ in range(dims))

    taps, stride, dilation = several(1, 5), several(1, 3), several(1, 2)
    padding = tuple(pick.randint(0, k) for k in taps)
    sizes = tuple(
        d * (k - 1) + 1 + pick.randint(0, 30) for k, d in zip(taps, dilation, strict=True)
    )
    images, before, after = pick.randint(1, 5), pick.randint(1, 19), pick.randint(1, 35)
    torch.manual_seed(seed)
    w = torch.randn(after, before, *taps)
    x = torch.randn(images, before, *sizes)
    y = torch.convolution(x, w, None, stride, padding, dilation, False, (0,) * dims, 1)
    g = torch.randn_like(y)
    if pick.random() < 0.5:  # channels last
        g = g.movedim(1, -1).contiguous().movedim(-1, 1)
    return g, w, [*x.shape], Convolution(stride, padding, dilation, (0,) * dims, False, 1)


@pytest.mark.parametrize("seed", range(60))
def test_convolutions_of_any_shape_equal_autograds(seed: int, compiled: str) -> None:
    g, w, sizes, layer = drawn(seed)
    found = convolutions.own(g, w, sizes, layer)
    near(found, convolutions.backward(g.double(), w.double(), sizes, layer), w[:, 0].numel())


@pytest.mark.parametrize("rows", [1, 3, 11, 20])
@pytest.mark.parametrize("seed", range(12))
def test_few_places_of_each_plane_are_what_whole_planes_are(
    seed: int, rows: int, compiled: str
) -> None:
    """With few rows they are put into planes, with many each adds its taps."""
    g, w, sizes, layer = drawn(seed)
    plane = g.shape[2:]
    places = max(1, plane.numel() // 4)
    order = torch.rand(*g.shape[:2], plane.numel()).argsort(-1)
    index = order[..., :places].contiguous()
    few = torch.randn(rows, *index.shape)
    whole = torch.zeros(rows, *g.shape[:2], plane.numel()).scatter_(3, index.expand_as(few), few)
    expected = convolutions.backward(
        whole.view(-1, g.shape[1], *plane).double(), w.double(), (rows * len(g), *sizes[1:]), layer
    )
    found = native.toward_input(
        few, w, (rows * len(g), *sizes[1:]), layer.stride, layer.padding, layer.dilation, index,
        plane,
    )  # fmt: skip
    assert found is not None
    near(found, expected, w[:, 0].numel())


@pytest.mark.parametrize(("p", "q"), [(40, 16000), (1720, 1720)])
@pytest.mark.parametrize("rows", [1, 9])
def test_places_of_large_planes(p: int, q: int, rows: int, compiled: str) -> None:
    """Where a place is divided by the width, not every way is exact for large ones."""
    index = torch.tensor([[[p * q - 1, q - 1, (p // 2) * q, p // 2 * q - 1, 0]]])
    few, w = torch.randn(rows, 1, 1, 5), torch.randn(1, 1, 3, 3)
    whole = torch.zeros(rows, 1, p * q).scatter_(2, index.expand(rows, 1, 5), few[:, 0])
    layer = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    sizes = (rows, 1, p, q)
    found = native.toward_input(few, w, sizes, (1, 1), (1, 1), (1, 1), index, (p, q))
    assert found is not None
    near(found, convolutions.backward(whole.view(sizes).double(), w.double(), sizes, layer), 9)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("place", [-1, 16, 1 << 40])
def test_a_place_outside_its_plane_is_declined(place: int, rows: int, compiled: str) -> None:
    index, w = torch.tensor([[[3, place]]]), torch.randn(1, 1, 3, 3)
    few = torch.randn(rows, 1, 1, 2)
    given = (few, w, (rows, 1, 4, 4), (1, 1), (1, 1), (1, 1), index, (4, 4))
    assert native.toward_input(*given) is None


@pytest.mark.parametrize("rows", [1, 16])
def test_taps_that_are_not_finite_are_declined_for_any_number_of_rows(
    rows: int, compiled: str
) -> None:
    index, w = torch.tensor([[[3, 4]]]), torch.full((1, 1, 3, 3), torch.inf)
    few = torch.randn(rows, 1, 1, 2)
    given = (few, w, (rows, 1, 6, 6), (1, 1), (1, 1), (1, 1), index, (6, 6))
    assert native.toward_input(*given) is None


def test_imaginary_parts_of_conjugates_keep_their_sign() -> None:
    z = torch.randn(8, 64, 32, dtype=torch.complex64)
    a, b = z.conj().imag, torch.randn(8, 32, 64)
    assert a.is_neg()
    near(kernels.batched(a, b), torch.bmm(a.double(), b.double()), 32)
    g = torch.randn(32, 16, 16, 16, dtype=torch.complex64).conj().imag
    w, layer = torch.randn(16, 3, 3, 3), Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    sizes = (32, 3, 16, 16)
    found = convolutions.convolution(g, w, sizes, layer)
    near(found, convolutions.backward(g.double(), w.double(), sizes, layer), 144)


def test_a_kernel_that_is_wrong_about_places_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = native.toward_input

    def wrong(*given: Any, **more: Any) -> Tensor | None:
        found = real(*given, **more)
        return found * 1.01 if found is not None and len(given) > 6 else found

    monkeypatch.setattr(native, "toward_input", wrong)
    g, w, sizes, layer = drawn(3)
    shapes = (tuple(g.shape), tuple(w.shape), tuple(sizes))
    assert convolutions._agreeing([convolutions.own], layer, *shapes, torch.float32, False) == []
    monkeypatch.undo()
    kept = convolutions._agreeing([convolutions.own], layer, *shapes, torch.float32, False)
    assert kept == [convolutions.own]


@pytest.mark.parametrize("seed", range(40))
def test_products_of_any_shape_equal_torchs(seed: int, compiled: str) -> None:
    pick = random.Random(seed)
    n, i, k, j = pick.randint(1, 5), pick.randint(1, 40), pick.randint(0, 20), pick.randint(16, 150)
    torch.manual_seed(seed)
    a = torch.randn(n, k, i).mT if pick.random() < 0.5 else torch.randn(n, i, k)
    b = torch.randn(n, k, j + 3)[..., :j]
    wide = torch.full((n, i, j + 2), torch.nan)
    found = native.product(a, b, out=wide[..., 1:-1])
    near(found, torch.bmm(a.double(), b.double()), k)
    assert wide[..., 0].isnan().all(), "written beside the result"
    assert wide[..., -1].isnan().all(), "written beside the result"
    near(native.product(a, b), torch.bmm(a.double(), b.double()), k)


def test_one_factor_may_be_shared(compiled: str) -> None:
    a, b = torch.randn(4, 6, 5), torch.randn(4, 5, 33)
    near(native.product(a[:1], b), torch.matmul(a[:1].double(), b.double()), 5)
    near(native.product(a, b[:1]), torch.matmul(a.double(), b[:1].double()), 5)


def test_nothing_to_do(compiled: str) -> None:
    layer = Convolution((1,), (0,), (1,), (0,), False, 1)
    empty = convolutions.own(torch.zeros(0, 2, 4), torch.zeros(2, 3, 2), (0, 3, 5), layer)
    assert empty.shape == (0, 3, 5)
    assert native.product(torch.zeros(0, 2, 3), torch.zeros(0, 3, 20)).shape == (0, 2, 20)
    assert not native.product(torch.zeros(2, 2, 0), torch.zeros(2, 0, 20)).any()


@pytest.mark.parametrize("entry", [torch.inf, torch.nan])
def test_taps_that_are_not_finite_do_not_meet_the_zeros_beside_the_image(
    entry: float, compiled: str
) -> None:
    layer = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    g, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    w[0, 0, 0, 0] = entry
    found = convolutions.own(g, w, (1, 1, 4, 4), layer)
    assert torch.equal(found.isnan(), convolutions.backward(g, w, (1, 1, 4, 4), layer).isnan())


def test_a_cotangent_that_is_not_finite_stays_where_it_is_read(compiled: str) -> None:
    layer = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    g, w = torch.zeros(2, 1, 9, 9), torch.randn(1, 1, 3, 3)
    g[0, 0, 4, 8] = torch.inf  # the last of its row: beside it the next begins
    found = convolutions.own(g, w, (2, 1, 9, 9), layer)
    expected = convolutions.backward(g, w, (2, 1, 9, 9), layer)
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_batched_products_equal_torchs_and_take_what_ours_does_not() -> None:
    a, b = torch.randn(8, 40, 30), torch.randn(8, 50, 30).mT
    near(kernels.batched(a, b), torch.bmm(a.double(), b.double()), 30)
    assert torch.equal(kernels.batched(a.double(), b.double()), torch.bmm(a.double(), b.double()))
    a.requires_grad_()
    kernels.batched(a, b).sum().backward()
    assert a.grad is not None


def test_a_product_that_is_wrong_or_slower_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.fastest_batched.cache_clear()
    with monkeypatch.context() as wrong:
        wrong.setattr(native, "product", lambda a, b, out=None: torch.bmm(a, b) * 1.01)
        assert kernels.fastest_batched() is torch.bmm
    kernels.fastest_batched.cache_clear()
    with monkeypatch.context() as slower:
        slower.setattr(kernels, "seconds", lambda *_: [2.0, 1.0])
        assert kernels.fastest_batched() is torch.bmm
    kernels.fastest_batched.cache_clear()


def test_without_the_compiled_files_torchs_kernels_do_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    layer = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    around = convolutions.Around()
    assert "own" not in convolutions._candidates(layer, 4, torch.float32, around)
    assert kernels.chosen_batched() == kernels.BATCHED[False]
    a, b = torch.randn(8, 40, 30), torch.randn(8, 30, 50)
    assert torch.equal(kernels.batched(a, b), torch.bmm(a, b))
    assert "not compiled" in native.described()


def test_libraries_of_another_version_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    native.library.cache_clear()
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()
