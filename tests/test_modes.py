"""Forward and mixed modes: equal to the reference, within their budget, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import jacobian
from batchjac.cost import NOMINAL
from batchjac.cuts import slots
from batchjac.engines import mixed, reference
from batchjac.errors import UnsupportedError
from batchjac.graph import Graph
from batchjac.route import Passes, passes
from batchjac.testing import jacobian_in_chunks
from benchmarks.cases import CASES as NINE
from benchmarks.models import mlp
from tests.relatives import F64, MODES, SMALL, close, made
from tests.routes import every_route, planned, walk_by
from tests.zoo import CASES, seeded
from tests.zoo.verdict import difference, truth

pytestmark = pytest.mark.usefixtures("routes_are_taken")


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
    walk_by(monkeypatch, walk)
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
