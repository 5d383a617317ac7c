"""The user's model and random numbers, put back as they were, also after an error."""

import contextlib
import operator
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchjac import descend
from batchjac.errors import StateError

_ONE_AT_A_TIME = threading.RLock()  # the same thread may ask again, inside a function


@contextlib.contextmanager
def untouched(module: nn.Module | None) -> Iterator[Callable[[], None]]:
    """Run a block; then restore random state, buffers, attributes, ``.grad`` and flags.

    Yields what restores all but the random state, so that each of several forwards in the block
    finds the module as the first did. Blocks run one after another, whatever thread they are in:
    they share the flags of a model and what is patched into torch.

    Attributes are restored to the same objects, and lists, dicts and sets among them to the same
    contents. Without a module (a plain function) every module that the function calls is noted
    just before its first call. Raises ``StateError`` when the block wrote into a parameter: a copy
    of all parameters for the case that somebody does would cost as much memory as the model.
    """
    with remembered(module) as before:
        yield before.restore


@contextlib.contextmanager
def remembered(module: nn.Module | None) -> Iterator["Before"]:
    """The same, yielding what was remembered, to which one may come back later."""
    before = Before()
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        stack.enter_context(_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.callback(before.restore)
        if module is not None:
            before.note(module)
        else:
            stack.enter_context(_noted(before))
        yield before
    before.check()


def seed(number: int) -> None:
    """Start all random numbers from here."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # torch.manual_seed notes a traceback where it is not: 1 ms
        torch.cuda.manual_seed_all(number)
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number % (1 << 32))


@contextlib.contextmanager
def _noted(before: "Before") -> Iterator[None]:
    """Note every module that runs in this block, before it runs the first time and afterwards.

    Inside a ``torch.func`` transform a module's tensors stand for others, so it is left alone.
    """
    known: set[int] = set()
    outer: list[nn.Module] = []  # the modules whose calls we are in

    def enter(module: nn.Module, args: Any) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return
        if id(module) not in known:
            known.add(id(module))
            before.note(module, running=True)
        if not outer:
            before.enter(module)
        outer.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if outer and outer[-1] is module:
            outer.pop()
            if not outer:
                before.leave(module)

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Put all random numbers back after the block.

    NumPy loads its random numbers when they are first asked for. They are left alone where nobody
    has: what the block then draws or seeds is followed by the fresh start that it would have had.
    """
    loaded = "numpy.random" in sys.modules
    redraw = redrawing(numpy=loaded)
    try:
        yield
    finally:
        redraw()
        if not loaded and "numpy.random" in sys.modules:
            sys.modules["numpy"].random.seed()


def load_random() -> None:
    """Load NumPy's random numbers, if NumPy is there: ``redrawing`` needs them, and 4 MiB."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.get_state()


def redrawing(numpy: bool = True) -> Callable[[], None]:
    """What puts all random numbers back to where they are now; ``numpy`` too, if it is loaded."""
    python = random.getstate()
    module = sys.modules.get("numpy") if numpy else None
    array = module.random.get_state() if module is not None else None
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def redraw() -> None:
        random.setstate(python)
        if module is not None:
            module.random.set_state(array)
        torch.set_rng_state(cpu)
        for k, state in enumerate(devices):
            torch.cuda.set_rng_state(state, k)

    return redraw


@dataclass
class _Parameter:
    """What a parameter was like; ``total`` shows writes past autograd, by way of ``.data``."""

    name: str
    tensor: Tensor
    version: int
    required: bool
    grad: Tensor | None
    data: Tensor
    total: Tensor

    @classmethod
    def of(cls, name: str, p: Tensor) -> "_Parameter":
        version = 0 if p.is_inference() else p._version
        data = p.detach()
        grad = p.grad if p.is_leaf else None  # handed in by functional_call it may be a result
        return cls(name, p, version, p.requires_grad, grad, data, _total(data))

    def restore(self) -> None:
        """Flag, gradient and storage as they were."""
        p = self.tensor
        if p.data_ptr() != self.data.data_ptr() or p.shape != self.data.shape:
            p.data = self.data
        if p.requires_grad != self.required:
            p.requires_grad_(self.required)
        if p.is_leaf and p.grad is not self.grad:
            p.grad = self.grad

    def written(self) -> bool:
        """Whether the values may be others than they were."""
        p = self.tensor
        if not p.is_inference() and p._version != self.version:
            return True
        if p.is_meta:  # shapes alone, of which a plan is made
            return False
        now = _total(p.detach())
        if torch.equal(now, self.total):
            return False
        return not torch.equal(now.nan_to_num(), self.total.nan_to_num())


def _total(data: Tensor) -> Tensor:
    half = data.dtype in (torch.float16, torch.bfloat16)
    return data.sum(dtype=torch.float32 if half else None)


class Before:
    """What modules were like when they were noted."""

    def __init__(self) -> None:
        self.roots: list[nn.Module] = []
        self.attributes: dict[nn.Module, dict[str, Any]] = {}
        self.contents: dict[int, tuple[Any, Any]] = {}  # by id: a container and its shallow copy
        self.entered: dict[tuple[nn.Module, str], dict[str, Any]] = {}
        self.replaced: dict[tuple[nn.Module, str, str], tuple[Any, Any]] = {}
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by id, as tensors hash slowly
        self.parameters: dict[int, _Parameter] = {}

    def note(self, module: nn.Module, running: bool = False) -> None:
        """Remember a module and all below it; what is known already stays as it was.

        A module that is ``running`` may have other tensors in its tables for the time of the call
        (``torch.func.functional_call``); of those tables only what the call itself replaces is put
        back.
        """
        self.roots.append(module)
        for _, child in descend.modules(module):
            if child not in self.attributes:
                held = dict(vars(child))
                if running:
                    for table in _TENSORS:
                        held.pop(table, None)
                self.attributes[child] = held
                self._contents(held)
        parameters, buffers = descend.tensors(module)
        _refuse_lazy(module, [*parameters, *buffers])
        for _, buffer in buffers:
            if id(buffer) not in self.buffers and not buffer.is_meta:
                self.buffers[id(buffer)] = (buffer, buffer.detach().clone())
        for name, p in parameters:
            if id(p) not in self.parameters:
                self.parameters[id(p)] = _Parameter.of(name, p)

    def enter(self, module: nn.Module) -> None:
        """Copy the tables of a module that begins to run."""
        self.entered = {(m, t): dict(table) for m, t, table in _tables(module)}

    def leave(self, module: nn.Module) -> None:
        """Note what the call has replaced in the tables, and what was there first."""
        for child, kind, now in _tables(module):
            then = self.entered.get((child, kind), {})
            for name in {**then, **now}:
                old, new = then.get(name, _NONE), now.get(name, _NONE)
                if old is not new:
                    first, last = self.replaced.get((child, kind, name), (old, old))
                    self.replaced[child, kind, name] = (first if last is old else old, new)

    def _contents(self, held: Any) -> None:
        """Copy the containers among these values, and those inside them."""
        known = self.contents
        for value in held.values() if isinstance(held, dict) else held:
            if type(value) in _CONTAINERS and id(value) not in known:
                # most are empty: the tables of hooks of every module
                known[id(value)] = (value, value.copy() if value else ())
                if value:
                    self._contents(value)

    def restore(self) -> None:
        """Put everything back but the values of parameters."""
        for owner, held in self.attributes.items():
            _restore(owner, held)
        for container, before in self.contents.values():
            if container or before:
                _refill(container, before)
        for (child, kind, name), (old, new) in self.replaced.items():
            table = vars(child)[kind]
            if table.get(name, _NONE) is new:
                _put(table, name, old)
        for buffer, value in self.buffers.values():
            # batch normalisation writes its statistics without counting the version up, and so do
            # we: the caller may have a graph that saved the buffer
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
        for parameter in self.parameters.values():
            parameter.restore()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """For a block the modules are as they were when they were noted."""
        now = Before()
        with _ONE_AT_A_TIME:
            for module in self.roots:
                now.note(module)
            try:
                self.restore()
                yield
            finally:
                now.restore()

    def check(self) -> None:
        """Refuse a function that wrote into a parameter."""
        for parameter in self.parameters.values():
            if parameter.written():
                raise StateError(
                    f"the function wrote into parameter {parameter.name!r}; batchjac cannot undo "
                    "that. Make it a buffer (buffers are restored), or keep the update out of "
                    "forward"
                )


def refuse_lazy(module: nn.Module) -> None:
    """Refuse a module whose parameters or buffers wait for a first batch."""
    parameters, buffers = descend.tensors(module)
    _refuse_lazy(module, [*parameters, *buffers])


def _refuse_lazy(module: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in named:
        if nn.parameter.is_lazy(tensor):
            raise StateError(
                f"{name!r} of {type(module).__name__} has no shape yet; call the module once on a "
                "batch before asking for its Jacobian"
            )


_NONE = object()  # no entry
_TENSORS = ("_parameters", "_buffers")


def _tables(module: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, Any]]]:
    """The tables of tensors of a module and all below it; a scripted module has others."""
    for _, child in descend.modules(module):
        for kind in _TENSORS:
            table = vars(child).get(kind)
            if isinstance(table, dict):
                yield child, kind, table


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    if value is _NONE:
        table.pop(name, None)
    else:
        table[name] = value


_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, set, deque))


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    held = vars(module)
    if (
        len(held) == len(before)
        and all(map(operator.is_, held, before))
        and all(map(operator.is_, held.values(), before.values()))
    ):
        return  # what usually holds, at a tenth of the cost of looking at each name
    for name in [n for n in held if n not in before and n not in _TENSORS]:
        del held[name]
    for name, value in before.items():
        if held.get(name, _NONE) is not value:
            held[name] = value


def _refill(container: Any, before: Any) -> None:
    """Give a container its old entries, in place, so that handles that point to it stay valid."""
    same = len(container) == len(before) and all(map(operator.is_, container, before))
    if same and isinstance(container, dict):
        same = all(map(operator.is_, container.values(), before.values()))
    if not same:
        container.clear()
        (container.extend if isinstance(container, list | deque) else container.update)(before)


def normal(tensor: Tensor) -> Tensor:
    """The tensor, or a copy autograd can record when it was made under inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
