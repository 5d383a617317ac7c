"""Tensors that a function reads besides its arguments: seen in one call, replaced in another."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

Change = Callable[[Tensor], Tensor]

# What is asked of a tensor itself, and not of its numbers.
_ITSELF = (
    "__hash__", "__set__", "requires_grad_", "register_hook", "retain_grad",
    "register_post_accumulate_grad_hook",
)  # fmt: skip
_FIELDS = (
    "grad", "_grad", "grad_fn", "requires_grad", "is_leaf", "_base", "_version", "output_nr",
    "_backward_hooks", "name",
)  # fmt: skip


def _numbers(function: Any) -> bool:
    """Whether a function reads the numbers of its arguments."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(function.__self__, "__name__", "") not in _FIELDS
    return name not in _ITSELF


class _Arguments(TorchFunctionMode):
    """Every tensor that a function of torch's is given passes through ``change``."""

    def __init__(self, change: Change, made: Callable[[Any], None]) -> None:
        super().__init__()
        self.change = change
        self.made = made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _numbers(func):  # what it returns may be the tensor itself, which it did not make
            return func(*args, **(kwargs or {}))
        args = tree_map_only(Tensor, self.change, args)
        kwargs = tree_map_only(Tensor, self.change, kwargs or {})
        result = func(*args, **kwargs)
        self.made(result)
        return result


@contextlib.contextmanager
def arguments(change: Change, made: Callable[[Any], None]) -> Iterator[None]:
    """Pass every tensor given to torch in this block through ``change``, every result to ``made``.

    A user's ``autograd.Function`` is no function of torch's; its ``apply`` is replaced, for this
    thread. It may write into containers that it is given, and autograd looks into none of them.
    """
    original = torch.autograd.Function.__dict__["apply"]
    here = threading.get_ident()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == here:
            args = tuple(change(a) if isinstance(a, Tensor) else a for a in args)
        result = original.__get__(None, cls)(*args, **kwargs)
        if threading.get_ident() == here:
            made(result)
        return result

    # mypy forbids replacing a method; for the forward alone that is what is meant
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        with _Arguments(change, made):
            yield
    finally:
        # the method itself, put back
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


class Seen:
    """The tensors a function was seen to read that it did not make itself."""

    def __init__(self) -> None:
        self.read: dict[int, weakref.ref[Tensor]] = {}
        self.made: dict[int, weakref.ref[Tensor]] = {}

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Note what is read and made in this block."""
        with arguments(self._note, self._notice):
            yield

    @contextlib.contextmanager
    def replacing(self, by: Mapping[int, Tensor]) -> Iterator[None]:
        """Note what is made; torch is given other tensors for those of these identities."""
        with arguments(lambda t: by.get(id(t), t), self._notice):
            yield

    def has_made(self, tensor: Tensor) -> bool:
        """Whether the function made this tensor itself."""
        return _there(self.made, tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        if not _there(self.made, tensor):
            self.read[id(tensor)] = weakref.ref(tensor)
        return tensor

    def _notice(self, result: Any) -> None:
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and not _there(self.read, tensor):
                self.made[id(tensor)] = weakref.ref(tensor)

    def left(self) -> list[Tensor]:
        """Those that are alive when nothing of the call is."""
        found = [ref() for ref in self.read.values()]
        return [t for t in found if t is not None]


def _there(known: Mapping[int, weakref.ref[Tensor]], tensor: Tensor) -> bool:
    ref = known.get(id(tensor))
    return ref is not None and ref() is tensor
