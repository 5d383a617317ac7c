"""What several tests of the public functions share: a batch in float64, a small network, equality.

Tests that ``pytest.mark.usefixtures("float64")`` make their models and tensors in double precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

N = 5  # samples


@dataclass(frozen=True)
class Result:
    """What a function may return besides tensors, tuples and dicts."""

    y: Tensor
    extra: Any = None


def close(found: Any, expected: Any) -> None:
    """Equal to the rounding of float64, nested alike."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def batch(*shape: int) -> Tensor:
    """N samples, of three numbers unless told."""
    return torch.randn(N, *(shape or (3,)))


def diagonal(x: Tensor) -> Tensor:
    """``[N, i, i]``, as the Jacobian of what treats every entry alone."""
    return torch.diag_embed(x)


def full_truth(f: Callable[..., Any], x: Tensor) -> Tensor:
    """``[N, *out, N, *in]``, which is what PyTorch's own function returns."""
    found: Tensor = torch.autograd.functional.jacobian(copy.deepcopy(f), x)
    return found
