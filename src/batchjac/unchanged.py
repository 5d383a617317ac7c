"""Whether a function that runs again is still the one that ran first.

Law: what autograd counts as a write, and a tensor in another's place, is noticed in inputs,
parameters and buffers. Of a plain function those of the modules it calls are known.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchjac.state import redrawing


@dataclass
class Watch:
    """The tensors of one function, as they were last noted, and its first random numbers."""

    module: nn.Module | None
    inputs: Sequence[Tensor]
    drew: bool = False  # random numbers, while it was looked at
    redraw: Callable[[], None] = field(default_factory=redrawing)  # puts back those of the start
    called: dict[int, nn.Module] = field(default_factory=dict)  # by a plain function
    first: dict[Tensor, tuple[int, int]] = field(default_factory=dict)  # before the first call
    known: list[tuple[str, Tensor, tuple[int, int], Tensor | None]] = field(default_factory=list)

    def looking(self, around: Callable[[], AbstractContextManager[Any]]) -> Any:
        """What to have around a call to learn which modules it calls and whether it draws."""

        def enter(module: nn.Module, args: Any) -> None:
            inside = torch._C._functorch.peek_interpreter_stack() is not None
            if id(module) not in self.called and not inside:  # there tensors stand for others
                self.called[id(module)] = module
                self._begin()

        @contextlib.contextmanager
        def look() -> Iterator[None]:
            self._begin()
            before = _random()
            with contextlib.ExitStack() as stack:
                stack.enter_context(around())
                if self.module is None:
                    hook = nn.modules.module.register_module_forward_pre_hook(enter)
                    stack.callback(hook.remove)
                yield
            self.drew = self.drew or not _same(before, _random())

        return look

    def note(self) -> None:
        """From here on, this is how it was.

        What the function itself writes into, and we put back, is known by its value: any other
        call counts as a write too.
        """
        self.known = []
        for name, t in self._tensors():
            now = _written(t)
            own = self.first.get(t, now) != now
            self.known.append((name, t, now, t.detach().clone() if own else None))

    def changed(self) -> str | None:
        """In words, what is another than it was."""
        now = list(self._tensors())
        for (name, t), (_, was, written, value) in zip(now, self.known, strict=False):
            same = _written(t) == written if value is None else torch.equal(t, value)
            if t is not was or not same:
                return name
        return None if len(now) == len(self.known) else "a parameter or buffer of the model"

    def _begin(self) -> None:
        for _, t in self._tensors():
            self.first.setdefault(t, _written(t))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for t in self.inputs:
            yield "an input", t
        if self.module is not None:
            for name, t in (*self.module.named_parameters(), *self.module.named_buffers()):
                yield repr(name), t
        for module in self.called.values():
            for name, t in (
                *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
            ):  # fmt: skip
                yield repr(f"{type(module).__name__}.{name}"), t


def _written(t: Tensor) -> tuple[int, int]:
    """What a write in place changes, and what an assignment to ``.data`` does."""
    return (
        0 if t.is_inference() else t._version,
        t.data_ptr() if t.layout == torch.strided else 0,
    )


def _random() -> list[Any]:
    numpy = sys.modules.get("numpy")
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    array = [] if numpy is None else numpy.random.get_state()[1:3]
    return [random.getstate(), [a.tolist() if hasattr(a, "tolist") else a for a in array],
            torch.get_rng_state(), *devices]  # fmt: skip


def _same(before: Sequence[Any], after: Sequence[Any]) -> bool:
    pairs = zip(before, after, strict=False)  # a device may have been used for the first time
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
