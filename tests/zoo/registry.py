"""What a case of the zoo is, and the one place where cases are registered."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from batchjac.errors import BatchjacError

Function = Callable[..., Any]
Build = Callable[[], tuple[Function, Any]]

# The laws that tests/test_laws.py states; a case names those that its function does not obey.
LAWS = frozenset({"directional", "alone", "permute", "compose", "chunks", "out"})
# At a kink, or with a gradient that its author replaced, differences of values say nothing.
NOT_ITS_SLOPE = frozenset({"directional"})
# Noise belongs to a place in the batch and to one call, so moving or splitting samples changes it.
NOISY = frozenset({"permute", "chunks"})
# The function knows its samples by their place: it holds lengths, edges or a batch size of its own.
BY_PLACE = frozenset({"permute", "chunks"})


@dataclass(frozen=True)
class Case:
    """One architecture, what is asked of it, and what must come out."""

    name: str
    group: str
    build: Build
    options: Mapping[str, Any] = field(default_factory=dict)
    expects: type[BatchjacError] | None = None
    tolerance: float = 1e-9
    dtype: torch.dtype = torch.float64
    expected: Callable[[Function, Any], Any] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    without: frozenset[str] = frozenset()
    may_change: str = ""  # in the names of what nobody can undo; the case says why

    @property
    def seed(self) -> int:
        """The same for every run and different between cases."""
        return zlib.crc32(self.name.encode())


CASES: list[Case] = []


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers that start at ``seed`` inside, and go on outside as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def case(
    name: str, *, group: str, without: Iterable[str] = (), **facts: Any
) -> Callable[[Build], Build]:
    """Register the decorated builder; refuse a name that is taken and a law that does not exist."""
    if any(name == known.name for known in CASES):
        raise ValueError(f"case {name!r} is registered twice")
    if unknown := set(without) - LAWS:
        raise ValueError(f"case {name!r}: no such laws {sorted(unknown)}; there are {sorted(LAWS)}")
    dtype = facts.get("dtype", torch.float64)

    def register(make: Build) -> Build:
        def build() -> tuple[Function, Any]:
            with seeded(zlib.crc32(name.encode())), default_dtype(dtype):
                return make()

        CASES.append(Case(name, group, build, without=frozenset(without), **facts))
        return make

    return register
