"""Zeros into which cotangents are written: in place, unless what is written is recorded."""

from typing import Any

import torch
from torch import Tensor


def onto(zeros: Tensor, method: str, *args: Any) -> Tensor:
    """``zeros.scatter_(...)`` or another that writes; a fresh tensor under autograd.

    The tensor's method, not ``aten.scatter``: where that has several overloads, each that does not
    fit is refused with a message that prints the tensors, which takes longer than the walk. Among
    indices ``None`` stands for a whole axis, which only the operator itself takes.
    """
    suffix = "" if torch.is_grad_enabled() else "_"
    if method == "index_put":
        written: Tensor = getattr(torch.ops.aten, method + suffix).default(zeros, *args)
        return written
    result: Tensor = getattr(zeros, method + suffix)(*args)
    return result
