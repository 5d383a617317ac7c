"""Dependence between samples is found wherever it is, and the error says where and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian
from batchjac.errors import CouplingError
from batchjac.testing import jacobian_in_chunks
from tests.common import N, batch, close, full_truth
from tests.coupled import (
    OTHERS,
    BatchAttention,
    Contrast,
    Function,
    norm_1d,
    norm_2d,
    two_norms,
)

pytestmark = pytest.mark.usefixtures("float64")


# Finding it.


def pair(i: int, j: int) -> Function:
    """Sample ``i`` alone looks at sample ``j``, past any rule."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        return torch.index_add(y, 0, torch.tensor([i]), x[j : j + 1])

    return f


@pytest.mark.parametrize("n", [2, 3, 6, 16])
def test_every_single_pair_is_found(n: int) -> None:
    x = torch.randn(n, 2)
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            with pytest.raises(CouplingError):
                jacobian(pair(i, j), x)


def test_most_single_pairs_of_a_large_batch_are_found() -> None:
    """Sixteen halves, each of which separates a pair with one chance in two."""
    found, pairs = 0, [(i, (7 * i + 3) % 60) for i in range(60)]
    for i, j in pairs:
        try:
            jacobian(pair(i, j), torch.randn(60, 2))
        except CouplingError:
            found += 1
    assert found >= 50


class OnlyWhenPositive(nn.Module):
    """Couples samples or not, as the data want it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if float(x.detach()[0, 0]) > 0 else x * 2


def test_what_is_looked_at_is_this_run() -> None:
    model, x = OnlyWhenPositive(), batch(4)
    for first in (-1.0, 1.0, -1.0, 1.0):  # the second time is as strict as the first
        x[0, 0] = first
        if first > 0:
            with pytest.raises(CouplingError):
                jacobian(model, x)
        else:
            close(jacobian(model, x), 2 * torch.eye(4).expand(N, 4, 4))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_small_chunks_are_looked_at_too(samples: int) -> None:
    alone = [] if samples == 1 else [norm_1d()]  # torch itself refuses one sample
    for f in (*alone, OTHERS["mean subtraction"](), OTHERS["without rules"]()):
        with pytest.raises(CouplingError):
            jacobian_in_chunks(f, batch(4), samples, 1)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * x.mean(0).detach(),
        lambda x: x.sin() + 0 * x.mean(0),
        lambda x: torch.stack([x[n].sin() for n in range(len(x))]),
        lambda x: torch.cat([x[2:], x[:2]]).cos().roll(2, 0),
        lambda x: x[torch.randperm(len(x)).argsort()][:0].sum() + x.tanh(),
        lambda x: torch.special.i0e(x).flip(0).flip(0),
        lambda x: torch.einsum("ni,nj->nij", x, x),
    ],
    ids=["detached", "times zero", "one by one", "there and back", "an empty part", "flipped twice",
         "outer product"],
)  # fmt: skip
def test_what_only_looks_coupled_passes(f: Function) -> None:
    x = batch(4)
    whole = full_truth(f, x)
    close(jacobian(f, x), whole[torch.arange(N), ..., torch.arange(N), :])


# What is said.


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), norm_1d()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


FOR_ALL = ('"sum"', '"full"')
FOR_NORMS = ('coupling="frozen"', "model.eval()")
NAMES = {
    "nested norm": (Nested, r"blocks\.1\.1 \(BatchNorm1d\)"),
    "2d": (norm_2d, r"2 \(BatchNorm2d\)"),
    "both": (two_norms, r"(1|4) \(BatchNorm1d\)"),
    "attention": (BatchAttention, r"attention \(MultiheadAttention\)|BatchAttention"),
    "contrast": (Contrast, r"by way of Contrast"),
    "a function": (OTHERS["mean subtraction"], r"by way of \w+Backward0"),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_error_names_the_module_and_the_remedy(name: str) -> None:
    make, says = NAMES[name]
    model = make()
    with pytest.raises(CouplingError, match=says) as caught:
        jacobian(model, batch(4))
    said, normalises = str(caught.value), "BatchNorm" in says
    assert all(remedy in said for remedy in FOR_ALL)
    assert [remedy in said for remedy in FOR_NORMS] == [normalises] * len(FOR_NORMS)


def test_the_remedies_work() -> None:
    model, x = Nested(), batch(4)
    for coupling, shape in (("frozen", (N, 2, 4)), ("sum", (N, 2, 4)), ("full", (N, 2, N, 4))):
        assert jacobian(model, x, coupling=coupling).shape == shape
    assert jacobian(model.eval(), x).shape == (N, 2, 4)
