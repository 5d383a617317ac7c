"""Inner products of all rows of a parameter Jacobian, which is never there: layer after layer.

The walk hands over what reaches a parameter as soon as it is complete, in the order in which
autograd's engine would take it, so that one layer's factors are alive at a time. What a layer adds
to every inner product is added, and the layer dropped.
"""

import contextlib
import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from batchjac import factors, memory, verify
from batchjac.block import Block
from batchjac.engines.rows import in_engine_order, pull
from batchjac.engines.sweep import NotPerSample, per_sample_ready, walk
from batchjac.errors import BatchjacError, BudgetError, is_out_of_memory
from batchjac.factors import Factored
from batchjac.graph import Graph, Slot, prune
from batchjac.job import Job
from batchjac.recording import Recording
from batchjac.samples import SHARED, Place

log = logging.getLogger("batchjac")

# Entries of an intermediate tensor of a layer, at most: 64 MiB in float32. Smaller where the budget
# is: that many parts of it.
_MOST, _LEAST, _PART = 1 << 24, 1 << 14, 12


@dataclass
class Products(ABC):
    """Adds up inner products of rows, V of each of N samples, a parameter at a time."""

    rows: int
    samples: int
    most: int
    total: Tensor

    def take(self, arrived: Block | Factored, apart: bool) -> None:
        """Add what reached one target, which samples share or have ``apart``."""
        if isinstance(arrived, Factored):
            self.factored(arrived)
            return
        data = arrived.full()  # [V, N, ...]; where samples share what is wanted, [V N, ...]
        size = (self.rows, self.samples)
        rows = data.reshape(*size, data.numel() // math.prod(size)).transpose(0, 1)
        if apart:
            self.apart(rows)
        else:
            self.formed(rows)

    @abstractmethod
    def factored(self, f: Factored) -> None:
        """What a parameter adds whose rows are products."""

    @abstractmethod
    def formed(self, rows: Tensor) -> None:
        """The same for rows ``[N, V, entries]``."""

    @abstractmethod
    def apart(self, rows: Tensor) -> None:
        """The same for rows toward what every sample has its own of."""

    @abstractmethod
    def result(self) -> Tensor:
        """The sum."""


class Norms(Products):
    """``|J[n,v]|²``, ``[N, V]``."""

    def factored(self, f: Factored) -> None:
        self.total += factors.norms(f, self.most)

    def formed(self, rows: Tensor) -> None:
        self.total += rows.square().sum(2)

    apart = formed

    def result(self) -> Tensor:
        return self.total


class Within(Products):
    """``<J[n,v], J[n,w]>``, ``[N, V, V]``."""

    def factored(self, f: Factored) -> None:
        self.total += factors.grams(f, self.most)

    def formed(self, rows: Tensor) -> None:
        self.total += rows @ rows.mT

    apart = formed

    def result(self) -> Tensor:
        return self.total


class Across(Products):
    """``<J[n,v], J[m,w]>``, ``[N, V, N, V]``; the upper half is added to."""

    def factored(self, f: Factored) -> None:
        factors.meets(f, self.total, self.most)

    def formed(self, rows: Tensor) -> None:
        factors.add_products(self.total, rows.flatten(0, 1))

    def apart(self, rows: Tensor) -> None:
        own = rows @ rows.mT
        for n, block in enumerate(own):
            at = slice(n * self.rows, (n + 1) * self.rows)
            self.total[at, at] += block

    def result(self) -> Tensor:
        upper = self.total.triu()
        found: Tensor = (upper + upper.triu(1).T).unflatten(1, (-1, self.rows))
        whole: Tensor = found.unflatten(0, (-1, self.rows))
        return whole


@dataclass
class Factors:
    """All outputs of a recording at once, toward parameters whose rows stay factors."""

    recording: Recording
    places: Mapping[Slot, Place] = field(init=False)
    graph: Graph = field(init=False)

    def __post_init__(self) -> None:
        work = [job for job in self.recording.work if job.root is not None]
        places: dict[Slot, Place] = {}
        names = {}
        for job in work:
            names.update({step.node: step.name for step in job.graph.steps})
            for slot, place in job.proof.places.items():
                places[slot] = place if places.get(slot, place) == place else None
        roots = [job.root[0] for job in work if job.root is not None]
        slots = [goal.slot for goal in self.recording.work[0].goals]
        whole = prune(roots, slots)
        steps = tuple(replace(step, name=names[step.node]) for step in whole.steps)
        self.places, self.graph = places, in_engine_order(replace(whole, steps=steps))

    @property
    def ready(self) -> bool:
        """Whether every sample's rows can be told apart at every parameter."""
        if self.recording.by_engine:
            return False
        goals = self.recording.work[0].goals
        known = all(
            self.places.get(g.slot, SHARED) is SHARED for g in goals if not g.target.per_sample
        )
        return known and per_sample_ready(self.graph, self.places)

    def add(self, seeds: Sequence[Block], products: Products) -> bool:
        """Add what rows ``[V, N, *out]`` of each output give; False where that cannot be trusted.

        What had been added then is worthless.
        """
        recording, own = self.recording, {g.slot: g.target for g in self.recording.work[0].goals}
        starts = {
            job.root: block
            for job, block in zip(recording.work, seeds, strict=True)
            if job.root is not None
        }
        compare = not all(verify.trusted(job, "factored") for job in recording.work)
        compare = compare and recording.problem.coupling != "frozen"
        expected = self._expected(seeds, _weights(products)) if compare else {}
        wrong: list[Slot] = []

        def consume(slot: Slot, arrived: Block | Factored) -> None:
            if isinstance(arrived, Factored) and arrived.rest is not None:
                arrived = arrived.block()
            apart = own[slot].per_sample
            if slot in expected:
                ours = _weighted(arrived, _weights(products), apart)
                theirs = expected.pop(slot)
                ours = ours.detach().reshape(theirs.shape)
                if not verify.near(ours, theirs, self._tolerance) and not verify.near(
                    ours, theirs, self._tolerance, self._noise(seeds, _weights(products))
                ):
                    wrong.append(slot)
            products.take(arrived, apart)

        try:
            walk(
                self.graph, starts, recording.work[0].kernels, self.places,
                recording.problem.create_graph, consume,
            )  # fmt: skip
        except NotPerSample:
            return False
        except Exception as error:  # whatever a node raises: rows and autograd decide
            if isinstance(error, BatchjacError) or is_out_of_memory(error):
                raise
            log.warning("the walk failed (%s: %s): rows are formed", type(error).__name__, error)
            return False
        if wrong or any(theirs.any() for theirs in expected.values()):
            log.warning("factors and autograd disagree on this function: rows are formed")
            return False
        if compare:
            for job in recording.work:
                verify.trust(job, "factored")
        return True

    @property
    def _tolerance(self) -> float:
        return max(verify.tolerance(job) for job in self.recording.work)

    def _noise(self, seeds: Sequence[Block], weights: Tensor) -> float:
        jobs = zip(self.recording.work, seeds, strict=True)
        return max(
            verify.noise(job, _combined(job, block, weights))
            for job, block in jobs
            if job.root is not None
        )

    def _expected(self, seeds: Sequence[Block], weights: Tensor) -> dict[Slot, Tensor]:
        """The weighted sum of all rows toward each target: one backward of autograd's engine."""
        goals = self.recording.work[0].goals
        found: dict[Slot, Tensor] = {}
        for job, block in zip(self.recording.work, seeds, strict=True):
            if job.root is None:
                continue
            cotangent = _combined(job, block, weights)
            for goal, g in zip(goals, pull(job.y, [g.edge for g in goals], cotangent), strict=True):
                if g is not None:
                    found[goal.slot] = found[goal.slot] + g if goal.slot in found else g
        return found


def _combined(job: Job, rows: Block, weights: Tensor) -> Tensor:
    """The weighted sum of cotangents ``[V, N, *out]``."""
    w = weights.to(job.y.device, job.y.dtype)
    combined: Tensor = torch.einsum("vn,vn...->n...", w, rows.full())
    return combined


def _weights(products: Products) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(products.rows, products.samples, generator=generator, dtype=torch.float64)


def _weighted(arrived: Block | Factored, weights: Tensor, apart: bool) -> Tensor:
    if isinstance(arrived, Factored):
        return factors.contracted(arrived, weights)
    data = arrived.full()
    w = weights.to(data.device, data.dtype)
    if apart:
        return torch.einsum("vn,vn...->n...", w, data)
    return torch.einsum("r,r...->...", w.flatten(), data)


def products(kind: type[Products], rows: int, recording: Recording, room: int) -> Products:
    """An empty sum of this kind."""
    n = recording.captured.samples
    y = recording.work[0].y
    shape = {Norms: (n, rows), Within: (n, rows, rows), Across: (n * rows, n * rows)}[kind]
    wide = functools.reduce(torch.promote_types, (t.dtype for t in recording.targets))
    half = wide in (torch.float16, torch.bfloat16)
    total = torch.zeros(shape, dtype=torch.float32 if half else wide, device=y.device)
    most = max(_LEAST, min(_MOST, room // (_PART * y.element_size())))
    return kind(rows, n, most, total)


@dataclass(frozen=True)
class Source:
    """Where recordings come from, and rows; ``room`` bytes beside what is kept already."""

    samples: int
    width: int  # O, the rows of one sample
    room: int
    kept: Recording | None
    whole: bool  # samples must come together
    record: Callable[[Sequence[int]], Recording]  # of these samples
    rows: Callable[[Recording, Sequence[int], Sequence[int]], list[Block]]  # which, of whom
    heap: memory.Heap
    compared: int  # bytes of the gradients of one row, the largest twice more


def total(kind: type[Products], source: Source) -> Tensor | None:
    """Inner products of this kind of all rows; None where rows cannot stay factors.

    A few samples and rows at a time where there is no room for all; inner products between rows
    then need every pair of parts once.
    """
    n, v = source.samples, source.width
    result = {Norms: n * v, Within: n * v * v, Across: 3 * (n * v) ** 2}[kind] * 8
    room = source.room - result
    with _recorded(source, range(min(n, 2) if source.kept is None else n)) as first:
        held = Factors(first)
        if not held.ready:
            return None
        samples, rows = _plan(source, first.need, room, 2 if kind is Across and n > 1 else 1)
    shape = {Norms: (n, v), Within: (n, v, v), Across: (n, v, n, v)}[kind]
    found: Tensor | None = None  # float32 at least, as it was added up
    for some in _parts(n, samples, kind is Across):
        with _recorded(source, some) as recording:
            held = Factors(recording)
            for entries in _parts(v, rows, kind is not Norms):
                part = _one(kind, source, held, some, entries, room)
                if part is None:
                    return None
                if found is None:
                    found = part.new_empty(shape)
                _place(kind, found, part, some, entries)
                del part
                source.heap.wrote(0)
    return found


def _one(
    kind: type[Products],
    source: Source,
    held: Factors,
    some: Sequence[int],
    entries: Sequence[int],
    room: int,
) -> Tensor | None:
    recording = held.recording
    sums = products(kind, len(entries), recording, room)
    with recording.running():
        trusted = held.add(source.rows(recording, entries, some), sums)
    return sums.result() if trusted else None


def _place(
    kind: type[Products], found: Tensor, part: Tensor, some: Sequence[int], entries: Sequence[int]
) -> None:
    device = found.device
    n, v = torch.tensor(some, device=device), torch.tensor(entries, device=device)
    if kind is Norms:
        found[n[:, None], v] = part
    elif kind is Within:
        found[n[:, None, None], v[:, None], v] = part
    else:
        found[n[:, None, None, None], v[:, None, None], n[:, None], v] = part


def _plan(source: Source, need: memory.Need, room: int, least: int) -> tuple[int, int]:
    """How many samples and rows go at a time, ``least`` samples: all rows before all samples."""
    n, v = source.samples, source.width
    # a quarter for a layer's intermediate tensors; gradients are compared the first time
    usable = memory.spare(room, 0) * 3 // 4 - source.compared
    kept = (usable - n * need.saved) // (n * need.live)
    if source.kept is not None and kept >= v:
        return n, v
    if source.whole:
        count, rows = n, kept
    else:
        usable -= 0 if source.kept is None else n * need.saved
        count = min(n, usable // (need.saved + v * need.live))
        if count >= least:
            return count, v
        count, rows = least, (usable // least - need.saved) // need.live
    if rows < min(v, 2):
        wanted = (count * (need.saved + 2 * need.live) + room - usable) * 4 // 3
        raise BudgetError(
            f"max_memory leaves {room >> 10} KiB beside the result, but two rows of {count} "
            f"samples take about {wanted >> 10} KiB; raise it by the difference"
        )
    return count, min(v, rows)


def _parts(count: int, at_once: int, pairs: bool) -> Iterator[list[int]]:
    """All of it, or parts; with ``pairs`` such that any two entries are in one of them."""
    if at_once >= count:
        yield list(range(count))
        return
    step = max(1, at_once // 2) if pairs else at_once
    parts = [list(range(k, min(count, k + step))) for k in range(0, count, step)]
    if not pairs:
        yield from parts
        return
    for k, one in enumerate(parts):
        for other in parts[k + 1 :]:
            yield one + other


@contextlib.contextmanager
def _recorded(source: Source, samples: Sequence[int]) -> Iterator[Recording]:
    if source.kept is not None and (source.whole or len(samples) == source.samples):
        yield source.kept
        return
    recording = source.record(samples)
    try:
        yield recording
    finally:
        recording.close()
