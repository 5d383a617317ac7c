"""``batchjac.linalg`` with maps, scales and mixtures of samples that are rare and must be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import linalg
from batchjac.errors import UnsupportedError

N = 4

BY_PRODUCTS: dict[str, Callable[[Any], Any]] = {
    "trace": linalg.trace,
    "logdet": linalg.logdet,
    "solve": lambda a: linalg.solve(a, b=torch.ones(N, 3), method="cgls", on_singular="nan"),
}


@pytest.mark.parametrize("name", list(BY_PRODUCTS))
@pytest.mark.parametrize(
    "made", [lambda a: a, lambda a: a.T, lambda a: a @ a.T, lambda a: (a @ a).T]
)
def test_a_map_that_couples_samples_has_no_matrix_for_each(
    name: str, made: Callable[[Any], Any]
) -> None:
    a = batchjac.operator(nn.BatchNorm1d(3), torch.randn(N, 3), coupling="full")
    with pytest.raises(UnsupportedError, match="samples have no blocks of their own"):
        BY_PRODUCTS[name](made(a))
