"""The lazy Jacobian on the zoo: every product and every figure equals that of the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from tests.test_laws import PLAIN, agree, drawn, evaluate, flat_jacobian, flat_value
from tests.zoo import Case, seeded
from tests.zoo.rowloop import differentiable, leaves

pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
# Sums of what is infinite say nothing.
ENDLESS = ("honest_infinities", "max_pool_of_infinite_slope")
FINITE = [c for c in PLAIN if c.name not in ENDLESS]
every = pytest.mark.parametrize("case", FINITE, ids=lambda c: c.name)


def operator(case: Case, **options: Any) -> tuple[Any, Any]:
    """The operator, recorded on the noise that the case draws, and its inputs."""
    f, inputs = case.build()
    with case.around(), seeded(case.seed):
        return batchjac.operator(f, inputs, **options), inputs


def dense(case: Case, **options: Any) -> Any:
    f, inputs = case.build()
    with case.around(), seeded(case.seed):
        return batchjac.jacobian(f, inputs, **options)


def flat(tree: Any) -> Tensor:
    """All floating tensors of every sample in one row."""
    return flat_value(tree)


@every
def test_products_are_those_of_the_dense_jacobian(case: Case) -> None:
    y, x = evaluate(case)
    j = flat_jacobian(dense(case), y, x)
    a, _ = operator(case)
    v, u = drawn(case, x), drawn(case, y)
    with case.around():
        forth, back = a @ v, a.T @ u
    inner = [(flat(u) * flat(forth)).sum(), (flat_of(back, x) * flat(v)).sum()]
    agree(flat(forth), torch.einsum("noi,ni->no", j, flat(v)), case.tolerance)
    agree(flat_of(back, x), torch.einsum("noi,no->ni", j, flat(u)), case.tolerance)
    agree(inner[0], inner[1], 1e-7)
    assert a.shape == j.shape


def flat_of(back: Any, x: Any) -> Tensor:
    """What is nested as the inputs are, where those that have no derivative hold ``None``."""
    found = [b for b, t in zip(leaves(back), leaves(x), strict=True) if differentiable(t)]
    return torch.cat([t.reshape(len(t), -1) for t in found], 1)


@every
def test_figures_are_those_of_the_dense_jacobian(case: Case) -> None:
    y, x = evaluate(case)
    j = flat_jacobian(dense(case), y, x)
    a, _ = operator(case)
    with case.around():
        column, rows = a[:, -1], a[[0], :]
        norm, gram = a.norm(squared=True), a.gram()
    agree(column, j[:, :, -1], case.tolerance)
    agree(rows, j[:, :1], case.tolerance)
    agree(norm, j.square().sum((1, 2)), 1e-8)
    agree(gram, j @ j.mT, 1e-8)


PARAMETERS = [c for c in FINITE if isinstance(c.build()[0], nn.Module)
              and any(p.is_floating_point() for p in c.build()[0].parameters())]  # fmt: skip


@pytest.mark.parametrize("case", PARAMETERS, ids=lambda c: c.name)
def test_parameters_give_the_same_without_their_rows(case: Case) -> None:
    j = dense(case, wrt="parameters")
    y, _ = evaluate(case)
    rows = flat_rows(j, y)
    a, _ = operator(case, wrt="parameters")
    with case.around():
        norm, gram, kernel = a.norm(squared=True), a.gram(), a.gram(across=True)
        back = a.T @ drawn(case, y)
    agree(norm, rows.square().sum((1, 2)), 1e-8)
    agree(gram, rows @ rows.mT, 1e-8)
    agree(kernel, torch.einsum("nop,mqp->nomq", rows, rows), 1e-8)
    summed = torch.einsum("nop,no->p", rows, flat(drawn(case, y)))
    agree(torch.cat([t.flatten() for t in back.values()]), summed, 1e-8)


def flat_rows(j: Any, y: Any) -> Tensor:
    """``[N, O, P]`` of a Jacobian by parameters, of outputs nested in any way."""
    blocks = iter(leaves(j))
    rows = []
    for leaf in leaves(y):
        if differentiable(leaf):
            width = leaf[0].numel()
            names = next_names(j)
            rows.append(torch.cat([next(blocks).reshape(len(leaf), width, -1) for _ in names], 2))
    return torch.cat(rows, 1)


def next_names(j: Any) -> Any:
    while not (
        isinstance(j, dict)
        and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in j.items())
    ):
        j = next(iter(j.values())) if isinstance(j, dict) else next(b for b in j if b is not None)
    return list(j)
