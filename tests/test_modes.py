"""Forward and mixed modes: equal to the reference, within their budget, or refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import jacobian
from batchjac.cost import NOMINAL
from batchjac.cuts import slots
from batchjac.engines import mixed, reference
from batchjac.engines.forward import NoForwardRule
from batchjac.errors import UnsupportedError
from batchjac.graph import Graph
from batchjac.route import Join, Passes, Weight, passes
from batchjac.testing import jacobian_in_chunks
from benchmarks.cases import CASES as NINE
from benchmarks.models import Residual, mlp
from tests.routes import every_route, planned
from tests.zoo import CASES, seeded
from tests.zoo.verdict import difference, truth

F64 = torch.float64
MODES = ("forward", "mixed")


def close(found: Any, right: Any) -> None:
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


@pytest.fixture(autouse=True)
def routes_are_taken(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> Iterator[None]:
    """No test passes because rows went in reverse, or through autograd, in the end."""
    caplog.set_level(logging.INFO, logger="batchjac")
    yield
    if "falls_back" not in request.fixturenames:
        said = [r.getMessage() for r in caplog.get_records("call")]
        said = [m for m in said if "rows now go" in m]
        assert not said


@pytest.fixture
def falls_back() -> None:
    """Asked for by tests in which rows go another way in the end."""


# Small relatives of the nine benchmark models, in float64.


def small(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    return mlp(*widths, activation=activation)


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip


def cnn1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 3, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, 1, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(),
        Residual(3, 3, 1), Residual(3, 4, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean(1))
        return y


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet5": (lenet, (3, 1, 10, 10)),
    "1-D CNN": (cnn1d, (3, 1, 12)),
    "MLP 784-512-512-10": (small(9, 7, 7, 4), (5, 9)),
    "autoencoder": (small(9, 6, 2, 6, 9), (4, 9)),
    "field network": (small(2, 8, 8, 8, 3, activation=nn.Tanh), (6, 2)),
    "decoder": (small(3, 6, 8, 12), (4, 3)),
    "square block": (small(6, 9, 6, activation=nn.Tanh), (4, 6)),
    "small ResNet": (resnet, (2, 2, 6, 6)),
    "transformer encoder": (Encoder, (3, 5, 8)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = SMALL[name]
    torch.manual_seed(0)
    return build().eval().to(F64), torch.randn(shape, dtype=F64)


def test_every_benchmark_has_a_small_relative() -> None:
    assert list(SMALL) == [case.name for case in NINE]


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("name", SMALL)
def test_equal_to_the_reference(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every_route(monkeypatch)
    model, x = made(name)
    close(jacobian(model, x, mode=mode), reference.jacobian(model, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("name", ["autoencoder", "decoder", "small ResNet"])
def test_chunks_change_nothing(name: str, rows: int, samples: int, mode: str) -> None:
    model, x = made(name)
    found = jacobian_in_chunks(model, x, samples, rows, mode=mode)
    close(found, reference.jacobian(model, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["autoencoder", "decoder", "small ResNet", "transformer encoder"])
def test_predicted_passes_are_the_counted_ones(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = made(name)
    choice = planned(model, x, NOMINAL, mode=mode)
    assert choice is not None
    cuts: list[Any] = []  # of the graph that is walked, not of the one that was planned
    rows = columns = products = 0

    def count(graph: Graph) -> int:
        return sum(slot in cuts for step in graph.steps for slot in slots(step)) - 1

    def walk(graph: Graph, seeds: Any, *rest: Any) -> Any:
        nonlocal rows
        (block,) = seeds.values()
        rows += block.rows * count(graph)
        return real_walk(graph, seeds, *rest)

    def tangents(graph: Graph, seeds: Any, *rest: Any) -> Any:
        nonlocal columns
        (block,) = seeds.values()
        columns += block.rows * count(graph)
        return real_tangents(graph, seeds, *rest)

    def product(a: Tensor, b: Tensor, *out: Any) -> Tensor:
        nonlocal products
        products += a.shape[1] * a.shape[2] * b.shape[2]
        return real_product(a, b, *out)

    def way(graph: Graph, slots: Any, *rest: Any) -> mixed.Way:
        cuts[:] = slots
        return real_way(graph, slots, *rest)

    real_way = mixed.Way
    real_walk, real_tangents, real_product = mixed.walk, mixed.tangents, mixed.product
    monkeypatch.setattr(mixed, "walk", walk)
    monkeypatch.setattr(mixed, "tangents", tangents)
    monkeypatch.setattr(mixed, "product", product)
    monkeypatch.setattr(batchjac.job, "Way", way)
    jacobian(model, x, mode=mode)
    assert Passes(rows, columns, products) == passes(choice.route, choice.chain)
    assert rows + columns > 0
    assert (products > 0) == (mode == "mixed")


# The zoo: branches, residuals, recurrences, several inputs and outputs, shared and repeated parts.

ZOO = [
    c
    for c in CASES
    if c.expects is None
    and c.options.get("coupling", "error") == "error"
    and c.group
    in ("attention", "convolutional", "feedforward", "functions", "inplace", "kinks",
        "normalisation", "recurrent", "routing", "sharing", "structures")
]  # fmt: skip


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("case", ZOO, ids=lambda c: c.name)
@pytest.mark.usefixtures("falls_back")
def test_the_zoo_is_right_or_refused_by_name(
    case: Any, mode: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    every_route(monkeypatch)
    f, inputs = case.build()
    found, refusal = None, ""
    try:
        with case.around(), seeded(case.seed):
            found = jacobian(f, inputs, **{**case.options, "mode": mode})
    except UnsupportedError as error:
        refusal = str(error)
    record_property("tally", f"{mode}: {'refused' if refusal else 'right'}")
    if refusal:
        assert f'mode="{mode}"' in refusal
        assert mode != "auto"
    else:
        assert not difference(found, truth(case), case)


# What is asked for.


class Branches(nn.Module):
    """Two inputs, two outputs, a residual, a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.twice = nn.Linear(6, 6)
        self.last = nn.Linear(6, 5)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        h = self.first(a).tanh() * b
        h = h + self.twice(self.twice(h).sin())
        return {"y": self.last(h.tanh()), "h": h.tanh()}


def branches() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return Branches().to(F64), (torch.randn(3, 4, dtype=F64), torch.randn(3, 6, dtype=F64))


WRT: tuple[Any, ...] = (
    None, "first", ["inputs", "first"], "parameters", ["first.weight", "last.bias", "inputs"],
)  # fmt: skip


@pytest.mark.parametrize("mode", ["forward", "auto"])
@pytest.mark.parametrize("wrt", WRT, ids=str)
def test_several_inputs_outputs_and_targets(
    wrt: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_route(monkeypatch)
    model, x = branches()
    close(jacobian(model, x, wrt=wrt, mode=mode), reference.jacobian(model, x, wrt=wrt))


@pytest.mark.parametrize(
    "wrt", [None, ["inputs", "0"], "0.weight", "0.bias", ["0.weight", "2.bias"]]
)
def test_mixed_towards_layers_and_parameters(wrt: Any) -> None:
    model, x = made("autoencoder")
    model = model[:6]
    close(jacobian(model, x, wrt=wrt, mode="mixed"), reference.jacobian(model, x, wrt=wrt))


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_one_sample_and_one_output(mode: str) -> None:
    model, x = made("square block")
    close(jacobian(model, x[:1], mode=mode), reference.jacobian(model, x[:1]))
    close(jacobian(model, x, of="0", mode="forward"), reference.jacobian(model, x, of="0"))


SELECTED: tuple[Any, ...] = (
    2, [3, 0, 3], slice(1, 3), torch.tensor([0, 3, 2, 2]), "argmax", [], slice(None),
    slice(None, None, -1),
)  # fmt: skip


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("name", ["autoencoder", "decoder", "linear first"])
@pytest.mark.parametrize("outputs", SELECTED, ids=str)
def test_selected_outputs(
    name: str, outputs: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_route(monkeypatch)
    if name == "linear first":  # its last Jacobian is a weight, of which rows are taken
        torch.manual_seed(0)
        model, x = mlp(30, 20, 4)().to(F64), torch.randn(4, 30, dtype=F64)
    else:
        model, x = made(name)
    close(
        jacobian(model, x, outputs=outputs, mode=mode),
        reference.jacobian(model, x, outputs=outputs),
    )


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("name", ["autoencoder", "field network", "small ResNet"])
def test_second_derivatives(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every_route(monkeypatch)
    model, x = made(name)

    def second(j: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        found = j(model, leaf, create_graph=True, **options)
        assert found.requires_grad
        weights = torch.linspace(-1, 1, found.numel(), dtype=F64).reshape(found.shape)
        starts = [leaf, *model.parameters()]
        grads = torch.autograd.grad((found * weights).square().sum(), starts, allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in grads]

    for found, right in zip(second(jacobian, mode=mode), second(reference.jacobian), strict=True):
        close(found, right)


@pytest.mark.parametrize("mode", MODES)
def test_written_into_the_callers_memory(mode: str) -> None:
    model, x = made("small ResNet")
    right = reference.jacobian(model, x)
    out = torch.full(right.shape, torch.nan, dtype=F64)
    jacobian(model, x, mode=mode, out=out)
    close(out, right)
    *lead, high, wide = right.shape
    apart = torch.full((*lead, high + 3, wide), torch.nan, dtype=F64)[..., :high, :]
    with pytest.raises(RuntimeError):  # its axes cannot be seen as one
        apart.view(*lead[:2], -1)
    jacobian_in_chunks(model, x, 2, 3, mode=mode, out=apart)
    close(apart, right)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_statistics(mode: str) -> None:
    model, x = made("small ResNet")
    model.train()
    right = reference.jacobian(model, x, coupling="frozen")
    close(jacobian(model, x, coupling="frozen", mode=mode), right)


def test_half_precision_on_the_way() -> None:
    model, x = made("decoder")
    model, x = model.float(), x.float()
    right = jacobian(model, x, mode="reverse")
    with torch.autocast("cpu", torch.bfloat16):
        found = jacobian(model, x, mode="forward")
    torch.testing.assert_close(found, right, rtol=0.1, atol=0.05)


# What cannot be answered, and who says so.


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def owned(x: Tensor) -> Tensor:
    y: Tensor = Own.apply(x.sin())  # type: ignore[no-untyped-call]
    return y.cos()


X = torch.randn(3, 4, dtype=F64)


def test_a_node_without_a_forward_rule_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r'^mode="forward": node OwnBackward has no forward'):
        jacobian(owned, X, mode="forward")


def test_a_stage_without_forward_rules_goes_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    every_route(monkeypatch)
    torch.manual_seed(0)
    layers = mlp(9, 6, 2, 6, 9)().to(F64)

    def f(x: Tensor) -> Tensor:
        y: Tensor = layers[4:](owned(layers[:4](x)))
        return y

    x = torch.randn(4, 9, dtype=F64)
    choice = planned(f, x, NOMINAL, mode="mixed")
    assert choice is not None
    assert not all(stage.forward for stage in choice.chain.stages)
    for mode in ("mixed", "auto"):
        close(jacobian(f, x, mode=mode), reference.jacobian(f, x))


def test_a_function_without_a_cut_cannot_be_mixed() -> None:
    with pytest.raises(UnsupportedError, match="through which every path"):
        jacobian(lambda x: x.sin() + x, X, mode="mixed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coupling", ["sum", "full"])
def test_coupled_samples_go_in_reverse(coupling: str, mode: str) -> None:
    with pytest.raises(UnsupportedError, match=f'coupling="{coupling}" goes in reverse'):
        jacobian(nn.Tanh(), X, coupling=coupling, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_run_in_reverse_only(mode: str) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda g: 2 * g)
        return y.cos()

    with pytest.raises(UnsupportedError, match="hooks on gradients"):
        jacobian(f, X, mode=mode)
    close(jacobian(f, X), reference.jacobian(f, X))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("falls_back")
def test_a_wrong_forward_rule_is_found_out(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = mixed.tangents

    def wrong(*arguments: Any) -> Any:
        block = real(*arguments)
        return block.with_data(block.data * 1.01)

    def wrong_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        found = 1.01 * torch.matmul(a, b)
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(mixed, "tangents", wrong)
    monkeypatch.setattr(mixed, "product", wrong_product)
    model, x = made("autoencoder")
    close(jacobian(model, x, mode="reverse"), reference.jacobian(model, x))
    close(jacobian(model, x, mode=mode), reference.jacobian(model, x))  # not trusted for that
    said = [m for m in caplog.messages if "disagree" in m]
    assert said == ["autograd and the chosen directions disagree: rows now go in reverse"]


def test_an_axis_without_entries() -> None:
    model, x = made("decoder")
    for mode in MODES:
        j = jacobian(lambda x: model(x.sum(2)), torch.zeros(*x.shape, 0, dtype=F64), mode=mode)
        assert j.shape == (4, 12, 3, 0)


@pytest.mark.usefixtures("falls_back")
def test_factors_that_are_not_finite_are_not_joined(caplog: pytest.LogCaptureFixture) -> None:
    case = next(c for c in CASES if c.name == "max_pool_of_infinite_slope")
    f, x = case.build()
    assert not difference(jacobian(f, x, mode="mixed"), truth(case), case)
    assert "the Jacobians on the way are not finite: rows now go in reverse" in caplog.messages


# Auto.


def test_few_rows_and_short_calls_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any) -> Any:
        raise AssertionError("planned")

    monkeypatch.setattr(batchjac.choose, "cuts", no)
    model, x = made("decoder")
    jacobian(model, x)
    jacobian(mlp(100, 2000, 2000, 4)(), torch.randn(8, 100))


def test_a_wide_output_goes_forward_by_itself() -> None:
    model, x = NINE[5].make()
    calls = []
    real = mixed.tangents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "tangents", lambda *a: calls.append(1) or real(*a))
        jacobian(model, x[:16])
    assert calls


def test_two_targets_share_one_walk_unless_routes_beat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    every_route(monkeypatch)
    model, x = made("autoencoder")
    wrt = ["0", "2", "4", "inputs"]
    close(jacobian(model, x, wrt=wrt), reference.jacobian(model, x, wrt=wrt))


# Memory; that a budget is kept is tests/test_memory.py's.


@pytest.mark.usefixtures("falls_back")
@pytest.mark.parametrize("mode", ["mixed", "auto"])
def test_where_no_joined_jacobian_fits_rows_go_in_reverse(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    every_route(monkeypatch)
    torch.manual_seed(0)
    model, x = mlp(300, 200, 100, 200, 300)(), torch.randn(2, 300)
    right = jacobian(model, x, mode="reverse")
    found = jacobian(model, x, mode=mode, max_memory=right.nbytes + 100_000)
    torch.testing.assert_close(found, right)
    assert "max_memory does not hold the Jacobians on the way: rows now go in reverse" in (
        caplog.messages
    )


def test_the_autoencoder_is_joined_at_its_bottleneck() -> None:
    model, x = NINE[3].make()
    choice = planned(model, x, NOMINAL)
    assert choice is not None
    assert isinstance(choice.route, Join)
    assert choice.chain.widths[choice.route.above.lower] == 16


# What is found out once.


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """One entry for each call of a function of ``choose``."""
    calls: list[int] = []
    real = getattr(batchjac.choose, name)

    def noted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(batchjac.choose, name, noted)
    return calls


def test_a_question_left_to_reverse_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    every_route(monkeypatch)
    monkeypatch.setattr(batchjac.choose, "MARGIN", 1e9)
    calls = counted(monkeypatch, "cuts")
    model, x = made("decoder")
    for _ in range(3):
        jacobian(model, x)
    assert len(calls) == 1
    jacobian(model, x[:2])
    assert len(calls) == 2


@pytest.mark.usefixtures("falls_back")
def test_a_rule_that_declines_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    every_route(monkeypatch)
    monkeypatch.setattr(batchjac.choose, "_declined", set())
    asked = []

    def declines(*_: Any) -> Any:
        asked.append(1)
        raise NoForwardRule("ReluBackward0")

    monkeypatch.setattr(mixed, "tangents", declines)
    torch.manual_seed(0)
    model, x = mlp(2, 9, 300)().to(F64), torch.randn(4, 2, dtype=F64)
    right = reference.jacobian(model, x)
    for _ in range(3):
        close(jacobian(model, x), right)
    assert len(asked) == 1
    assert any("no forward rule for this case of node ReluBackward0" in m for m in caplog.messages)
    with pytest.raises(UnsupportedError, match=r"no rule for this case of node ReluBackward0"):
        jacobian(model, x, mode="forward")


def test_a_weight_is_scaled_as_its_node_scales_it() -> None:
    w = torch.randn(9, 40, dtype=F64)
    b = torch.zeros(40, dtype=F64)

    def f(x: Tensor) -> Tensor:
        return torch.addmm(b, torch.addmm(b[:9], x.tanh(), w[:, :9], alpha=3).tanh(), w, alpha=2)

    x = torch.randn(3, 9, dtype=F64)
    choice = planned(f, x, NOMINAL, mode="mixed")
    assert choice is not None
    assert any(isinstance(node, Weight) for node in choice.route)
    close(jacobian(f, x, mode="mixed"), reference.jacobian(f, x))


def test_towards_a_parameter_whose_samples_are_lost_on_the_way() -> None:
    """No rule says where the samples are below such a node, and columns need not know."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Lost(), nn.Linear(3, 5)).to(F64)
    x = torch.randn(3, 4, dtype=F64)
    found = jacobian(model, x, wrt=["0.bias", "2.bias"], mode="forward")
    close(found, reference.jacobian(model, x, wrt=["0.bias", "2.bias"]))


class Lost(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.t().reshape(-1).reshape(x.shape[1], -1).t().sin()
