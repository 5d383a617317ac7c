"""The user's model and random numbers, put back as they were, also after an error."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from batchjac.errors import StateError


@contextlib.contextmanager
def untouched(module: nn.Module | None) -> Iterator[None]:
    """Run a block; then restore random state, buffers, attributes, ``.grad`` and flags.

    Without a module (a plain function) every module that the function calls is noted just before
    its first call. Raises ``StateError`` when the block wrote into a parameter: a copy of all
    parameters for the case that somebody does would cost as much memory as the model.
    """
    before = _Before()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.callback(before.restore)
        if module is not None:
            before.note(module)
        else:
            stack.enter_context(_at_first_call(lambda m: before.note(m, running=True)))
        yield
    before.check()


@contextlib.contextmanager
def _at_first_call(act: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call ``act`` on every module that runs in this block, before it runs the first time.

    Inside a ``torch.func`` transform a module's tensors stand for others, so it is left alone.
    """
    known: set[int] = set()

    def hook(module: nn.Module, args: Any) -> None:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if id(module) not in known and not transformed:
            known.add(id(module))
            act(module)

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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


class _Before:
    """What modules were like when they were noted."""

    def __init__(self) -> None:
        self.attributes: dict[nn.Module, dict[str, Any]] = {}
        self.buffers: dict[Tensor, tuple[Tensor, int]] = {}
        self.parameters: dict[Tensor, tuple[str, int, bool, Tensor | None]] = {}

    def note(self, module: nn.Module, running: bool = False) -> None:
        """Remember a module and all below it; what is known already stays as it was.

        A module that is ``running`` may have other tensors in its tables for the time of the call
        (``torch.func.functional_call``); those tables are left to whoever changed them.
        """
        for child in module.modules():
            if child not in self.attributes:
                self.attributes[child] = _attributes(child)
                if running:
                    for table in ("_parameters", "_buffers"):
                        self.attributes[child].pop(table, None)
        for buffer in module.buffers():
            if buffer not in self.buffers:
                self.buffers[buffer] = (buffer.detach().clone(), buffer._version)
        for name, p in module.named_parameters():
            if p not in self.parameters:
                version = 0 if p.is_inference() else p._version
                self.parameters[p] = (name, version, p.requires_grad, p.grad)

    def restore(self) -> None:
        """Put everything back but the values of parameters."""
        for owner, held in self.attributes.items():
            _restore(owner, held)
        with torch.no_grad():
            for buffer, (value, _) in self.buffers.items():
                # batch normalisation writes its statistics without counting the version up; a
                # needless write would spoil graphs of the caller that saved the buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for p, (_, _, required, grad) in self.parameters.items():
            if p.requires_grad != required:
                p.requires_grad_(required)
            if p.grad is not grad:
                p.grad = grad

    def check(self) -> None:
        """Refuse a function that wrote into a parameter."""
        for p, (name, version, _, _) in self.parameters.items():
            if not p.is_inference() and p._version != version:
                raise StateError(
                    f"the function wrote into parameter {name!r}; batchjac cannot undo that. Make "
                    "it a buffer (buffers are restored), or keep the update out of forward"
                )


_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def _is_table(name: str, value: Any) -> bool:
    return name in _TABLES and isinstance(value, dict)  # a scripted module has other tables


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A shallow copy of what the module holds, its tables of tensors and hooks included."""
    held = vars(module)
    return {k: dict(v) if _is_table(k, v) else v for k, v in held.items()}


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    held = vars(module)
    for name in [n for n in held if n not in before and n not in _TABLES]:
        del held[name]
    for name, value in before.items():
        if name in held and _is_table(name, held[name]):
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
