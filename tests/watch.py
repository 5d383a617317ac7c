"""A model that changes whatever a forward can change, and a watch that sees it."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .conftest import global_state


class Busy(nn.Module):
    """Does in its forward what a forward may do, short of writing into its parameters."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4), persistent=False)
        self.fails = fails
        self.history: list[Tensor] = []
        self.table: dict[str, Any] = {"deep": {"list": [1]}, "order": OrderedDict(a=1)}
        self.marks: set[int] = {1}
        self.recent: deque[int] = deque([1, 2], maxlen=2)
        self.to_delete = "still here"
        self.to_replace: Any = "first"

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        h = self.norm(self.first(x))
        self.change(h)
        if self.fails:
            raise ArithmeticError("in the forward")
        y: Tensor = self.last(self.drop(torch.relu(h)))
        return y * random.random() * float(np.random.rand())

    def change(self, h: Tensor) -> None:
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        self.history.append(h)
        self.table["deep"]["list"].append(2)
        self.table["order"].move_to_end("a")
        self.table["new"] = h
        self.marks.add(2)
        self.recent.append(3)
        self.__dict__.pop("to_delete", None)
        self.to_replace = "second"
        self.appears = h
        self.register_buffer("late", torch.ones(1))
        self.extra = nn.Linear(1, 1)
        self.last.register_forward_hook(lambda m, i, o: o * 2)
        self.last.weight.grad = torch.ones_like(self.last.weight)
        self.first.bias.requires_grad_(False)
        self.last.bias.data = self.last.bias.data.clamp(-1, 1)
        self.drop.eval()
        self.norm.momentum = 0.5


def contents(value: Any) -> Any:
    """A value to compare later: containers by content, tensors by bits, the rest by identity."""
    if isinstance(value, Tensor):
        facts = (id(value), value.requires_grad, value.dtype, tuple(value.shape))
        hooks = len(value._backward_hooks or ())
        grad = None if not value.is_leaf or value.grad is None else contents(value.grad)
        return (*facts, value.data_ptr(), value.detach().numpy().tobytes(), hooks, grad)
    if isinstance(value, dict):
        return [type(value), *((k, contents(v)) for k, v in value.items())]
    if isinstance(value, list | deque):
        return [type(value), *map(contents, value)]
    if isinstance(value, set):
        return [type(value), frozenset(map(id, value))]
    return id(value) if not isinstance(value, int | float | bool | str) else value


def of_model(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": contents(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    } | {
        f"{path}.{table}": [(k, contents(v)) for k, v in vars(module)[table].items()]
        for path, module in model.named_modules()
        for table in ("_parameters", "_buffers", "_modules")
    }


def of_torch() -> dict[str, Any]:
    hooks = vars(nn.modules.module)
    return global_state() | {
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "python random": random.getstate(),
        "numpy random": str(np.random.get_state()),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default device": torch.get_default_device(),
        "multithreading": torch._C._is_multithreading_enabled(),
        "register_hook": Tensor.register_hook,
        "gc": gc.isenabled(),
        **{name: contents(hooks[name]) for name in hooks if name.startswith("_global_")},
    }


Look = Callable[[], dict[str, Any]]


class Watch:
    """Looks at a model, inputs and torch, and says later what is not as it was."""

    def __init__(self, model: nn.Module | None, *inputs: Tensor) -> None:
        self.model = model
        self.inputs = inputs
        self.before = self.look()

    def look(self) -> dict[str, Any]:
        seen = of_torch() | (of_model(self.model) if self.model is not None else {})
        return seen | {
            f"input {k}": (contents(x), 0 if x.is_inference() else x._version)
            for k, x in enumerate(self.inputs)
        }

    def changes(self) -> list[str]:
        now = self.look()
        keys = self.before.keys() | now.keys()
        return sorted(k for k in keys if self.before.get(k, "none") != now.get(k, "none"))


def busy(**options: Any) -> Busy:
    """A model with some gradients, hooks and flags of its own."""
    model = Busy(**options)
    model.first.weight.grad = torch.full_like(model.first.weight, 0.25)
    model.last.bias.requires_grad_(False)
    model.first.register_forward_hook(lambda m, i, o: o + 1)
    model.norm.eval()
    model.drop.train()
    return model


# Questions about ``busy``, each by another part of the engines.
QUESTIONS: dict[str, dict[str, Any]] = {
    "inputs": {},
    "outputs": {"outputs": "argmax"},
    "a layer": {"wrt": "first"},
    "of a layer": {"of": "first"},
    "parameters": {"wrt": "parameters"},
    "several": {"wrt": ["inputs", "drop", "last.weight"]},
    "with a history": {"create_graph": True},
    "little memory": {"max_memory": "20kB"},
    "frozen": {"coupling": "frozen"},
    "sum": {"coupling": "sum"},
    "full": {"coupling": "full"},
    "full parameters": {"coupling": "full", "wrt": "parameters"},
}
