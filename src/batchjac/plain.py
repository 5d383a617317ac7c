"""Run compiled and checkpointed parts of a function as the plain Python they were made from.

The walk reads what a forward recorded. A compiled part records one opaque node; a checkpoint
records nothing, and runs its part again for every value that is read. Chunks bound the memory that
a checkpoint would have saved.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Neither compile nor checkpoint in this block."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_replaced("CheckpointFunction", _Called))
        stack.enter_context(_replaced("_checkpoint_without_reentrant_generator", _once))
        yield


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """No autocast in this block: derivatives are computed in the precision that was recorded.

    The caller's autocast is for the forward; around a backward pass torch advises against it.
    """
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Called:
    """In place of the reentrant checkpoint's ``autograd.Function``: the call itself."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _once(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In place of what the other kind does before and after the call: nothing."""
    yield


@contextlib.contextmanager
def _replaced(name: str, value: Any) -> Iterator[None]:
    before = getattr(checkpoints, name)
    setattr(checkpoints, name, value)
    try:
        yield
    finally:
        setattr(checkpoints, name, before)
