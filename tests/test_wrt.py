"""``of=`` and ``wrt=``: inputs, layers and parameters, several from one forward and one walk."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, value_and_jacobian
from batchjac.engines import reference, sweep
from batchjac.testing import jacobian_in_chunks
from tests.common import N, batch, close, diagonal, mlp
from tests.routes import walk_by

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # compiling and forward mode load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


# of= and wrt=


class Branches(nn.Module):
    """Named layers, a shared one, a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv1d(1, 2, 2), act=nn.Tanh()))
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.unsqueeze(1)).flatten(1)
        y: Tensor = self.left(h) * self.right(h)
        return y


WANTED = [
    "inputs", "stem", "stem.conv", "stem.act", "left", "stem.conv.weight", "left.bias",
    "right.bias", "left.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", WANTED)
def test_wrt_one_name_gives_a_tensor(name: str) -> None:
    model, x = Branches(), batch()
    j = jacobian(model, x, wrt=name)
    assert isinstance(j, Tensor)
    close(j, reference.jacobian(model, x, wrt=name))


def test_wrt_a_list_gives_a_dict_in_its_order() -> None:
    model, x = Branches(), batch()
    names = [WANTED[k] for k in (4, 0, 7, 1, 5)]
    j = jacobian(model, x, wrt=names)
    assert list(j) == names
    for name in names:
        close(j[name], jacobian(model, x, wrt=name))
    assert list(jacobian(model, x, wrt=["left"])) == ["left"]
    assert list(jacobian(model, x, wrt=("left", "left"))) == ["left"]


def test_wrt_parameters() -> None:
    model, x = Branches(), batch()
    j = jacobian(model, x, wrt="parameters")
    assert list(j) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert j[name].shape == (N, 3, *p.shape)
        close(j[name], reference.jacobian(model, x, wrt=name))
    both = jacobian(model, x, wrt=["parameters", "inputs"])
    assert list(both) == [*j, "inputs"]


def test_wrt_a_tied_parameter_by_either_name() -> None:
    model, x = Branches(), batch()
    j = jacobian(model, x, wrt=["left.weight", "right.weight"])
    assert set(j) == {"left.weight", "right.weight"}
    close(j["right.weight"], j["left.weight"])


def test_wrt_frozen_parameters() -> None:
    """What does not require a gradient has a derivative all the same."""
    model, x = mlp(), batch()
    expected = jacobian(model, x, wrt="parameters")
    model.requires_grad_(False)
    close(jacobian(model, x, wrt="parameters"), expected)
    close(jacobian(model, x, wrt="0.bias"), expected["0.bias"])


def test_wrt_inputs_and_a_layer_with_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            h = self.layer(a)
            return {"sum": h + b, "product": h * b}

    model, a, b = Two(), batch(), batch(2)
    j = jacobian(model, (a, b), wrt=["inputs", "layer"])
    assert list(j) == ["sum", "product"]  # outputs over names over inputs
    assert list(j["product"]) == ["inputs", "layer"]
    close(j["product"]["layer"], diagonal(b))
    close(j["product"]["inputs"][1], diagonal(model.layer(a).detach()))
    close(j["sum"]["inputs"][0], model.layer.weight.detach().expand(N, 2, 3))


def test_wrt_a_layer_with_several_outputs() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split = Split()

        def forward(self, x: Tensor) -> Tensor:
            a, parts = self.split(x)
            return a * parts["b"]

    class Split(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.sin(), {"b": x.exp(), "n": x.argmax(1)}

    x = batch()
    j = jacobian(Recurrent(), x, wrt="split")
    assert type(j) is tuple
    assert j[1]["n"] is None
    close(j[0], diagonal(x.exp()))
    close(j[1]["b"], diagonal(x.sin()))


def test_wrt_a_layer_behind_integers() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 2))
    tokens = torch.randint(0, 7, (N, 2))
    expected = model[2].weight.detach().view(2, 2, 3).expand(N, 2, 2, 3)
    close(jacobian(model, tokens, wrt="0"), expected)
    found = jacobian(model, tokens, wrt="0.weight")
    close(found, reference.jacobian(model, tokens, wrt="0.weight"))


@pytest.mark.parametrize("of", ["stem", "stem.conv", "left"])
@pytest.mark.parametrize("wrt", [None, "stem.conv", "stem.conv.bias"])
def test_of(of: str, wrt: str | None) -> None:
    model, x = Branches(), batch()
    close(jacobian(model, x, of=of, wrt=wrt), reference.jacobian(model, x, of=of, wrt=wrt))


def test_of_a_layer_that_is_overwritten_afterwards() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    close(jacobian(model, batch(), of="0"), model[0].weight.detach().expand(N, 4, 3))


class Forwards(nn.Module):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.norm = nn.BatchNorm1d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        counts["forward"] += 1
        y: Tensor = self.norm(self.layers(x))
        return y


counts: Counter[str] = Counter()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Forwards, walks and rows pushed since the test began."""
    counts.clear()
    walk = sweep.walk

    def counting(graph: Any, seeds: Any, *rest: Any, **more: Any) -> Any:
        counts["walk"] += 1
        counts["rows"] += sum(block.rows for block in seeds.values())
        return walk(graph, seeds, *rest, **more)

    walk_by(monkeypatch, counting)
    return counts


MANY = ["inputs", "layers.0", "layers.2", "layers.0.weight", "layers.4.bias", "norm.weight"]


@pytest.mark.parametrize(
    ("wrt", "outputs", "rows"),
    [("inputs", None, 4), ("layers.2", None, 4), (MANY, None, 4), ("parameters", None, 4),
     (MANY, [0, 3], 2), ("inputs", "argmax", 1)],
)  # fmt: skip
def test_one_forward_and_one_walk(wrt: Any, outputs: Any, rows: int, counted: Counter[str]) -> None:
    jacobian(Forwards(), batch(), wrt=wrt, outputs=outputs)
    assert counted == {"forward": 1, "walk": 1, "rows": rows}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(),
            nn.MaxPool1d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "wrt", [["features.3", "inputs", "features.1"], ["inputs", "features.3", "head.weight"]]
)
def test_several_cost_what_the_deepest_does(
    wrt: list[str], create_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every node is passed once, as for the deepest alone, and no other is."""
    passed: Counter[str] = Counter()
    took = sweep.Kernels.took

    def counting(self: sweep.Kernels, name: str, way: str) -> None:
        passed[name] += 1
        took(self, name, way)

    monkeypatch.setattr(sweep.Kernels, "took", counting)
    model, x = Classifier(), batch(1, 8)
    calls = []
    jacobian(model, x, wrt=wrt, create_graph=create_graph)  # compared with autograd this once
    for question in (wrt, "inputs"):
        passed.clear()
        jacobian(model, x, wrt=question, create_graph=create_graph)
        calls.append(dict(passed))
    calls[0].pop("TBackward0", None)  # on the way to a weight, and to nothing else
    assert calls[0] == calls[1]
    assert calls[0]["ConvolutionBackward0"] == 2


@pytest.mark.parametrize("outputs", [None, [2, 0], "argmax"])
@pytest.mark.parametrize("mode", ["auto", "forward", "mixed"])
def test_several_in_chunks_and_with_a_history(mode: str, outputs: Any) -> None:
    model, x = Classifier(), batch(1, 8).requires_grad_()
    wrt = ["inputs", "features.3", "head.weight"]
    goals = [x, *model.parameters()]

    def loss(j: dict[str, Tensor]) -> Tensor:
        parts = (part.pow(2).sum() * k for k, part in enumerate(j.values(), 1))
        return sum(parts, torch.zeros(()))

    expected = reference.jacobian(model, x, wrt=wrt, outputs=outputs, create_graph=True)
    options = {"wrt": wrt, "outputs": outputs, "mode": mode}
    whole = jacobian(model, x, create_graph=True, **options)
    chunked = jacobian_in_chunks(model, x, 2, 1, create_graph=True, **options)
    close(jacobian_in_chunks(model, x, 2, 1, **options), {k: v.detach() for k, v in whole.items()})
    theirs = torch.autograd.grad(loss(expected), goals, allow_unused=True)
    for found in (whole, chunked):
        assert list(found) == wrt
        close(found, expected)
        close(torch.autograd.grad(loss(found), goals, allow_unused=True), theirs)


def test_value_and_jacobian_is_one_forward_too(counted: Counter[str]) -> None:
    value_and_jacobian(Forwards(), batch())
    assert counted == {"forward": 1, "walk": 1, "rows": 4}
