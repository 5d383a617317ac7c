"""Grams and norms toward parameters, whose rows stay products of cotangents and activations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchjac
from batchjac import factors, gram
from batchjac.block import Block
from batchjac.errors import BudgetError
from batchjac.factors import Factored, Pair, Sizes
from batchjac.rules import registry
from benchmarks.models import small_resnet
from tests.common import close, parameter_rows

pytestmark = pytest.mark.usefixtures("float64")


class Tied(nn.Module):
    """One matrix four times: twice as it is, once as its transpose, once by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(torch.tanh(self.inner(x))) @ self.inner.weight)
        y: Tensor = self.head(h) + (self.inner.weight * x[:, :, None]).sum((1, 2))[:, None]
        return y


class Twice(nn.Module):
    """A convolution used at two sizes of image, and a Linear on every place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.each, self.head = nn.Linear(4, 3), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(F.avg_pool2d(torch.tanh(self.conv(x)), 2)))
        y: Tensor = self.head(torch.tanh(self.each(h)).flatten(1))
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cell(x)[0][:, -1])
        return y


class Stem(nn.Module):
    """Parameters that no layer multiplies: a scale, a table, a weight that is made from another."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.table = nn.Embedding(7, 3)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))

    def forward(self, i: Tensor) -> Tensor:
        y: Tensor = self.head((self.table(i) * self.scale).flatten(1))
        return y


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2, bias=False), nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(108, 3),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 3)).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "a perceptron": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda: torch.randn(4, 5),
    ),
    "convolutions": (convolutions, lambda: torch.randn(4, 2, 5, 5)),
    "1-D": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)),
        lambda: torch.randn(3, 2, 6),
    ),
    "a residual network": (lambda: small_resnet().eval(), lambda: torch.randn(3, 3, 8, 8)),
    "tokens": (encoder, lambda: torch.randn(4, 5, 4)),
    "tied": (Tied, lambda: torch.randn(4, 6)),
    "used twice": (Twice, lambda: torch.randn(3, 2, 8, 8)),
    "recurrent": (Recurrent, lambda: torch.randn(4, 5, 3)),
    "no layers": (Stem, lambda: torch.randint(0, 7, (4, 2))),
}
every = pytest.mark.parametrize("name", MODELS)


def check(f: nn.Module, x: Any, **options: Any) -> None:
    """All three figures against the dense rows."""
    a, rows = batchjac.operator(f, x, wrt="parameters", **options), parameter_rows(f, x)
    close(a.norm(squared=True), rows.square().sum((1, 2)))
    close(a.gram(), rows @ rows.mT)
    close(a.gram(across=True), torch.einsum("nop,mqp->nomq", rows, rows))


@every
def test_figures_are_those_of_the_rows(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """And factors need no second way: nothing is said of it."""
    model, inputs = MODELS[name]
    with caplog.at_level("WARNING", "batchjac"):
        check(model(), inputs())
    assert not caplog.text


@every
@pytest.mark.parametrize("formed", [False, True])
def test_both_ways_of_each_layer_agree(
    name: str, formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By factors and by forming, whatever operations say; a little at a time, and all at once."""
    cost = 1 << 62 if formed else 0
    monkeypatch.setattr(Sizes, "meeting", lambda self, pairs, rows: cost)
    model, inputs = MODELS[name]
    f, x = model(), inputs()
    check(f, x)
    monkeypatch.setattr(gram, "_MOST", 40)
    monkeypatch.setattr(gram, "_LEAST", 40)
    check(f, x)


@every
def test_rows_are_not_formed_where_factors_are_fewer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix of a layer comes as factors, also where it is used more than once."""
    came: list[tuple[int, ...]] = []
    original = gram.Within.factored

    def factored(self: gram.Within, f: Factored) -> None:
        came.append(f.shape)
        original(self, f)

    monkeypatch.setattr(gram.Within, "factored", factored)
    model, inputs = MODELS[name]
    f = model()
    batchjac.operator(f, inputs(), wrt="parameters").gram()
    layers = [m for m in f.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    expected = {
        # a matrix that is also multiplied by itself, or made from another, comes as rows
        "tied": [(3, 6)], "no layers": [], "recurrent": [(2, 4), (12, 3), (12, 4)],
        "tokens": [*(tuple(m.weight.shape) for m in layers), (12, 4)],
    }.get(name, [tuple(m.weight.shape) for m in layers])  # fmt: skip
    assert sorted(came) == sorted(expected)


def test_a_layer_is_gone_before_the_next_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of autograd's engine: a weight before what its layer took."""
    order: list[int] = []
    original = gram.Norms.factored

    def factored(self: gram.Norms, f: Factored) -> None:
        order.append(f.shape[0])
        original(self, f)

    monkeypatch.setattr(gram.Norms, "factored", factored)
    widths = (3, 4, 5, 6, 7, 8)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    batchjac.operator(nn.Sequential(*layers), torch.randn(2, 3), wrt="parameters").norm()
    assert order == [8, 7, 6, 5, 4]


@pytest.mark.parametrize("budget", [110_000, 160_000, 300_000, 2_000_000])
def test_parts_change_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples and rows at a time, and every pair of parts once."""
    f = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 6))
    x = torch.randn(7, 6)
    seen: list[tuple[int, int]] = []
    original = gram._one

    def one(*args: Any) -> Any:
        seen.append((len(args[3]), len(args[4])))
        return original(*args)

    monkeypatch.setattr(gram, "_one", one)
    check(f, x, max_memory=budget)
    fewest = min(n * v for n, v in seen)
    assert (fewest < 42) == (budget < 200_000), seen


def test_too_little_memory_says_so() -> None:
    f, x = small_resnet().eval(), torch.randn(3, 3, 8, 8)
    a = batchjac.operator(f, x, wrt="parameters", max_memory="1.5MiB")
    with pytest.raises(BudgetError, match="max_memory leaves"):
        a.gram(across=True)


def test_where_the_samples_are_lost_rows_are_formed() -> None:
    """No rule says where the samples are behind polygamma, nor whose gradient is whose."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.polygamma(1, 1 + self.first(x) ** 2))
            return y

    f, x = Odd(), torch.randn(4, 5)
    recording = batchjac.operator(f, x, wrt="parameters")._kept
    assert recording is not None
    assert not gram.Factors(recording).ready
    check(f, x)


def test_a_hook_on_a_gradient_runs_for_every_row() -> None:
    class Hooked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(super().forward(x))
            h.register_hook(lambda g: g.clamp(-0.3, 0.3))
            return h * 2

    check(nn.Sequential(Hooked(3, 4), nn.Linear(4, 2)), torch.randn(4, 3))


@pytest.mark.parametrize("wrong", ["values", "nothing"])
def test_wrong_factors_are_found_and_not_used(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = registry._RULES["AddmmBackward0"]
    assert right.factors is not None

    def spoiled(*args: Any) -> Any:
        found = list(right.factors(*args))  # type: ignore[misc]  # seen above
        for k, f in enumerate(found):
            if isinstance(f, Factored):
                pair = f.pairs[0]
                worse = Pair(pair.cotangent * 1.01, pair.activation, pair.last)
                found[k] = replace(f, pairs=(worse,)) if wrong == "values" else None
        return found

    monkeypatch.setitem(registry._RULES, "AddmmBackward0", replace(right, factors=spoiled))
    with caplog.at_level("WARNING", "batchjac"):
        check(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3))
    assert "disagree" in caplog.text


def test_several_outputs_of_one_function() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            h = torch.tanh(self.body(x))
            return {"a": self.a(h), "b": (self.b(h), h.sum(1))}

    f, x = Two(), torch.randn(4, 3)
    a, j = batchjac.operator(f, x, wrt="parameters"), batchjac.jacobian(f, x, wrt="parameters")
    names = [n for n, _ in f.named_parameters()]
    blocks = [(j["a"], 2), (j["b"][0], 3), (j["b"][1], 1)]
    rows = torch.cat([torch.cat([b[n].reshape(4, o, -1) for n in names], 2) for b, o in blocks], 1)
    close(a.gram(across=True), torch.einsum("nop,mqp->nomq", rows, rows))
    close(a.gram(), rows @ rows.mT)


def test_half_precision_is_added_up_in_single() -> None:
    f = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    x = torch.randn(4, 6)
    exact = batchjac.operator(f, x, wrt="parameters").gram(across=True)
    half = batchjac.operator(f.bfloat16(), x.bfloat16(), wrt="parameters").gram(across=True)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


def test_add_products_fills_the_upper_half() -> None:
    rows, total = torch.randn(300, 7), torch.zeros(300, 300)
    factors.add_products(total, rows)
    close(total.triu(), (rows @ rows.T).triu())


def test_factored_rows_add_up_with_formed_ones() -> None:
    """Law: ``block()`` is the sum of all that was taken."""

    def one(order: bool = False) -> Factored:
        pair = Pair(torch.randn(2, 3, 1, 4, 5), torch.randn(3, 1, 6, 5), 1)
        return Factored((pair,), (6, 4) if order else (4, 6), order)

    first, second, turned = one(), one(), one(order=True).transposed((4, 6))
    block = Block(torch.randn(6, 4, 6), (4, 6))
    blocks = [f.block().data for f in (first, second, turned)]
    first.take(second)
    first.take(turned)
    assert first.rest is None
    assert first.sizes.p == 15
    first.take(block)
    close(first.block().data, sum(blocks) + block.data)
