"""Zeros into which cotangents are written: in place, unless what is written is recorded."""

from typing import Any

import torch
from torch import Tensor


def onto(zeros: Tensor, method: str, *args: Any) -> Tensor:
    """``aten.scatter_(zeros, ...)`` or another that writes; a fresh tensor under autograd."""
    suffix = "" if torch.is_grad_enabled() else "_"
    result: Tensor = getattr(torch.ops.aten, method + suffix)(zeros, *args)
    return result
