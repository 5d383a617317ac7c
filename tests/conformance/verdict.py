"""One case: a function and a batch; the sweep beside the reference; what came of it."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import batchjac
from batchjac.engines import reference
from batchjac.errors import BatchjacError
from batchjac.tree import flatten

from .databases import seeded

Outcome = Literal["right", "documented error", "torch cannot", "wrong"]

# Rounding of float64 through a handful of operations; of each entry, of the Jacobian's largest,
# and of the ones that cancel where the truth is zero (torch's inputs are between -10 and 10).
RELATIVE = 1e-8
OF_LARGEST = 1e-9
OF_CANCELLED = 1e-12
SEED = 20


@dataclass(frozen=True, eq=False)  # a case is itself: remembered answers hang on it
class Case:
    """A function of a batch, made afresh by ``build``, and how it is asked about."""

    name: str
    route: str
    detail: str
    build: Callable[[], tuple[Callable[..., Any], Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    truth: Case | None = None  # another way to the same Jacobian, for the reference

    def __str__(self) -> str:
        return f"{self.name} [{self.route}] {self.detail}"


@dataclass(frozen=True)
class Verdict:
    """``error`` names the documented error; ``slow`` the nodes without a rule and their ways."""

    case: Case
    outcome: Outcome
    detail: str = ""
    error: str = ""
    slow: Mapping[str, str] = field(default_factory=dict)


def judge(case: Case) -> Verdict:
    """Right: the sweep equals the reference. An error counts only if both give the same one."""
    heard: list[str] = []
    expected = _expected(case.truth or case)
    if isinstance(expected, Exception):
        expected = _expected(case)
    with _listening(heard):
        found = _attempt(batchjac.jacobian, case)
    slow = _slow(heard)
    outcome, detail, error = _compare(found, expected)
    both = isinstance(found, Exception) and isinstance(expected, Exception)
    if outcome == "wrong" and both and _torch_refuses(case):
        outcome = "torch cannot"
    if any("disagree" in message for message in heard):
        outcome, detail = "wrong", f"only autograd's row loop put it right. {detail}"
    return Verdict(case, outcome, detail, error, slow)


def _compare(found: Any, expected: Any) -> tuple[Outcome, str, str]:
    if isinstance(found, BatchjacError) and type(found) is type(expected):
        return "documented error", _short(found), type(found).__name__
    if isinstance(expected, Exception) or isinstance(found, Exception):
        return "wrong", f"came as {_short(found)}; reference: {_short(expected)}", ""
    objection = difference(found, expected)
    return ("wrong", objection, "") if objection else ("right", "", "")


@functools.lru_cache(maxsize=1)  # the loop is the truth of two routes, asked one after the other
def _expected(case: Case) -> Any:
    return _attempt(reference.jacobian, case)


def _attempt(engine: Callable[..., Any], case: Case) -> Any:
    """The engine's answer, or the exception it raised."""
    with _prepared(case, SEED) as (f, inputs):
        try:
            if not case.options.get("create_graph"):
                return engine(f, inputs, **case.options)
            starts = tuple(t.clone().requires_grad_(t.is_floating_point()) for t in inputs)
            found = engine(f, starts, **case.options)
            return found, _second(found, starts)
        except Exception as error:  # of any class: it is the answer, compared like any other
            return error


def forward(case: Case, seed: int = SEED) -> Any:
    """The function's own value, or the exception it raised."""
    with _prepared(case, seed) as (f, inputs):
        try:
            return f(*(t.clone() for t in inputs))
        except Exception as error:  # an operator may refuse its arguments in any way
            return error


@contextmanager
def _prepared(case: Case, seed: int) -> Iterator[tuple[Callable[..., Any], Any]]:
    """The function and its inputs made afresh; the same random numbers for every engine."""
    with seeded(SEED):
        f, inputs = case.build()
        torch.manual_seed(seed)
        yield f, inputs


def _torch_refuses(case: Case) -> bool:
    """Whether plain autograd on the same function fails, at the same order of derivative."""
    twice = bool(case.options.get("create_graph"))
    with _prepared(case, SEED) as (f, inputs):
        starts = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        wanted = [t for t in starts if t.requires_grad]
        call = f if case.options.get("batched", True) else torch.vmap(f, randomness="different")
        try:
            y = call(*starts)
            for _ in range(1 + twice):
                total = _sum(y)
                y = torch.autograd.grad(total, wanted, create_graph=twice, allow_unused=True)
        except Exception:  # of any class: that torch fails is the answer
            return True
    return False


def _sum(tree: Any) -> Tensor:
    tensors = [t for t in flatten(tree).leaves if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.sum() for t in tensors]).sum()


def _second(found: Any, starts: tuple[Tensor, ...]) -> list[Tensor]:
    """The derivative of ``sum(w * J)`` by the inputs, with fixed random weights ``w``."""
    generator = torch.Generator().manual_seed(SEED)
    leaves = [j for j in flatten(found).leaves if isinstance(j, Tensor)]
    total = torch.zeros((), dtype=torch.float64)
    for j in leaves:
        weights = torch.randn(j.shape, generator=generator, dtype=torch.float64)
        total = total + (weights * j).sum()
    wanted = [t for t in starts if t.requires_grad]
    if not total.requires_grad:
        return [torch.zeros_like(t) for t in wanted]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]


def difference(found: Any, expected: Any) -> str:
    """The first way in which two answers differ, in words; empty when they agree."""
    a, b = flatten(found), flatten(expected)
    if a.paths != b.paths:
        return f"nested as {a.paths}, reference: {b.paths}"
    for path, ours, theirs in zip(a.paths, a.leaves, b.leaves, strict=True):
        objection = _leaf(ours, theirs)
        if objection:
            return f"J{path}: {objection}"
    return ""


def _leaf(ours: Any, theirs: Any) -> str:
    if ours is None or theirs is None:
        return "" if ours is theirs else f"{_facts(ours)}, reference: {_facts(theirs)}"
    if _facts(ours) != _facts(theirs):
        return f"{_facts(ours)}, reference: {_facts(theirs)}"
    ours, theirs = ours.detach(), theirs.detach()
    finite = theirs[theirs.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    absolute = OF_LARGEST * size + OF_CANCELLED
    if torch.allclose(ours, theirs, rtol=RELATIVE, atol=absolute, equal_nan=True):
        return ""
    gap = (ours - theirs).abs()
    gap[ours.isnan() & theirs.isnan() | (ours == theirs)] = 0
    worst = int(gap.nan_to_num(torch.inf).argmax())
    place = tuple(int(k) for k in torch.unravel_index(torch.tensor(worst), gap.shape))
    return f"at {place} {float(ours[place])!r}, reference: {float(theirs[place])!r}"


def _facts(leaf: Any) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return re.sub(r"0x[0-9a-f]+", "", lines[0]) if lines else ""


def _short(answer: Any) -> str:
    if isinstance(answer, Exception):
        return f"{type(answer).__name__}: {_first_line(answer)[:200]}"
    return "an answer"


@contextmanager
def _listening(heard: list[str]) -> Iterator[None]:
    """What batchjac logs while the block runs."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, ear = logging.getLogger("batchjac"), Ear()
    level, onward = logger.level, logger.propagate
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
        logger.propagate = onward


def _slow(heard: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for message in heard:
        if message.startswith("nodes without a rule"):
            found |= dict(re.findall(r"(\S+) \((vmap|rows)\)", message))
    return found
