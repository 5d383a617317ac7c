"""``compile=True`` where that cannot be, or goes wrong: walked as it is, and the log says so."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac.engines import compiled, reference
from tests.common import close, mlp
from tests.compiling import Counted, Module, answer, lines, walks

pytestmark = pytest.mark.usefixtures("nothing_compiled")


class Cube(torch.autograd.Function):
    factor = 3.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = Cube.factor
        return x * Cube.factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


def refused(f: Any, caplog: pytest.LogCaptureFixture, reason: str, x: Tensor | None = None) -> None:
    """The answer is right, the first time and the second, and each time the log says why."""
    x = torch.randn(5, 3) if x is None else x
    for _ in range(2):
        caplog.clear()
        close(answer(f, x, "eager"), reference.jacobian(f, x))
        (line,) = lines(caplog)
        assert line.startswith("compile=True, but not compiled: ")
        assert reason in line


@pytest.mark.usefixtures("taken", "float64")
class TestWalkedAsItIs:
    def test_a_function_of_the_users_own(self, caplog: pytest.LogCaptureFixture) -> None:
        refused(lambda x: Cube.apply(x).sin(), caplog, "CubeBackward is a user's own function")

    def test_a_node_without_a_rule(self, caplog: pytest.LogCaptureFixture) -> None:
        refused(lambda x: torch.fft.rfft(x.sin()).abs(), caplog, "no rule for FftR2CBackward0")

    def test_a_rule_that_looks_at_numbers(self, caplog: pytest.LogCaptureFixture) -> None:
        mask = torch.tensor([True, False, True])
        refused(lambda x: x[:, mask].sin(), caplog, "DynamicOutputShapeException")

    def test_a_long_graph(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("batchjac.engines.trace._LONGEST", 3)
        refused(mlp(), caplog, "nodes, more than 3")

    def test_a_history(self, caplog: pytest.LogCaptureFixture) -> None:
        x = torch.randn(5, 3, requires_grad=True)
        found = answer(torch.sin, x, "eager", create_graph=True)
        (again,) = torch.autograd.grad(found.sum(), x)
        close(again, -x.detach().sin())
        assert "create_graph=True" in lines(caplog)[0]

    def test_hooks(self, caplog: pytest.LogCaptureFixture) -> None:
        def f(x: Tensor) -> Tensor:
            y = x.sin()
            y.register_hook(lambda g: g * 2)
            return y * 3

        x = torch.randn(5, 3)
        close(answer(f, x, "eager"), torch.diag_embed(6 * x.cos()))
        assert "rows went through autograd" in lines(caplog)[0]

    def test_forward(self, caplog: pytest.LogCaptureFixture) -> None:
        model, x = mlp(), torch.randn(5, 3)
        close(answer(model, x, "eager", mode="forward"), reference.jacobian(model, x))
        assert "no walk in reverse" in lines(caplog)[0]


@pytest.mark.usefixtures("taken", "float64")
def test_a_compiler_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    def broken(module: Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no such compiler\nand pages about it")

    model = mlp()
    for _ in range(2):
        caplog.clear()
        x = torch.randn(5, 3)
        close(answer(model, x, broken), reference.jacobian(model, x))
        said = "compile=True, but not compiled: RuntimeError: no such compiler"
        assert lines(caplog) == [said]


@pytest.mark.usefixtures("taken", "float64")
def test_a_replay_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """The walk as it is, and not autograd one row at a time."""

    def breaks(module: Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        runs = iter([module] * 3)  # as often as it is compared and timed

        def run(*tensors: Tensor) -> Any:
            try:
                return next(runs)(*tensors)
            except StopIteration:
                raise RuntimeError("lost what was compiled") from None

        return run

    model = mlp()
    for _ in range(9):
        x = torch.randn(5, 3)
        close(answer(model, x, breaks), reference.jacobian(model, x))
    assert "lost what was compiled" in caplog.text
    assert "through autograd" not in caplog.text


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e20])
def test_how_far_a_replay_may_differ_goes_with_the_size(size: float) -> None:
    ours = torch.randn(4, 7) * size
    assert compiled._close(ours, ours * (1 + 1e-6), 3e-4)
    assert not compiled._close(ours, torch.zeros_like(ours), 3e-4)
    assert compiled._close(torch.zeros(4, 7), torch.zeros(4, 7), 3e-4)
    cancelling = torch.stack([ours[0], -ours[0] * 0.9553365 / 0.9])
    assert compiled._close(cancelling, cancelling * (1 + 1e-6), 3e-4)


@pytest.mark.usefixtures("taken", "float64")
@pytest.mark.parametrize("wrong", ["numbers", "shapes", "nan"])
def test_a_compiler_that_is_wrong(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    def changed(found: Tensor) -> Tensor:
        if wrong == "shapes":
            return found.unsqueeze(0)
        found = found.clone()
        found[-1, -1, -1] += torch.nan if wrong == "nan" else 1e-3
        return found

    def miscompiled(module: Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        return lambda *tensors: tuple(changed(found) for found in module(*tensors))

    model = mlp()
    for _ in range(2):
        caplog.clear()
        x = torch.randn(5, 3)
        close(answer(model, x, miscompiled), reference.jacobian(model, x))
        assert "differs from the walk" in lines(caplog)[0]


@pytest.mark.usefixtures("float64")
def test_what_is_slower_than_the_walk_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    def slow(module: Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            time.sleep(0.05)
            return module(*tensors)

        return run

    caplog.set_level(logging.DEBUG, "batchjac")
    model, x = mlp(), torch.randn(5, 3)
    for _ in range(2):
        close(answer(model, x, slow), reference.jacobian(model, x))
        (said,) = walks(caplog)
        assert "slow" not in said
        assert lines(caplog) == []


@pytest.mark.usefixtures("taken", "float64")
def test_nan_and_infinities_are_compared_as_they_are() -> None:
    x, count = torch.tensor([[0.0, 1.0], [4.0, torch.nan], [-1.0, 2.0]]), Counted()
    for _ in range(2):
        torch.testing.assert_close(
            answer(torch.sqrt, x, count), reference.jacobian(torch.sqrt, x), equal_nan=True
        )
    assert count.ran == 3


@pytest.mark.usefixtures("taken", "float64")
def test_no_tensor_of_a_call_is_kept() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(t) is Tensor and t.shape[-1:] == (1009,) for t in gc.get_objects())

    model = nn.Sequential(nn.Linear(2, 1009), nn.Tanh(), nn.Linear(1009, 3))
    before = alive()
    for compiler in ("eager", "aot_eager"):
        for _ in range(2):
            answer(model, torch.randn(5, 2), compiler)
    assert len(compiled._known) == 2
    assert alive() == before


@pytest.mark.usefixtures("taken", "float64")
def test_few_kinds_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MOST", 2)
    count = Counted()
    for n in (2, 3, 2, 4, 2, 3):
        x = torch.randn(n, 3)
        close(answer(torch.sin, x, count), torch.diag_embed(x.cos()))
    assert len(compiled._known) == 2
    assert count.compiled == 4  # 3 samples were forgotten, 2 were not
