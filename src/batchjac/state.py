"""The user's model and random numbers, put back as they were, also after an error."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from batchjac.errors import StateError


@contextlib.contextmanager
def untouched(module: nn.Module | None) -> Iterator[None]:
    """Run a block; then restore random state, buffers, modes, attributes and ``requires_grad``.

    Raises ``StateError`` when the block wrote into a parameter: a copy of all parameters for the
    case that somebody does would cost as much memory as the model.
    """
    with _random_state(), _module_state(module):
        yield


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    array = numpy.random.get_state() if numpy is not None else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(array)


@contextlib.contextmanager
def _module_state(module: nn.Module | None) -> Iterator[None]:
    if module is None:
        yield
        return
    attributes = [(m, _attributes(m)) for m in module.modules()]
    buffers = [(b, b.detach().clone(), b._version) for b in module.buffers()]
    parameters = [(n, p, p._version, p.requires_grad) for n, p in module.named_parameters()]
    try:
        yield
    finally:
        for owner, before in attributes:
            _restore(owner, before)
        with torch.no_grad():
            for buffer, value, version in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
        for _, parameter, _, required in parameters:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
    for name, parameter, version, _ in parameters:
        if parameter._version != version:
            raise StateError(
                f"the function wrote into parameter {name!r}; batchjac cannot undo that. Make it "
                "a buffer (buffers are restored), or keep the update out of forward"
            )


_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A shallow copy of what the module holds, its tables of tensors and hooks included."""
    held = vars(module)
    return {k: (type(v)(v) if k in _TABLES else v) for k, v in held.items()}


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    held = vars(module)
    for name in [n for n in held if n not in before]:
        del held[name]
    for name, value in before.items():
        if name in _TABLES and name in held:
            _restore_table(held[name], value)
        elif held.get(name) is not value:
            held[name] = value


def _restore_table(table: Any, before: Any) -> None:
    """Refill a table in place, so that handles that point to it stay valid."""
    if list(table.items()) == [] == list(before.items()):
        return
    same = len(table) == len(before) and all(
        a is b for a, b in zip(table.values(), before.values(), strict=True)
    )
    if not same or list(table) != list(before):
        table.clear()
        table.update(before)


def normal(tensor: Tensor) -> Tensor:
    """The tensor, or a copy autograd can record when it was made under inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
