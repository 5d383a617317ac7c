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
    dynamo = "torch._dynamo" in sys.modules
    before = {name: getattr(checkpoints, name) for name in _INSTEAD}
    with torch.compiler.set_stance("force_eager") if dynamo else contextlib.nullcontext():
        vars(checkpoints).update(_INSTEAD)
        try:
            yield
        finally:
            vars(checkpoints).update(before)


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """No autocast in this block: derivatives are computed in the precision that was recorded.

    The caller's autocast is for the forward; around a backward pass torch advises against it.
    """
    on = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    if not on:  # as in most calls
        yield
        return
    with contextlib.ExitStack() as stack:
        for device in on:
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


_INSTEAD = {"CheckpointFunction": _Called, "_checkpoint_without_reentrant_generator": _once}
