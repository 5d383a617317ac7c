"""Rows that a max pooling hands down: a few places of each plane, until something reads them."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import convolutions, native
from batchjac.block import Block, Scattered
from batchjac.convolutions import own
from batchjac.engines import reference


def planes() -> Scattered:
    """Three rows of two samples with five channels of 4x6, a quarter of the places held."""
    index = torch.rand(2, 5, 24).argsort(-1)[..., :6]
    return Scattered(torch.randn(3, 2, 5, 6), index, (2, 5, 4, 6))


def test_they_are_zero_but_at_their_places() -> None:
    block = planes()
    assert block.rows == 3
    assert block.data.shape == (3, 2, 5, 4, 6)
    flat = block.data.flatten(3)
    assert (flat != 0).sum() == block.few.numel()
    assert torch.equal(flat.gather(-1, block.index.expand(3, -1, -1, -1)), block.few)


def test_a_diagonal_is_read_at_those_places_alone() -> None:
    block, diagonal = planes(), torch.randn(2, 5, 4, 6)
    few = Scattered(block.few * block.there(diagonal), block.index, block.shape)
    assert torch.equal(few.data, block.data * diagonal)


@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 5, 1, 24), (2, 5, 2, 12), (2, 5, 4, 6)])
def test_reshaped_planes_keep_the_numbers_of_their_places(shape: tuple[int, ...]) -> None:
    block = planes()
    found = block.reshape(shape)
    assert isinstance(found, Scattered)
    assert torch.equal(found.data, block.data.reshape(3, *shape))


@pytest.mark.parametrize("shape", [(10, 24), (5, 2, 24), (2, 120)])
def test_other_shapes_are_whole_rows(shape: tuple[int, ...]) -> None:
    block = planes()
    found = block.reshape(shape)
    assert not isinstance(found, Scattered)
    assert torch.equal(found.data, block.data.reshape(3, *shape))


def test_other_readers_see_whole_rows() -> None:
    block = planes()
    assert isinstance(block.plus(Block(torch.ones(3, 2, 5, 4, 6), block.shape)), Block)
    assert torch.equal(block.to(torch.float64).data, block.data.double())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pool after ReLU": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                              nn.Linear(36, 5)), (8, 2, 8, 8)),
    "ReLU after pool": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
                              nn.Linear(36, 5)), (8, 2, 8, 8)),
    "signals": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.MaxPool1d(3), nn.Flatten(),
                              nn.Linear(40, 12)), (8, 2, 32)),
    "tanh": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
                              nn.Flatten(), nn.Linear(64, 5)), (8, 2, 8, 8)),
    "windows that overlap": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
                              nn.Flatten(), nn.Linear(64, 5)), (8, 2, 8, 8)),
    "strided": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Flatten(), nn.Linear(64, 12)), (8, 2, 16, 16)),
    "windows with gaps": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 3),
                              nn.Flatten(), nn.Linear(36, 12)), (8, 2, 8, 8)),
    "windows beyond the edge": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
                              nn.Flatten(), nn.Linear(64, 12)), (8, 2, 9, 9)),
    "padded windows": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 3, 1),
                              nn.Flatten(), nn.Linear(36, 12)), (8, 2, 9, 9)),
    "two branches": (lambda: Branches(), (8, 2, 8, 8)),
    "normalised": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Flatten(), nn.Linear(36, 5)).eval(), (8, 2, 8, 8)),
    "a row for all samples": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten()), (8, 2, 8, 8)),
}  # fmt: skip


class Branches(nn.Module):
    """What was pooled is read once more, before the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return nn.functional.max_pool2d(y, 2).flatten(1)[:, :5] + y.flatten(1)[:, 7:12] * 2


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = MODELS[name]
    torch.manual_seed(1)
    return build(), torch.randn(shape)


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution by our own kernel, whatever its size."""
    if native.library() is None:
        pytest.skip("the kernels were not compiled")
    monkeypatch.setattr(convolutions, "_SMALL_CONVOLUTION", 0)

    def chosen(*asked: object) -> object:
        around = asked[-1]
        assert isinstance(around, convolutions.Around)
        return convolutions.backward if around.recorded else own

    monkeypatch.setattr(convolutions, "_fastest_convolution", chosen)


@pytest.mark.parametrize("kernel", ["ours", "torch's"])
@pytest.mark.parametrize("wrt", ["input", "parameters"])
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_the_reference(
    name: str, wrt: str, kernel: str, request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if kernel == "ours":
        request.getfixturevalue("_ours")
    model, x = made(name)
    target = None if wrt == "input" else "parameters"
    options = {} if target is None else {"wrt": target}
    with caplog.at_level(logging.WARNING):
        found = batchjac.jacobian(model, x, **options)  # type: ignore[arg-type]  # mypy checks each keyword
    assert not caplog.records, "the walk was left for autograd"
    model.double()
    expected = batchjac.jacobian(model, x.double(), **options)  # type: ignore[arg-type]  # the same
    if target is None:
        rows = reference.jacobian(model, x.double())
        torch.testing.assert_close(expected, rows)
    pairs = [(found, expected)] if target is None else [(found[k], expected[k]) for k in expected]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_ours")
@pytest.mark.parametrize(
    ("name", "few"), [("pool after ReLU", 1), ("signals", 1), ("windows that overlap", 0),
                      ("two branches", 0), ("normalised", 0)],
)  # fmt: skip
def test_the_kernel_gets_the_few_places(
    name: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[Tensor | None] = []
    real = native.toward_input

    def watched(*given: object, **more: object) -> Tensor | None:
        came.append(given[6] if len(given) > 6 else None)  # type: ignore[arg-type]  # the index
        return real(*given, **more)  # type: ignore[arg-type]  # what came

    monkeypatch.setattr(native, "toward_input", watched)
    model, x = made(name)
    batchjac.jacobian(model.requires_grad_(False), x)
    assert sum(index is not None for index in came) == few
    assert came


@pytest.mark.usefixtures("_ours")
def test_a_history_is_kept_where_one_is_asked_for() -> None:
    model, x = made("pool after ReLU")
    loss = batchjac.jacobian(model, x, create_graph=True).pow(2).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    model.double()
    loss = batchjac.jacobian(model, x.double(), create_graph=True).pow(2).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "window", [{"kernel_size": [2]}, {"kernel_size": [2], "stride": [2, 2]},
               {"kernel_size": [2, 2], "stride": [2]}, {"kernel_size": [3], "stride": 2},
               {"kernel_size": 2, "dilation": [2]}],
)  # fmt: skip
def test_one_number_in_a_list_is_for_all_axes(
    window: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    def pooled(x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, **window).flatten(1)  # type: ignore[arg-type]  # mypy checks each keyword

    x = torch.randn(3, 2, 8, 8)
    assert torch.equal(batchjac.jacobian(pooled, x), reference.jacobian(pooled, x))
    assert not caplog.records, "the walk was left for autograd"


def test_zeros_do_not_meet_what_is_not_finite() -> None:
    """A cotangent that overflowed, at a place that a ReLU does not let through, is 0."""
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[3].weight[0, 0] = torch.inf
    x = -torch.rand(3, 1, 4, 4)
    assert not batchjac.jacobian(model, x).isnan().any()
    assert torch.equal(batchjac.jacobian(model, x), reference.jacobian(model, x))
