"""What several tests of the public functions share: a batch in float64, small networks, equality.

Tests that ``pytest.mark.usefixtures("float64")`` make their models and tensors in double precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import batchjac

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


def wide(i: int, o: int) -> nn.Sequential:
    """From i numbers to o of them."""
    return nn.Sequential(nn.Linear(i, 8), nn.Tanh(), nn.Linear(8, o))


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


def times(j: Tensor, v: Tensor) -> Tensor:
    """``J v`` of Jacobians ``[N, O, I]`` and vectors ``[N, I]``."""
    return torch.einsum("noi,ni->no", j, v)


def parameter_rows(f: nn.Module, x: Any, **options: Any) -> Tensor:
    """The Jacobians by all parameters as matrices, ``[N, O, P]``."""
    j = batchjac.jacobian(f, x, wrt="parameters", **options)
    sizes = {name: p.numel() for name, p in f.named_parameters()}
    return torch.cat([t.reshape(len(t), -1, sizes[name]) for name, t in j.items()], 2)
