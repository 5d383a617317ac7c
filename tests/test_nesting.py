"""Inputs and outputs of every kind, shape and precision; outputs nest over inputs."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchjac
from batchjac import jacobian, value_and_jacobian
from batchjac.engines import reference
from tests.common import N, Result, batch, close, diagonal, mlp

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # compiling and forward mode load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
Pair = namedtuple("Pair", ["left", "right"])


class Typed(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class Batch:
    image: Tensor
    label: Tensor
    note: str = "kept"


# Nesting: outputs over inputs.


def test_several_inputs_as_a_tuple() -> None:
    a, b = batch(), batch()
    j = jacobian(torch.mul, (a, b))
    assert type(j) is tuple
    close(j, (diagonal(b), diagonal(a)))


def test_one_input_in_a_tuple_stays_in_one() -> None:
    j = jacobian(torch.sin, (batch(),))
    assert type(j) is tuple
    assert len(j) == 1


def test_several_inputs_as_a_dict() -> None:
    a, b = batch(), batch()
    j = jacobian(lambda *, left, right: left * right, {"left": a, "right": b})
    assert list(j) == ["left", "right"]
    close(j, {"left": diagonal(b), "right": diagonal(a)})


def test_a_list_is_one_argument() -> None:
    a, b = batch(), batch()
    j = jacobian(lambda parts: parts[0] * parts[1], [a, b])
    assert type(j) is list
    close(j, [diagonal(b), diagonal(a)])


def test_a_namedtuple_is_one_argument() -> None:
    a, b = batch(), batch()
    j = jacobian(lambda pair: pair.left * pair.right, Pair(a, b))
    assert type(j) is Pair
    close(j.left, diagonal(b))
    close(j.right, diagonal(a))


def test_a_dataclass_is_one_argument() -> None:
    image, label = batch(), torch.arange(N)
    j = jacobian(lambda b: b.image * b.label[:, None], Batch(image, label, "as it is"))
    assert type(j) is Batch
    assert j.label is None
    assert j.note is None
    close(j.image, torch.eye(3) * label[:, None, None])


def test_deep_nesting() -> None:
    a, b, c = batch(), batch(2), batch()
    inputs = ({"a": a, "more": [b, (c, 3)]}, None)

    def f(first: Any, second: None) -> Any:
        assert second is None
        c, three = first["more"][1]
        assert three == 3
        return {"y": [first["a"] * c, Typed(first["more"][0].sin(), c)], "n": 1.5}

    j = jacobian(f, inputs)
    assert j["n"] is None
    product, typed = j["y"]
    assert type(typed) is Typed
    for part in (product, typed.logits, typed.hidden):
        assert type(part) is tuple
        assert part[1] is None
        assert list(part[0]) == ["a", "more"]
        assert part[0]["more"][1][1] is None
    close(product[0]["a"], diagonal(c))
    close(product[0]["more"][1][0], diagonal(a))
    close(product[0]["more"][0], torch.zeros(N, 3, 2))
    close(typed.logits[0]["more"][0], diagonal(b.cos()))
    close(typed.hidden[0]["more"][1][0], torch.eye(3).expand(N, 3, 3))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, z: (y, z), lambda y, z: [y, z], lambda y, z: {"y": y, "z": z}, Pair, Typed,
        lambda y, z: OrderedDict(y=y, z=z), lambda y, z: Result(y, z),
    ],
    ids=["tuple", "list", "dict", "namedtuple", "NamedTuple", "OrderedDict", "dataclass"],
)  # fmt: skip
def test_several_outputs(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    x = batch()
    j = jacobian(lambda x: wrap(x.sin(), x.prod(1)), x)
    like = wrap(x, x)
    assert type(j) is type(like)
    if isinstance(j, dict):
        assert list(j) == list(like)
    one, two = (j.y, j.extra) if isinstance(j, Result) else j.values() if isinstance(j, dict) else j
    close(one, diagonal(x.cos()))
    close(two, x.prod(1, keepdim=True) / x)


@dataclass
class Unset:
    y: Tensor
    later: Tensor = field(init=False)


@pytest.mark.parametrize(
    ("wrap", "kind", "get"),
    [
        (Unset, Unset, lambda v: v.y),
        (lambda y: UserDict(y=y), UserDict, lambda v: v["y"]),
        (lambda y: MappingProxyType({"y": y}), dict, lambda v: v["y"]),
    ],
)
def test_unusual_containers(wrap: Any, kind: type, get: Any) -> None:
    x = batch()
    y, j = value_and_jacobian(lambda x: wrap(x.sin()), x)
    assert type(y) is type(j) is kind
    close(get(y), x.sin())
    close(get(j), diagonal(x.cos()))


def test_outputs_of_torch_return_types() -> None:
    x = batch(4)
    j = jacobian(lambda x: x.max(1), x)
    assert type(j) is torch.return_types.max
    assert j.indices is None
    close(j.values, F.one_hot(x.argmax(1), 4).double())


def test_an_object_that_is_no_container_is_not_looked_into() -> None:
    y, j = value_and_jacobian(lambda x: {"y": x, "other": SimpleNamespace(z=x)}, batch())
    assert isinstance(y["other"], SimpleNamespace)
    assert j["other"] is None


def test_integers_have_no_derivative() -> None:
    index, scale = torch.arange(N) % 3, batch(4)
    table = nn.Embedding(3, 4)
    j = jacobian(lambda i, s: table(i) * s, (index, scale))
    assert j[0] is None
    close(j[1], diagonal(table(index).detach()))
    mask = torch.rand(N, 4) > 0.5
    j = jacobian(lambda x, m: x.masked_fill(m, 0), (scale, mask))
    assert j[1] is None
    close(j[0], diagonal((~mask).double()))


def test_an_unused_input_gives_zeros(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="batchjac"):
        j = jacobian(lambda a, b: a.sin(), (batch(), batch(2, 2)))
    assert torch.equal(j[1], torch.zeros(N, 3, 2, 2))
    assert "output does not depend on inputs[1]" in caplog.text


# Dtypes, sizes, shapes.


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
)
@pytest.mark.parametrize("wrt", [None, "2", "parameters"])
def test_smaller_floats(dtype: torch.dtype, tolerance: float, wrt: str | None) -> None:
    model, x = mlp().to(dtype), batch().to(dtype)
    found = jacobian(model, x, wrt=wrt)
    expected = jacobian(model.double(), x.double(), wrt=wrt)
    if not isinstance(found, dict):
        found, expected = {"": found}, {"": expected}
    for key in expected:
        assert found[key].dtype == dtype
        worst = (found[key].double() - expected[key]).abs().max() / expected[key].abs().max()
        assert worst < tolerance


def test_dtypes_side_by_side() -> None:
    a, b = batch().float(), batch()
    j = jacobian(lambda a, b: a.double() * b, (a, b))
    assert [part.dtype for part in j] == [torch.float32, torch.float64]  # each its input's
    close(j[0], diagonal(b.float()))


def test_autocast() -> None:
    model, x = mlp().float(), batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, j = value_and_jacobian(model, x)
    assert y.dtype == torch.bfloat16
    assert j.dtype == torch.float32
    assert (j - jacobian(model, x)).abs().max() < 0.05


@pytest.mark.parametrize("wrt", [None, "0", "parameters"])
@pytest.mark.parametrize("training", [True, False])
def test_one_sample(wrt: str | None, training: bool) -> None:
    model, x = mlp().train(training), torch.randn(1, 3)
    close(jacobian(model, x, wrt=wrt), reference.jacobian(model, x, wrt=wrt))


@pytest.mark.parametrize("inner", [(), (1,), (0,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("outer", ["same", "sum", "empty"])
def test_every_shape(inner: tuple[int, ...], outer: str) -> None:
    x = torch.randn(N, *inner)
    f: Callable[[Tensor], Tensor] = {
        "same": lambda x: x.sin(),
        "sum": lambda x: x.reshape(len(x), -1).sum(1),
        "empty": lambda x: x.reshape(len(x), -1)[:, :0],
    }[outer]
    y, j = value_and_jacobian(f, x)
    assert j.shape == (*y.shape, *inner)
    close(j, reference.jacobian(f, x))


@pytest.mark.parametrize(
    "change", [lambda x: x.T, lambda x: x[:, ::2], lambda x: x.expand(N, 6), lambda x: x.flip(0)]
)
def test_inputs_of_every_layout(change: Callable[[Tensor], Tensor]) -> None:
    x = change(torch.randn(1, 6) if "expand" in inspect.getsource(change) else torch.randn(6, 6))
    close(jacobian(torch.sin, x), diagonal(x.cos()))


def test_inputs_that_require_gradients_get_none() -> None:
    x = batch().requires_grad_()
    close(jacobian(torch.sin, x), diagonal(x.detach().cos()))
    assert x.grad is None


def test_a_subclass_of_tensor_as_input() -> None:
    x = nn.Parameter(batch())
    j = jacobian(torch.sin, x)
    assert type(j) is Tensor
    close(j, diagonal(x.detach().cos()))


def test_the_package_exports_what_it_says() -> None:
    assert {"jacobian", "value_and_jacobian", "errors"} <= set(batchjac.__all__)
    assert all(hasattr(batchjac, name) for name in batchjac.__all__)


def test_dropout_has_one_mask_for_all_rows() -> None:
    """Row o of a linear map behind dropout: zeros where the mask is, the same for every row."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 8))
    y, j = value_and_jacobian(model, torch.ones(N, 20))
    dropped = j == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 0.3 < dropped.double().mean() < 0.7
    close(torch.einsum("noi->no", j) + model[1].bias.detach(), y)  # the value's own mask


def test_the_same_seed_the_same_answer() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)), batch()
    state = torch.get_rng_state()
    y, j = value_and_jacobian(model, x)
    torch.set_rng_state(state)
    close(model(x).detach(), y)  # the draws of the next forward are those of ours
    torch.set_rng_state(state)
    assert torch.equal(jacobian(model, x), j)
