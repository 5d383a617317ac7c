"""Every keyword of ``jacobian`` and ``value_and_jacobian``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, value_and_jacobian
from batchjac.engines import reference
from batchjac.testing import jacobian_in_chunks
from tests.common import N, Result, batch, close, diagonal, mlp

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # compiling and forward mode load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


# The two functions.


def test_both_functions_take_the_same_arguments() -> None:
    one, two = inspect.signature(jacobian), inspect.signature(value_and_jacobian)
    assert one.parameters == two.parameters
    kinds = [p.kind for p in one.parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}


VALUES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "a tensor": (torch.sin, batch),
    "a tuple": (lambda x: (x.sin(), x.sum(1)), batch),
    "a dict with an integer": (lambda x: {"y": x.exp(), "top": x.argmax(1)}, batch),
    "a dataclass with a text": (lambda x: Result(x * 2, "said"), batch),
    "nothing that depends": (lambda x: torch.ones(len(x), 2), batch),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("budget", [None, "2kB"])
def test_the_value_is_what_f_returns(name: str, budget: str | None) -> None:
    f, inputs = VALUES[name]
    x = inputs()
    y, j = value_and_jacobian(f, x, max_memory=budget)
    expected = f(x)
    assert type(y) is type(expected)
    if isinstance(expected, Result):
        assert y.extra == "said"
        y, expected = y.y, expected.y
    close(y, expected)
    leaf = y if isinstance(y, Tensor) else next(iter(y.values() if isinstance(y, dict) else y))
    assert not leaf.requires_grad
    assert leaf.grad_fn is None
    found, again = jacobian(f, x), j
    if isinstance(found, Result):
        found, again = found.y, again.y
    close(again, found)


def test_the_value_of_an_inner_layer() -> None:
    model, x = mlp(), batch()
    y, j = value_and_jacobian(model, x, of="2")
    close(y, model[:3](x).detach())
    close(j, jacobian(model[:3], x))


def test_the_value_of_a_selection_is_whole() -> None:
    model, x = mlp(), batch()
    y, j = value_and_jacobian(model, x, outputs=[1])
    close(y, model(x).detach())
    assert j.shape == (N, 1, 3)


def test_the_value_with_a_history_has_one() -> None:
    model, x = mlp(), batch().requires_grad_()
    y, _ = value_and_jacobian(model, x, create_graph=True)
    close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(model(x).sum(), x))


# What is called.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = torch.tanh(self.layer(x)) * scale
        return y

    def encode(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m, lambda m: m.forward, lambda m: functools.partial(m, scale=1.0),
        lambda m: lambda x: m(x), lambda m: functools.partial(m.forward),
        lambda m: functools.partial(lambda m, x: m(x), m), lambda m: torch.compile(m),
    ],
    ids=["module", "method", "partial", "closure", "partial of a method", "module as argument",
         "compiled"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_every_way_to_call_a_model(call: Callable[[Model], Callable[..., Any]]) -> None:
    model, x = Model(), batch()
    close(jacobian(call(model), x), reference.jacobian(model, x))


@pytest.mark.parametrize(
    "call", [lambda m: m, lambda m: m.forward, functools.partial, torch.compile],
    ids=["module", "method", "partial", "compiled"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_names_are_found_behind_every_caller(call: Callable[[Model], Callable[..., Any]]) -> None:
    model, x = Model(), batch()
    close(jacobian(call(model), x, wrt="layer"), reference.jacobian(model, x, wrt="layer"))
    close(
        jacobian(call(model), x, wrt="layer.weight"),
        reference.jacobian(model, x, wrt="layer.weight"),
    )


def test_another_method_of_a_module() -> None:
    model = Model()
    close(jacobian(model.encode, batch()), model.layer.weight.detach().expand(N, 4, 3))
    found = jacobian(model.encode, batch(), wrt="layer.bias")
    close(found, torch.eye(4).expand(N, 4, 4))


def test_a_callable_object_and_a_builtin() -> None:
    class Callable_:
        def __call__(self, x: Tensor) -> Tensor:
            return x.square()

    x = batch()
    close(jacobian(Callable_(), x), diagonal(2 * x))
    close(jacobian(torch.sin, x), diagonal(x.cos()))
    close(jacobian(Tensor.cos, x), diagonal(-x.sin()))


# outputs=


SELECTIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "an int": (2, lambda j: j[:, 2]),
    "the last": (-1, lambda j: j[:, -1]),
    "a list": ([3, 0], lambda j: j[:, [3, 0]]),
    "a tuple": ((1,), lambda j: j[:, [1]]),
    "a range": (range(1, 3), lambda j: j[:, 1:3]),
    "a slice": (slice(1, None), lambda j: j[:, 1:]),
    "every other": (slice(None, None, 2), lambda j: j[:, ::2]),
    "the same twice": ([1, 1], lambda j: j[:, [1, 1]]),
    "one each": (torch.tensor([0, 3, 2, 2, -1]), lambda j: j[range(N), [0, 3, 2, 2, 3]]),
    "one each, small integers": (
        torch.tensor([0, 3, 2, 2, 1], dtype=torch.int32), lambda j: j[range(N), [0, 3, 2, 2, 1]],
    ),
    "one number": (torch.tensor(2), lambda j: j[:, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("inner", [(), (2,)], ids=["[N, 4]", "[N, 4, 2]"])
@pytest.mark.parametrize("wrt", [None, "0", "0.weight"])
def test_selected_outputs(name: str, inner: tuple[int, ...], wrt: str | None) -> None:
    selection, pick = SELECTIONS[name]
    model: nn.Module = mlp()
    if inner:
        model = nn.Sequential(*model, nn.Linear(4, 8), nn.Unflatten(1, (4, 2)))
    x = batch()
    whole = reference.jacobian(model, x, wrt=wrt)
    close(jacobian(model, x, outputs=selection, wrt=wrt), pick(whole))


@pytest.mark.parametrize("samples", [1, 2, N])
def test_one_output_for_each_sample_in_chunks(samples: int) -> None:
    model, x = mlp(), batch()
    whole, top = jacobian(model, x), model(x).argmax(1)
    close(jacobian_in_chunks(model, x, samples, 1, outputs="argmax"), whole[range(N), top])
    each = torch.tensor([3, 1, 0, 2, 1])
    close(jacobian_in_chunks(model, x, samples, 1, outputs=each), whole[range(N), each])


def test_a_selection_of_each_output() -> None:
    x = batch(4)
    j = jacobian(lambda x: (x.sin(), x.cos()), x, outputs=[1])
    close(j, (diagonal(x.cos())[:, [1]], diagonal(-x.sin())[:, [1]]))


# batched=False


def one_by_one(x: Tensor) -> Tensor:
    return torch.stack([x.sum() * x[0], x.prod(), x[1].exp()])


@pytest.mark.parametrize("budget", [None, "3kB"])
def test_a_function_of_one_sample(budget: str | None) -> None:
    x = batch()
    y, j = value_and_jacobian(one_by_one, x, batched=False, max_memory=budget)
    close(y, torch.stack([one_by_one(s) for s in x]))
    close(j, torch.stack([torch.autograd.functional.jacobian(one_by_one, s) for s in x]))


def test_a_function_of_one_sample_that_returns_a_number() -> None:
    x = batch()
    close(jacobian(lambda s: s.square().sum(), x, batched=False), 2 * x)


def test_a_function_of_one_sample_with_branches_and_names() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, s: Tensor) -> dict[str, Any]:
            h = self.layer(s)
            return {"y": h if float(s.detach()[0]) > 0 else h.sin(), "n": 2}

    model, x = One(), batch()
    j = jacobian(model, x, batched=False)
    w, h = model.layer.weight.detach(), model.layer(x).detach()
    scale = torch.where(x[:, :1] > 0, torch.ones(()), h.cos())
    close(j["y"], scale.unsqueeze(2) * w)
    assert j["n"] is None
    found = jacobian(model, x, batched=False, wrt="layer.bias")["y"]
    close(found, diagonal(scale))


def test_a_function_of_one_sample_of_several_inputs() -> None:
    a, k = batch(), torch.arange(N)
    j = jacobian(lambda *, a, k: a * k, {"a": a, "k": k}, batched=False, outputs=[1])
    assert j["k"] is None
    close(j["a"], torch.eye(3)[1:2] * k[:, None, None])


# out= and max_memory=


@pytest.mark.parametrize("kind", ["tensor", "array", "memmap", "part of a tensor"])
@pytest.mark.parametrize("budget", [None, "6kB"])
def test_out(kind: str, budget: str | None, tmp_path: Path) -> None:
    model, x = mlp(), batch()
    expected = jacobian(model, x)
    shape = (N, 4, 3)
    out: Any
    if kind == "tensor":
        out = torch.full(shape, torch.nan)
    elif kind == "array":
        out = np.full(shape, np.nan)
    elif kind == "memmap":
        out = np.memmap(tmp_path / "j", np.float64, "w+", shape=shape)
    else:
        out = torch.full((N + 2, 4, 3), torch.nan)[1:-1]
    j = jacobian(model, x, out=out, max_memory=budget)
    close(j, expected)
    np.testing.assert_array_equal(np.asarray(out), j.numpy())
    assert j.data_ptr() == (out.data_ptr() if isinstance(out, Tensor) else out.ctypes.data)
    if kind == "memmap":
        out.flush()
        np.testing.assert_array_equal(np.fromfile(tmp_path / "j").reshape(shape), expected)


def test_out_for_a_layer_a_parameter_and_the_full_coupling() -> None:
    model, x = mlp(), batch()
    for options, shape in (
        ({"wrt": "2"}, (N, 4, 5)),
        ({"wrt": "2.weight"}, (N, 4, 5, 6)),
        ({"coupling": "full", "outputs": 1}, (N, N, 3)),
    ):
        out = torch.empty(shape)
        assert jacobian(model, x, out=out, **options) is out
        close(out, jacobian(model, x, **options))


@pytest.mark.parametrize("budget", ["3kB", 5_000, "0.01 MiB", 1e5])
@pytest.mark.parametrize("options", [{}, {"wrt": "0"}, {"outputs": "argmax"}, {"wrt": "4.bias"}])
def test_a_budget_changes_no_number(budget: Any, options: dict[str, Any]) -> None:
    model, x = mlp(), batch()
    close(jacobian(model, x, max_memory=budget, **options), jacobian(model, x, **options))


def test_mode() -> None:
    model, x = mlp(), batch()
    assert torch.equal(jacobian(model, x, mode="reverse"), jacobian(model, x, mode="auto"))
