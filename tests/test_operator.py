"""``batchjac.operator``: products, blocks, figures, and the forms of other libraries."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac.errors import (
    BudgetError,
    CouplingError,
    InputError,
    InputTypeError,
    NameNotFoundError,
    SelectionError,
    StateError,
    UnsupportedError,
)
from batchjac.lazy import Jacobian
from tests.common import N, Result, batch, close, full_truth, mlp

pytestmark = pytest.mark.usefixtures("float64")


def square() -> nn.Sequential:
    """As many outputs as inputs."""
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4))


def wide(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, 8), nn.Tanh(), nn.Linear(8, o))


def times(j: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("noi,ni->no", j, v)


# ---- products


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


def parameter_rows(f: nn.Module, x: Any, **options: Any) -> Tensor:
    """``[N, O, P]``."""
    j = batchjac.jacobian(f, x, wrt="parameters", **options)
    sizes = {name: p.numel() for name, p in f.named_parameters()}
    return torch.cat([t.reshape(len(t), -1, sizes[name]) for name, t in j.items()], 2)


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


# ---- blocks and compositions


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


# ---- figures


@pytest.mark.parametrize(("i", "o"), [(3, 6), (6, 3)])
def test_norms_and_grams(i: int, o: int) -> None:
    f, x = wide(i, o), batch(i)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    close(a.norm(), j.flatten(1).norm(dim=1))
    close(a.norm(squared=True), j.square().sum((1, 2)))
    close(a.gram(), j @ j.mT)
    close(a.gram(of="inputs"), j.mT @ j)
    close(a.T.gram(), j.mT @ j)
    close(a.matrix(), j)


def test_diagonal_and_trace() -> None:
    f, x = square(), batch(4)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    close(a.diag(), j.diagonal(dim1=1, dim2=2))
    close(a.trace(), j.diagonal(dim1=1, dim2=2).sum(1))
    with pytest.raises(InputError, match="one block is 4 x 3"):
        batchjac.operator(mlp(), batch()).trace()


def test_leading_singular_values_of_a_small_block() -> None:
    f, x = square(), batch(4)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    found = a.svd(2)
    close(found.S, torch.linalg.svdvals(j)[:, :2])
    close(found.U @ found.S.diag_embed() @ found.Vh, a.svd(4).U[..., :2]
          @ a.svd(4).S[:, :2].diag_embed() @ a.svd(4).Vh[:, :2])  # fmt: skip


def test_leading_singular_values_of_a_large_block_by_products() -> None:
    """Halko, Martinsson and Tropp: with decay, the leading part to far below the gap."""
    q1, q2 = (torch.linalg.qr(torch.randn(60, 60))[0] for _ in range(2))
    s = 0.6 ** torch.arange(60)
    weight = q1 @ s.diag() @ q2

    def f(x: Tensor) -> Tensor:
        return x @ weight.T

    a = batchjac.operator(f, batch(60))
    generator = torch.Generator().manual_seed(0)
    found = a.svd(5, generator=generator)
    close(found.S, s[:5].expand(N, 5))
    close(found.U.mT @ found.U, torch.eye(5).expand(N, 5, 5))
    close(a @ found.Vh.mT, found.U * found.S[:, None])
    assert torch.equal(a.svd(5, generator=generator.manual_seed(0)).S, found.S)


def test_the_estimate_of_the_norm_has_its_mean_and_variance() -> None:
    """Hutchinson, 1990, proposition 1: variance ``2 sum_{o != p} (J Jᵀ)[o,p]²`` of one vector."""
    f, x = mlp(), batch()
    generator = torch.Generator().manual_seed(1)
    for wrt in (None, "parameters"):
        a = batchjac.operator(f, x, wrt=wrt)
        gram = a.gram()
        variance = 2 * (gram - gram.diagonal(dim1=1, dim2=2).diag_embed()).square().sum((1, 2))
        check_estimates(
            lambda a=a: a.norm(samples=1, squared=True, generator=generator),
            a.norm(squared=True), variance,
        )  # fmt: skip
        first = a.norm(samples=3, generator=generator.manual_seed(2))
        assert torch.equal(first, a.norm(samples=3, generator=generator.manual_seed(2)))


def test_the_estimate_of_the_trace_has_its_mean_and_variance() -> None:
    f, x = square(), batch(4)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    s = (j + j.mT) / 2
    off = s - s.diagonal(dim1=1, dim2=2).diag_embed()
    generator = torch.Generator().manual_seed(1)
    check_estimates(
        lambda: a.trace(samples=1, generator=generator), a.trace(), 2 * off.square().sum((1, 2))
    )


def check_estimates(draw: Any, exact: Tensor, variance: Tensor, count: int = 1000) -> None:
    """Mean and variance of many draws, each to five of its own standard errors."""
    drawn = torch.stack([draw() for _ in range(count)])
    mean, found = drawn.mean(0), drawn.var(0)
    fourth = (drawn - mean).pow(4).mean(0)
    assert ((mean - exact).abs() <= 5 * (variance / count).sqrt() + 1e-12).all()
    assert ((found - variance).abs() <= 5 * ((fourth - found**2) / count).sqrt() + 1e-9).all()
    assert (found > 0).all()


# ---- other libraries


def test_as_a_scipy_operator() -> None:
    f, x = square(), batch(4)
    for wrt in (None, "parameters"):
        a = batchjac.operator(f, x, wrt=wrt)
        matrix = a.matrix()
        whole = torch.block_diag(*matrix) if wrt is None else matrix.flatten(0, 1)
        s, dense = a.to_scipy(), whole.numpy()
        assert s.shape == dense.shape
        assert s.dtype == np.float64
        v, u = np.random.randn(s.shape[1], 3), np.random.randn(s.shape[0], 2)
        np.testing.assert_allclose(s @ v, dense @ v, atol=1e-12)
        np.testing.assert_allclose(s.T @ u, dense.T @ u, atol=1e-12)
        np.testing.assert_allclose(s @ v[:, 0], dense @ v[:, 0], atol=1e-12)
        np.testing.assert_allclose(s.rmatvec(u[:, 0]), dense.T @ u[:, 0], atol=1e-12)


def test_scipy_solves_with_it() -> None:
    from scipy.sparse.linalg import lsmr

    f, x = nn.Sequential(nn.Linear(4, 4)), batch(4)
    a, u = batchjac.operator(f, x), batch(4)
    found = lsmr(a.to_scipy(), u.flatten().numpy(), atol=1e-13, btol=1e-13)[0]
    close(a @ torch.as_tensor(found).reshape(N, 4), u)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_bsr])
def test_as_a_sparse_matrix(layout: torch.layout) -> None:
    a = batchjac.operator(mlp(), batch())
    found = a.to_sparse(layout)
    assert found.layout == layout
    close(found.to_dense(), torch.block_diag(*a.matrix()))
    with pytest.raises(InputError, match="sparse_coo"):
        a.to_sparse(torch.sparse_csr)
    with pytest.raises(UnsupportedError, match="shared"):
        batchjac.operator(mlp(), batch(), wrt="parameters").to_sparse()


# ---- guarantees of jacobian


def normed(train: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).train(
        train
    )


def test_coupled_samples_are_refused() -> None:
    for wrt in (None, "parameters"):
        with pytest.raises(CouplingError, match="BatchNorm"):
            batchjac.operator(normed(), batch(), wrt=wrt)
    with pytest.raises(InputError, match="full"):
        batchjac.operator(normed(), batch(), coupling="sum")


def test_frozen_statistics() -> None:
    f, x = normed(), batch()
    a, j = batchjac.operator(f, x, coupling="frozen"), batchjac.jacobian(f, x, coupling="frozen")
    v, u = batch(), batch(2)
    close(a @ v, times(j, v))
    close(a.T @ u, times(j.mT, u))
    close(a.gram(), j @ j.mT)
    p = batchjac.operator(f, x, coupling="frozen", wrt="parameters")
    rows = parameter_rows(f, x, coupling="frozen")
    close(p.gram(across=True), torch.einsum("nop,mqp->nomq", rows, rows))


def test_full_coupling_has_products() -> None:
    f, x = normed(), batch()
    a, whole = batchjac.operator(f, x, coupling="full"), full_truth(f, x)
    v, u = batch(), batch(2)
    close(a @ v, torch.einsum("nomi,mi->no", whole, v))
    close(a.T @ u, torch.einsum("nomi,no->mi", whole, u))
    close(a.dense(), whole)
    for act in (a.gram, a.norm, a.matrix, lambda: a[:, 0], lambda: a.norm(samples=2)):
        with pytest.raises(UnsupportedError, match="no blocks"):
            act()


def test_the_model_is_left_as_it_was() -> None:
    f, x = normed(train=False), batch()
    f[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(f.state_dict()), torch.get_rng_state()
    a = batchjac.operator(f, x, wrt="parameters")
    a.gram()
    a.T @ batch(2)
    a.norm(samples=2)
    torch.set_rng_state(state)
    batchjac.operator(f, x).norm()
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in f.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None for p in f.parameters())
    assert all(torch.equal(t, before[k]) for k, t in f.state_dict().items())
    assert not x.requires_grad


def test_parameters_that_changed_are_noticed() -> None:
    f, x = mlp(), batch()
    a = batchjac.operator(f, x)
    with torch.no_grad():
        f[2].weight.mul_(2)
    for act in (lambda: a @ batch(), lambda: a.T @ batch(4), a.norm):
        with pytest.raises(StateError, match="overwritten since"):
            act()


def test_a_closed_operator_says_so() -> None:
    with batchjac.operator(mlp(), batch()) as a:
        a @ batch()
    for act in (lambda: a @ batch(), a.norm, a.gram):
        with pytest.raises(StateError, match="closed"):
            act()
    assert "closed" in repr(a)
    p = batchjac.operator(mlp(), batch(), wrt="parameters")
    p.close()
    with pytest.raises(StateError, match="closed"):
        p.gram()


def test_products_are_differentiable() -> None:
    f, x = mlp(), batch().requires_grad_()
    v, u = batch().requires_grad_(), batch(4).requires_grad_()
    wanted = [x, v, u, *f.parameters()]
    a = batchjac.operator(f, x, create_graph=True)
    loss = (a @ v).square().sum() + (a.T @ u).pow(3).sum()
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    j = batchjac.jacobian(f, x, create_graph=True)
    loss = times(j, v).square().sum() + times(j.mT, u).pow(3).sum()
    expected = torch.autograd.grad(loss, wanted, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_hooks_run() -> None:
    """They define the rows; products are those of the rows, one sample at a time."""

    def f(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        h.register_hook(lambda g: g.clamp(-0.3, 0.3))
        return h[:, :2] * x[:, 1:]

    x, v, u = batch(), batch(), batch(2)
    a, j = batchjac.operator(f, x), batchjac.jacobian(f, x)
    close(a @ v, times(j, v))
    close(a.T @ u, times(j.mT, u))
    close(a.norm(), j.flatten(1).norm(dim=1))


class Clips(torch.autograd.Function):
    """No hook shows it: its backward is not linear in the cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (2 * g).clamp(-1.5, 1.5)


@pytest.mark.parametrize("count", [None, 3])
def test_rows_of_what_clips_gradients_make_the_products(count: int | None) -> None:
    """The rows are those of the identity, whatever the cotangent is that comes first."""
    f, x = (lambda x: Clips.apply(x) * x), batch()
    j, u = batchjac.jacobian(f, x), batch(3, *(() if count is None else (count,)))
    a = batchjac.operator(f, x)
    close(a.T @ u, torch.einsum("noi,no...->ni...", j, u))


@pytest.mark.parametrize(
    ("wrt", "budget"), [(None, "1MiB"), ("parameters", "2.5MiB"), (["1", "2.weight"], "2MiB")]
)
def test_little_memory_takes_samples_in_chunks(wrt: Any, budget: str) -> None:
    f, x = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 4)), torch.randn(120, 64)
    a = batchjac.operator(f, x, wrt=wrt)
    b = batchjac.operator(f, x, wrt=wrt, max_memory=budget)
    assert a.chunk == 120 > b.chunk
    v = {k: torch.randn(120, 512) if k == "1" else torch.randn(p.shape)
         for k, p in {**dict(f.named_parameters()), "1": x}.items()}  # fmt: skip
    v = (
        torch.randn(120, 64)
        if wrt is None
        else {k: v[k] for k in (wrt if wrt != "parameters" else dict(f.named_parameters()))}
    )
    u = torch.randn(120, 4)
    close(b @ v, a @ v)
    close(b.T @ u, a.T @ u)
    close(b.norm(), a.norm())
    close(b[:, 0], a[:, 0])
    close(b.norm(samples=2, generator=torch.Generator().manual_seed(0)),
          a.norm(samples=2, generator=torch.Generator().manual_seed(0)))  # fmt: skip
    with pytest.raises(BudgetError, match="max_memory"):
        batchjac.operator(f, x, wrt=wrt, max_memory=1000)


def test_a_value_that_depends_on_the_chunk_is_refused() -> None:
    layer = nn.Linear(64, 2000)

    def f(x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(layer(x)) / len(x)
        return y[:, :3]

    with pytest.raises(CouplingError, match="max_memory"):
        batchjac.operator(f, torch.randn(300, 64), max_memory="4MiB")


def test_nothing_is_left_of_an_operator() -> None:
    f, x = mlp(), batch()
    a = batchjac.operator(f, x)
    a @ batch()
    a.T @ batch(4)
    a.gram()
    assert a._kept is not None
    y = weakref.ref(a._kept.work[0].y)
    del a
    assert y() is None


@pytest.mark.parametrize("end", ["a.close()", "pass"], ids=["closed", "dropped"])
def test_a_very_deep_graph_is_taken_apart(end: str) -> None:
    """Freed from its end up, one node inside the other, it would overflow the stack."""
    script = f"""
import torch, batchjac
def f(x):
    for _ in range(50_000):
        x = x * 1.00001
    return x
x = torch.randn(4, 2, dtype=torch.float64)
a = batchjac.operator(f, x)
torch.testing.assert_close(a.T @ torch.stack([x, -x], 2), 1.00001**50_000 * torch.stack([x, -x], 2))
{end}
del a
print("alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=280
    )
    assert done.stdout == "alive\n", done.stderr


# ---- words


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
        (lambda a: a @ batch().float(), InputTypeError, "torch.float32"),
        (lambda a: a @ 3, InputTypeError, "must be a tensor"),
        (lambda a: a[4], SelectionError, "outputs 4 is out of range"),
        (lambda a: a[:, [0, -4]], SelectionError, "inputs -4 is out of range"),
        (lambda a: a[0, 0, 0], InputError, "two axes"),
        (lambda a: a["x"], InputTypeError, "LongTensor, got str"),
        (lambda a: a[True], InputTypeError, "got bool"),
        (lambda a: a.gram(of="rows"), InputError, '"outputs" or "inputs"'),
        (lambda a: a.gram(across=True), InputError, 'wrt="parameters"'),
        (lambda a: a.norm(samples=0), InputError, "at least one"),
        (lambda a: a.norm(samples=1.5), InputTypeError, "number of random vectors"),
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
