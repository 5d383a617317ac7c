"""An operator's figures where gradients cancel, and with a history."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, operator
from tests.common import close

pytestmark = pytest.mark.usefixtures("float64")


class Normal(nn.Module):
    """What the convolution's bias adds the norm takes away again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 3, 3), nn.InstanceNorm1d(3)
        self.last = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)).tanh().flatten(1))


def test_gradients_that_cancel_are_no_disagreement(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Normal(), torch.randn(5, 1, 8)
    a = operator(model, x, wrt="parameters")
    rows = torch.cat([j.flatten(2) for j in jacobian(model, x, wrt="parameters").values()], 2)
    close(a.gram(), rows @ rows.mT)
    close(a.norm(), rows.flatten(1).norm(dim=1))
    u = torch.randn(5, 4)
    found = torch.cat([g.flatten() for g in (a.T @ u).values()])
    close(found, torch.einsum("no,nop->p", u, rows))
    assert not [r for r in caplog.records if "disagree" in r.getMessage()]


@pytest.mark.parametrize("figure", ["norm", "gram", "across"])
def test_figures_toward_parameters_have_a_history(figure: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(3, 4)
    goals = list(model.parameters())

    def of(rows: Tensor) -> Tensor:
        if figure == "norm":
            return rows.flatten(1).norm(dim=1)
        return rows @ rows.mT if figure == "gram" else torch.einsum("nop,mqp->nomq", rows, rows)

    def gradients(value: Tensor) -> list[Tensor]:
        weight = torch.arange(value.numel()).view(value.shape).double()
        return list(
            torch.autograd.grad(
                (value * weight).sum(), goals, allow_unused=True, materialize_grads=True
            )
        )

    a = operator(model, x, wrt="parameters", create_graph=True)
    ours = a.norm() if figure == "norm" else a.gram(across=figure == "across")
    parts = jacobian(model, x, wrt="parameters", create_graph=True)
    theirs = of(torch.cat([j.flatten(2) for j in parts.values()], 2))
    for found, expected in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
