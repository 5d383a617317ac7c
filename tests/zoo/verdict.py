"""What a case comes to: the sweep beside the reference, and everything as it was afterwards."""

from __future__ import annotations

import functools
import logging
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import batchjac
from batchjac.engines import reference
from batchjac.errors import BatchjacError

from . import rowloop
from .registry import Case, seeded

Outcome = Literal["right", "documented error", "wrong"]


@dataclass(frozen=True)
class Verdict:
    """How a case came out, with the reason when it is wrong."""

    case: Case
    outcome: Outcome
    detail: str = ""
    by_engine: bool = False  # the walk disagreed with autograd, which then did the work


class Log(logging.Handler):
    """What the library says while a case runs."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def judge(case: Case) -> Verdict:
    """The verdict on a case, and whether the walk itself came to it."""
    logger, log = logging.getLogger("batchjac"), Log()
    logger.addHandler(log)
    try:
        verdict = _judge(case)
    finally:
        logger.removeHandler(log)
    return replace(verdict, by_engine=any("disagree" in line for line in log.said))


def _judge(case: Case) -> Verdict:
    """The sweep equals the truth of the case or raises exactly the error it documents."""
    f, inputs = case.build()
    before = Snapshot.of(f, inputs)
    try:
        with case.around(), seeded(case.seed):
            rng = torch.get_rng_state()
            found = batchjac.jacobian(f, inputs, **case.options)
            if not torch.equal(rng, torch.get_rng_state()):
                return Verdict(case, "wrong", "torch's random state moved")
    except BatchjacError as error:
        if type(error) is not case.expects:
            return Verdict(case, "wrong", f"raised {type(error).__name__}: {error}")
        return _verdict(case, "documented error", before.changes(case.may_change))
    except Exception as error:  # of any class: an undocumented error is a wrong answer
        return Verdict(case, "wrong", f"raised {type(error).__name__}: {error}")
    if case.expects is not None:
        return Verdict(case, "wrong", f"raised nothing instead of {case.expects.__name__}")
    return _verdict(
        case, "right", difference(found, truth(case), case) or before.changes(case.may_change)
    )


def _verdict(case: Case, outcome: Outcome, objection: str) -> Verdict:
    return Verdict(case, "wrong", objection) if objection else Verdict(case, outcome)


def truth(case: Case) -> Any:
    """By the case's own hand where it has one, else by the reference, on a fresh build."""
    f, inputs = case.build()
    with seeded(case.seed):
        if case.expected is not None:
            return case.expected(f, inputs)
        with case.around():
            return reference.jacobian(f, inputs, **case.options)


def difference(found: Any, right: Any, case: Case) -> str:
    """The first way in which two answers differ, in words; empty when they agree."""
    shapes = [rowloop.tree_map(_facts, tree) for tree in (found, right)]
    if shapes[0] != shapes[1]:
        return f"came as {shapes[0]}, expected {shapes[1]}"
    # leaves that are no tensors were compared with the shapes
    for a, b in zip(rowloop.leaves(found), rowloop.leaves(right), strict=True):
        if not isinstance(a, Tensor) or torch.allclose(
            a.double(), b.double(), rtol=case.tolerance, atol=case.tolerance / 10, equal_nan=True
        ):
            continue
        gap = (a.double() - b.double()).abs()
        place = tuple(
            int(i) for i in np.unravel_index(int(gap.nan_to_num(torch.inf).argmax()), gap.shape)
        )
        return f"differs most at {place}: {float(a[place])!r}, expected {float(b[place])!r}"
    return ""


def _facts(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def modules_in(f: Any) -> Iterator[nn.Module]:
    """The modules a callable is, is bound to, or holds in its closure or attributes."""
    if isinstance(f, nn.Module):
        yield f
    elif isinstance(f, functools.partial):
        for held in (f.func, *f.args, *f.keywords.values()):
            yield from modules_in(held)
    elif isinstance(f, types.MethodType):
        yield from modules_in(f.__self__)
    elif isinstance(f, types.FunctionType):
        for cell in f.__closure__ or ():
            if not isinstance(cell.cell_contents, types.FunctionType):
                yield from modules_in(cell.cell_contents)
    else:
        for held in getattr(f, "__dict__", {}).values():
            if isinstance(held, nn.Module):
                yield held


@dataclass(frozen=True)
class Snapshot:
    """Everything of a function and its inputs that a call must leave as it was."""

    look: Callable[[], dict[str, Any]]
    seen: dict[str, Any]

    @classmethod
    def of(cls, f: Any, inputs: Any) -> Snapshot:
        """Look now, so that ``changes`` can look again."""

        def look() -> dict[str, Any]:
            state: dict[str, Any] = {"python random": random.getstate()}
            state["numpy random"] = str(np.random.get_state())
            for k, x in enumerate(t for t in rowloop.leaves(inputs) if isinstance(t, Tensor)):
                state |= _tensor(f"input {k}", x)
            for k, top in enumerate(modules_in(f)):
                for name, module in top.named_modules():
                    state |= _module(f"module {k} {name}", module)
            return state

        return cls(look, look())

    def changes(self, allowed: str = "") -> str:
        """The names of what is not as it was, but for those allowed; empty when all is."""
        now = self.look()
        names = sorted(self.seen.keys() ^ now.keys())
        both = self.seen.keys() & now.keys()
        names += sorted(n for n in both if not _same(self.seen[n], now[n]))
        names = [n for n in names if not (allowed and allowed in n)]
        return f"left changed: {', '.join(names)}" if names else ""


def _tensor(name: str, x: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        facts: dict[str, Any] = {f"{name} value": x.detach().clone()}
    facts[f"{name} requires_grad"] = x.requires_grad
    if x.is_leaf:
        facts[f"{name} grad"] = None if x.grad is None else x.grad.clone()
    facts[f"{name} hooks"] = len(x._backward_hooks or ())
    return facts


def _module(name: str, module: nn.Module) -> dict[str, Any]:
    held = vars(module)
    facts: dict[str, Any] = {f"{name} training": getattr(module, "training", None)}
    facts[f"{name} attributes"] = sorted(held)
    for key, value in held.items():
        if "hooks" in key and hasattr(value, "__len__"):
            facts[f"{name} {key}"] = len(value)
    tensors = {**module._parameters, **module._buffers}
    tensors |= {k: v for k, v in held.items() if isinstance(v, Tensor)}
    for key, value in tensors.items():
        if value is None or torch.nn.parameter.is_lazy(value):
            facts[f"{name} {key}"] = str(type(value))
        else:
            facts |= _tensor(f"{name} {key}", value)
    return facts


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    return type(a) is type(b) and bool(a == b)


def _bits(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
