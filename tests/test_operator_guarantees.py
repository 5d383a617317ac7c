"""An operator keeps what ``jacobian`` promises: independence, memory, state, hooks."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import memory
from batchjac.errors import (
    BudgetError,
    CouplingError,
    InputError,
    StateError,
    UnsupportedError,
)
from tests.common import batch, close, full_truth, mlp, parameter_rows, times

pytestmark = pytest.mark.usefixtures("float64")


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
    for b in (a, a.T):
        for act in (b.gram, b.norm, b.matrix, lambda b=b: b[:, 0], lambda b=b: b.norm(samples=2)):
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


@pytest.mark.parametrize(
    "options", [{}, {"wrt": "parameters"}, {"create_graph": True}, {"coupling": "full"}]
)
def test_a_budget_too_small_says_the_least_that_does(options: dict[str, Any]) -> None:
    f, x = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 4)), torch.randn(120, 64)
    least = least_of(f, x, 1000, options)
    assert least_of(f, x, least - 16, options) == least
    u = torch.randn(120, 4)
    a, free = (batchjac.operator(f, x, max_memory=m, **options) for m in (least, None))
    close(a.T @ u, free.T @ u)


def least_of(f: nn.Module, x: Tensor, allowed: int, options: dict[str, Any]) -> int:
    words = f"max_memory allows {memory.text(allowed)}, but .* with one row"
    with pytest.raises(BudgetError, match=words) as caught:
        batchjac.operator(f, x, max_memory=allowed, **options)
    assert " out=" not in str(caught.value)  # an operator takes none
    return int(re.findall(r"max_memory=(\d+)", str(caught.value))[0])


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
