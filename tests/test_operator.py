"""``batchjac.operator``: products, blocks, compositions, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac.errors import (
    InputError,
    InputTypeError,
    NameNotFoundError,
    SelectionError,
    UnsupportedError,
)
from batchjac.lazy import Jacobian
from tests.common import N, Result, batch, close, mlp, parameter_rows, times, wide

pytestmark = pytest.mark.usefixtures("float64")


def test_products_and_their_transposes() -> None:
    f, x, v, u = mlp(), batch(), batch(), batch(4)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    close(a @ v, times(j, v))
    close(a.T @ u, times(j.mT, u))
    assert a.T.T is a
    assert a.T.shape == (N, 3, 4)


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_several_columns_stand_last(count: int) -> None:
    f, x = mlp(), batch()
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    v, u = batch(3, count), batch(4, count)
    close(a @ v, j @ v)
    close(a.T @ u, j.mT @ u)


def test_nested_inputs_and_outputs() -> None:
    inner = mlp()

    def f(a: Tensor, b: dict[str, Tensor], k: Tensor) -> Any:
        return {"s": inner(a) * b["c"][:, :1], "t": Result(a.sum(1), k), "k": k}

    x = (batch(), {"c": batch(2)}, torch.arange(N))
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    v = (batch(), {"c": batch(2)}, None)
    y = a @ v
    close(y["s"], times(j["s"][0], v[0]) + times(j["s"][1]["c"], v[1]["c"]))
    close(y["t"].y, torch.einsum("ni,ni->n", j["t"].y[0], v[0]))
    assert y["k"] is None
    u = {"s": batch(4), "t": Result(torch.randn(N), None), "k": None}
    back = a.T @ u
    close(back[0], times(j["s"][0].mT, u["s"]) + j["t"].y[0] * u["t"].y[:, None])
    close(back[1]["c"], times(j["s"][1]["c"].mT, u["s"]))
    assert back[2] is None
    generic = super(Jacobian, a).dense()  # from products, nested alike
    for found in (a.dense(), generic):
        close(found["s"], j["s"])
        close(found["t"].y, j["t"].y)


@pytest.mark.parametrize(
    "outputs", [2, [0, 3], [1, 1], slice(1, None), "argmax", torch.tensor([0, 3, 1, 2, 2])]
)
def test_selected_outputs(outputs: Any) -> None:
    f, x = mlp(), batch()
    a, j = batchjac.operator(f, x, outputs=outputs), batchjac.jacobian(f, x, outputs=outputs)
    v = batch()
    close(a @ v, torch.einsum("n...i,ni->n...", j, v))
    u = torch.randn(j.shape[:-1])
    close(a.T @ u, torch.einsum("n...i,n...->ni", j, u))
    close(a.matrix(), j.reshape(N, -1, 3))
    p = batchjac.operator(f, x, outputs=outputs, wrt="parameters")
    rows = parameter_rows(f, x, outputs=outputs)
    close(p.gram(across=True), torch.einsum("nop,mqp->nomq", rows, rows))


def test_layers_inputs_and_parameters_together() -> None:
    f, x = mlp(), batch()
    names = ["inputs", "1", "4.weight"]
    a, j = batchjac.operator(f, x, wrt=names), batchjac.jacobian(f, x, wrt=names)
    v = {"inputs": batch(), "1": batch(6), "4.weight": torch.randn(4, 5)}
    expected = times(j["inputs"], v["inputs"]) + times(j["1"], v["1"])
    expected += torch.einsum("noij,ij->no", j["4.weight"], v["4.weight"])
    close(a @ v, expected)
    u = batch(4)
    back = a.T @ u
    close(back["1"], times(j["1"].mT, u))
    close(back["4.weight"], torch.einsum("noij,no->ij", j["4.weight"], u))
    rows = torch.cat([j["inputs"], j["1"], j["4.weight"].flatten(2)], 2)
    close(a.matrix(), rows)
    close(a.gram(), rows @ rows.mT)
    close(a.norm(), rows.flatten(1).norm(dim=1))
    close(batchjac.operator(f, x, of="1").dense(), batchjac.jacobian(f, x, of="1"))


class Once(torch.autograd.Function):
    """No second derivative, no forward rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Forgets(Once):
    """Its second derivative is wrong: it does not record what it does to the cotangent."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * (2 * g.detach() - g)


@pytest.mark.parametrize(
    "inner",
    [Once.apply, Forgets.apply, torch.special.erfcx, lambda x: torch.cumsum(x, 1).sinc()],
    ids=["once", "forgets", "erfcx", "sinc"],
)
def test_tangents_go_where_there_is_no_forward_rule(inner: Any) -> None:
    f, x = (lambda x: torch.tanh(inner(x))), batch() + 0.1
    a, v = batchjac.operator(f, x), batch(3, 2)
    close(a @ v, batchjac.jacobian(f, x) @ v)


def test_a_function_of_one_sample() -> None:
    x, v = batch(), batch()
    a = batchjac.operator(lambda x: torch.stack([x.prod(), x.sum()]), x, batched=False)
    j = batchjac.jacobian(lambda x: torch.stack([x.prod(), x.sum()]), x, batched=False)
    close(a @ v, times(j, v))


def test_products_of_a_constant_are_zero() -> None:
    a = batchjac.operator(lambda x: torch.ones(len(x), 2) * 3, batch())
    assert not (a @ batch()).any()
    assert not (a.T @ batch(2)).any()
    assert not a.norm().any()


def test_blocks_by_flat_indices() -> None:
    f, x = mlp(), batch()
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    close(a[:, 1], j[:, :, 1])
    close(a[-1], j[:, -1])
    close(a[[0, 3], 1:], j[:, [0, 3], 1:])
    close(a[torch.tensor([2, 0]), 1], j[:, [2, 0], 1])
    close(a.T[0, ::2], j[:, ::2, 0])
    p, rows = batchjac.operator(f, x, wrt="parameters"), parameter_rows(f, x)
    close(p[:, [0, 50]], rows[:, :, [0, 50]])
    close(p[2], rows[:, 2])
    close(p.T[[4, 1]], rows[:, :, [4, 1]].mT)


def test_a_composition_is_the_jacobian_of_the_composition() -> None:
    f, g, x = mlp(), wide(4, 6), batch()
    whole = batchjac.jacobian(nn.Sequential(f, g), x)
    c = batchjac.operator(g, f(x).detach()) @ batchjac.operator(f, x)
    close(c @ (v := batch()), times(whole, v))
    close(c.T @ (u := batch(6)), times(whole.mT, u))
    close(c.dense(), whole)
    close(c.norm(), whole.flatten(1).norm(dim=1))
    close((c.T @ c).matrix(), whole.mT @ whole)
    close((c @ c.T).gram(), (whole @ whole.mT) @ (whole @ whole.mT).mT)
    p = batchjac.operator(g, f(x).detach()) @ batchjac.operator(f, x, wrt="parameters")
    rows = parameter_rows(nn.Sequential(f, g), x)[:, :, : p.shape[2]]
    close(p.gram(), rows @ rows.mT)
    assert "after" in repr(c)


def test_what_does_not_fit_is_not_composed() -> None:
    f, x = mlp(), batch()
    a = batchjac.operator(f, x)
    with pytest.raises(InputError, match=r"A gives \[5, 4\].*B takes \[5, 3\]"):
        a @ a
    with pytest.raises(InputError, match=r"B @ A"):
        batchjac.operator(wide(4, 2), batch(4)[:3]) @ a
    p = batchjac.operator(wide(4, 2), batch(4), wrt="parameters")
    with pytest.raises(UnsupportedError, match="all samples share"):
        p @ p.T


def test_it_says_what_it_is() -> None:
    a = batchjac.operator(mlp(), batch(), wrt="parameters")
    said = repr(a)
    for words in ("Sequential", "5 samples", "4 outputs", "83 parameters", "float64", "recorded"):
        assert words in said
    assert (a.shape, a.dtype, a.device) == ((5, 4, 83), torch.float64, torch.device("cpu"))
    assert "transpose" in repr(a.T)
    assert "3 inputs" in repr(batchjac.operator(torch.nn.Linear(3, 2), batch()))


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda a: a @ batch(4), InputError, r"got v \[5, 4\]; expected \[5, 3\]"),
        (lambda a: a @ batch(3, 2, 2), InputError, "one axis more at the end"),
        (lambda a: a @ (batch(),), InputError, "nested as"),
        (lambda a: a @ batch().float(), InputTypeError,
         r"v is torch.float32 on cpu.*convert it with \.to\('cpu', torch.float64\)"),
        (lambda a: a @ batch().to(torch.complex64), InputTypeError, "to the real and to the imag"),
        (lambda a: a @ batch().to_sparse(), InputTypeError, r"sparse_coo; pass its \.to_dense"),
        (lambda a: a @ 3, InputTypeError, r"must be a tensor \[5, 3\], got int"),
        (lambda a: a @ batch().numpy(), InputTypeError, r"got ndarray; convert .*torch\.as_tensor"),
        (lambda a: a[4], SelectionError, "outputs 4 is out of range"),
        (lambda a: a[:, [0, -4]], SelectionError, "inputs -4 is out of range"),
        (lambda a: a[0, 0, 0], InputError, "two axes"),
        (lambda a: a["x"], InputTypeError, "LongTensor, got str"),
        (lambda a: a[True], InputTypeError, "got bool"),
        (lambda a: a[torch.ones(4) > 0], InputTypeError, r"LongTensor, got torch.bool \[4\]"),
        (lambda a: a.gram(of="rows"), InputError, '"outputs" or "inputs"'),
        (lambda a: a.gram(across=True), InputError, 'wrt="parameters"'),
        (lambda a: a.norm(samples=0), InputError, "at least one"),
        (lambda a: a.norm(samples=1.5), InputTypeError, "number of random vectors"),
        (lambda a: a.norm(samples=2, generator=1), InputTypeError, r"must be a torch\.Generator"),
        (lambda a: a.svd(0), InputError, "from 1 to 3"),
        (lambda a: a.svd(4), InputError, "from 1 to 3"),
        (lambda a: a.trace(samples=2), InputError, "as many outputs as inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(act: Any, error: type[Exception], words: str) -> None:
    a = batchjac.operator(mlp(), batch())
    with pytest.raises(error, match=words):
        act(a)


def test_parameters_have_no_small_inputs() -> None:
    p = batchjac.operator(mlp(), batch(), wrt="parameters")
    with pytest.raises(UnsupportedError, match="83 parameters"):
        p.gram(of="inputs")
    with pytest.raises(UnsupportedError, match="eigvalsh"):
        p.svd(1)
    with pytest.raises(InputError, match="4 x 83 parameters"):
        p.diag()
    with pytest.raises(NameNotFoundError):
        batchjac.operator(mlp(), batch(), wrt="nowhere")
