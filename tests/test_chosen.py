"""The kernels that a plan names: those that were measured, and what is said before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchjac
from batchjac import calibration, convolutions, kernels
from batchjac.chosen import CONVOLUTIONS, LATER, MOST
from batchjac.convolutions import Around


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cache in (kernels.fastest, convolutions._fastest_convolution, calibration._choices):
        cache.cache_clear()


def said(f: Callable[[Tensor], Tensor], *shape: int, **options: object) -> tuple[str, ...]:
    return batchjac.plan(f, torch.randn(shape), **options).plan.chosen  # type: ignore[arg-type]


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def test_a_convolution_is_measured_and_then_named() -> None:
    model = frozen(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Flatten()))
    x = torch.randn(16, 4, 8, 8)
    before = batchjac.plan(model, x, outputs=list(range(20)))
    assert f"kernel        Convolution 8x6x6 <- 4x8x8: {LATER}" in str(before).splitlines()
    before(x)
    (line,) = [
        n
        for n in batchjac.plan(model, x, outputs=list(range(20))).plan.chosen
        if n.startswith("Conv")
    ]
    (question,) = calibration.choices("Convolution")
    assert line.endswith(": " + CONVOLUTIONS[calibration.choices("")[question]])


def test_every_kernel_has_words() -> None:
    layer = convolutions.Convolution((1, 1), (0, 0), (1, 1), (0, 0), False, 1)
    names = {
        name
        for onward in (False, True)
        for name in convolutions._candidates(layer, 4, torch.float32, Around(onward=onward))
    }
    assert CONVOLUTIONS.keys() == names | {"backward", "own"}  # own: where it was compiled


def test_of_products_the_size_matters_and_whether_samples_share_the_matrix() -> None:
    small = frozen(nn.Sequential(nn.Tanh(), nn.Linear(3, 2)))
    assert said(small, 5, 3) == ("Addmm 2 <- 3: torch.matmul",)
    wide = frozen(nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 9), nn.Tanh()))
    assert said(wide, 20, 300, mode="reverse") == (
        f"Addmm 9 <- 200: {LATER}", f"Addmm 200 <- 300: {LATER}",
    )  # fmt: skip
    known = kernels.fastest()
    name = kernels.LINEAR[known is not kernels._mm]
    if kernels._onednn() is None:  # nothing to choose from, and so nothing is noted
        calibration.note("linear", name)
    assert said(wide, 20, 300, mode="reverse")[1] == f"Addmm 200 <- 300: {name}"
    own = said(lambda x: x @ x.transpose(1, 2), 5, 3, 4)
    assert own == ("Bmm 3x3 <- 3x4: einsum, a product for each sample",)


def test_rows_that_all_samples_share_are_one_small_product() -> None:
    model = frozen(nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 9)))
    assert said(model, 20, 300, mode="reverse") == (
        "Addmm 9 <- 200: torch.matmul", f"Addmm 200 <- 300: {LATER}",
    )  # fmt: skip


def test_pooling_and_attention() -> None:
    def f(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    (line,) = said(f, 2, 2, 6, 8)
    assert line.startswith("ScaledDotProduct")
    assert line.endswith("2x6x8 <- 2x6x8: batched products for each head")
    pool = said(lambda x: F.max_pool2d(x.sin(), 2), 2, 2, 6, 8)
    assert pool == ("MaxPool2DWithIndices 2x3x4 <- 2x6x8: one scatter to the forward's places",)
    up = said(lambda x: F.max_pool2d(x.sin(), 2), 2, 2, 6, 8, mode="forward")
    assert up == ("MaxPool2DWithIndices 2x3x4 <- 2x6x8: gathered from the forward's places",)


def test_forward_convolutions() -> None:
    model = frozen(nn.Conv2d(2, 3, 3))
    assert said(model, 2, 2, 6, 8, mode="forward") == (
        "Convolution 3x4x6 <- 2x6x8: forward convolution",
    )


def test_equal_layers_are_one_line_and_many_different_ones_lose_their_shapes() -> None:
    layers = [nn.Linear(7, 7) for _ in range(4)]
    (line,) = said(frozen(nn.Sequential(nn.Tanh(), *layers)), 5, 7)
    assert line == "Addmm 7 <- 7: torch.matmul  x4"
    different = [nn.Linear(k, k + 1) for k in range(1, MOST + 2)]
    (line,) = said(frozen(nn.Sequential(*different)), 5, 1)
    assert line == f"Addmm: torch.matmul  x{MOST + 1}"


def test_shapes_alone_do() -> None:
    model = frozen(nn.Conv2d(4, 8, 3)).to("meta")
    planned = batchjac.plan(model, torch.zeros(16, 4, 8, 8, device="meta"), mode="reverse")
    assert planned.plan.chosen == (f"Convolution 8x6x6 <- 4x8x8: {LATER}",)
