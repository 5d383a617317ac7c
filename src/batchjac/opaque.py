"""Kernels that compilers may not look into, as operators that they call.

Made when a compiled walk asks for one. torch has no way to trace these: ``_slow_conv2d_backward``
says nothing of its result's shape, oneDNN's linear is lowered for weights that are constants, and
our own take addresses.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("batchjac", "FRAGMENT")


@functools.cache
def opaque(
    signature: str, compute: Callable[..., Tensor], shape: Callable[..., Tensor]
) -> Callable[..., Any]:
    """The operator of this signature, ``compute``; ``shape`` makes what stand-ins get.

    One for each name, for the life of the process.
    """
    name = signature.partition("(")[0]
    _library().define(signature)
    _library().impl(name, compute, "CPU")
    _library().impl(name, shape, "Meta")
    found: Callable[..., Any] = getattr(torch.ops.batchjac, name)
    return found
