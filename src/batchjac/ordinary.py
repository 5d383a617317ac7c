"""Which tensors may be looked at, and which go to kernels of another choice than torch's own."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def ordinary(tensor: Tensor) -> bool:
    """Real numbers that are there now, under no transform: what they are may be looked at."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_floating_point()
        and not tensor.is_meta
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def measured(tensor: Tensor) -> bool:
    """Real numbers in CPU memory as they are, under no transform: there the kernels differ much."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter, FakeTensor)
        and not tensor.is_neg()  # the imaginary part of a conjugate: its sign is not in memory
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.device.type == "cpu"
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def single(tensor: Tensor) -> bool:
    """The same in float32."""
    return tensor.dtype == torch.float32 and measured(tensor)


def unrecorded(tensor: Tensor) -> bool:
    """The same without a history."""
    return single(tensor) and not (tensor.requires_grad and torch.is_grad_enabled())
