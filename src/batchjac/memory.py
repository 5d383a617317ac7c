"""Bytes: what is free, what was promised, what a walk needs, and the chunks that follow.

    peak = result + samples * (saved + rows * live)

``saved`` is what the forward keeps for one sample, ``live`` the largest sum of blocks that exist
at one moment of the walk, for one sample and one row. Not counted is what libraries keep for
themselves from the first call in a process on: a few MiB such as the kernels oneDNN has compiled,
and the pages of torch's own code, about 20 MiB, which the system may drop.
"""

import contextlib
import ctypes
import functools
import math
import numbers
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchjac import descend
from batchjac.errors import BudgetError, InputError, InputTypeError
from batchjac.graph import Graph, Meta, Slot

SHARE = 0.5  # of what is free, unless max_memory says otherwise
# The forward keeps masks, indices and copies the graph does not name, and computes beside them.
FORWARD = 2.0
# A node computes its gradient beside what it reads (im2col columns, a padded copy, a cast), and
# the allocator leaves holes. Source: tests/test_memory.py, whose cases stay below their budgets.
WALK = 3.0
# One part in so many of what is left beside the result is set aside for pages freed but not given
# back, since giving them back takes a millisecond or two.
HELD = 8
RECORDED = (5, 8)  # the part of an operator's budget that one forward and a row may take
# The widest block of a walk. Larger ones leave the last-level cache, and above 32 MiB are fresh
# pages every time, which glibc maps at a tenth of the speed of reused ones.
# Source: nine models timed at five to ten chunk sizes each, 32 MiB of L3: the best were at 8 to 24
# MiB, up to three times faster than all at once.
BLOCK = 16 << 20
# Rows that go together before samples do: what the forward saved is read once for all of them.
# Source: as above; beyond eight little is gained.
TOGETHER = 16
# Bytes of input for the first forward, before anything is known of the activations; twice as many
# go at once. An integer is an index into vectors. Source: as above, 0.9 to 16 MiB of input.
FIRST, FIRST_OF_INDEX = 1 << 20, 1 << 14
# What stays with the process after a call, freed, for the next one.
FREED = 256 << 20
# Bytes of activations for one byte of input and one output channel of any layer: four of them
# where the input is a byte, before and after the activation function, and once more beside.
_PER_CHANNEL = 4
# The same where no layer can be seen, for one byte of input, and for one of an integer input,
# which is an index into an embedding.
_GROWTH, _GROWTH_OF_INDEX = 1_000, 100_000

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Bytes for one sample: ``saved`` by the forward, ``live`` per row of the walk.

    ``widest``: of the largest block, per row.
    """

    saved: int
    live: int
    widest: int = 1


@dataclass(frozen=True)
class Chunk:
    """How many samples one forward takes, and how many rows one walk pushes."""

    samples: int
    rows: int


def budget(max_memory: float | str | None, device: torch.device) -> int:
    """The promise in bytes: what the caller allows, or a share of what is free."""
    if max_memory is None:
        return int(SHARE * free(device))
    if isinstance(max_memory, str):
        return _parse(max_memory)
    if isinstance(max_memory, bool) or not isinstance(max_memory, numbers.Real):
        raise InputTypeError(
            f'max_memory must be bytes or text such as "512MiB", got {type(max_memory).__name__}'
        )
    if not 1 <= max_memory < math.inf:
        raise InputError(f"max_memory must be at least one byte, and finite, got {max_memory}")
    return int(max_memory)


def _parse(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise InputError(
            f'max_memory must be bytes or text such as "512MiB", more than none, got {text!r}'
        )
    return size


def free(device: torch.device) -> int:
    """Bytes that can be allocated now on this device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_meminfo(), _cgroup())


def _meminfo() -> int:
    with contextlib.suppress(OSError, ValueError):
        _, found = _system("/proc/meminfo").split(b"MemAvailable:", 1)
        return int(found.split(None, 1)[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup() -> int:
    """What a container still allows; a huge number outside one."""
    if not _contained():
        return 1 << 62
    try:
        limit = _system("/sys/fs/cgroup/memory.max").strip()
        used = _system("/sys/fs/cgroup/memory.current").strip()
    except OSError:
        return 1 << 62
    return int(limit) - int(used) if limit.isdigit() else 1 << 62


@functools.cache
def _contained() -> bool:
    return os.path.exists("/sys/fs/cgroup/memory.max")


def _system(path: str) -> bytes:
    """The beginning of a file that the kernel writes; ``Path.read_text`` takes twice as long."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 4096)
    finally:
        os.close(file)


class Heap:
    """Pages that were freed but stayed with the process, handed back before they break a promise.

    glibc rarely gives a freed aligned block to the next request of the same size, so that a loop
    over chunks comes to hold several times what is alive in it.
    """

    def __init__(self) -> None:
        _keep_freed_blocks()
        self.start = _resident()
        self.limit = 1 << 62
        self.written = 0
        self.looked = time.perf_counter()

    def allow(self, left: int) -> None:
        """Hand pages back from when a share of ``left`` bytes is held, or a MiB if that is more.

        Less is not worth the milliseconds that looking for pages takes in a large process.
        """
        self.limit = max(left // HELD, 1 << 20)

    def wrote(self, size: int) -> None:
        """Call after each walk, when little is alive but the result, ``size`` bytes longer now."""
        self.written += size
        now = time.perf_counter()
        if now - self.looked > 1e-3:  # looking takes microseconds, so not after every row
            self.looked = now
            if _trim is not None and _resident() - self.start - self.written > self.limit:
                _trim(0)
                self.start = _resident() - self.written  # what remains is alive


@functools.cache
def _keep_freed_blocks() -> None:
    """Let glibc reuse freed blocks of up to 32 MiB instead of asking the kernel for new pages.

    32 MiB is the most it allows, and what it comes to by itself after a block of that size; it
    then gives pages back whenever twice that is free at the end of its heap, which every call
    does that holds more. Fresh pages are slower to fill than most of a walk's arithmetic: half the
    time of a small ResNet's Jacobian, a fifth of a 1-D network's.
    """
    if _trim is not None and _mallopt is not None:
        _mallopt(_MMAP_THRESHOLD, 32 << 20)
        _mallopt(_TRIM_THRESHOLD, FREED)


def _libc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


_trim = _libc("malloc_trim")  # glibc's own; musl has none
_mallopt = _libc("mallopt")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def _resident() -> int:
    """Bytes of this process in memory, files aside."""
    try:
        pages = _system("/proc/self/statm").split()
    except OSError:
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def size_of(meta: Meta) -> int:
    """Bytes of a dense tensor like this."""
    return math.prod(meta.shape) * meta.dtype.itemsize


# Nodes whose output is a view of what they took: it costs nothing more to keep.
VIEWS = re.compile(
    r"(Alias|AsStrided|Chunk|Diagonal|Expand|Permute|ReshapeAlias|Select|Slice|Split|SplitWithSizes"
    r"|Squeeze|T|Transpose|Unbind|Unfold|UnsafeSplit|UnsafeView|Unsqueeze|View|ViewAsReal"
    r"|ViewAsComplex)Backward\d+"
)


def need(graphs: Sequence[Graph], samples: int, shared: Collection[Slot] = ()) -> Need:
    """What these graphs, recorded on this many samples, hold for each of them.

    ``shared`` slots hold what all samples share: the forward keeps one, but the walk one for every
    row and sample.
    """
    if len(graphs) == 1 and not shared:
        return graphs[0].form.fact(("need", samples), lambda: _need(graphs, samples, ()))
    return _need(graphs, samples, shared)


def _need(graphs: Sequence[Graph], samples: int, shared: Collection[Slot]) -> Need:
    """The same, found out anew."""
    steps = {step.node: step for graph in graphs for step in graph.steps}.values()
    sizes = {(s.node, k): size_of(meta) for s in steps for k, meta in enumerate(s.outputs)}
    saved = sum(
        sizes[step.node, k]
        for step in steps
        if not views(step.name)
        for k in range(len(step.outputs))
        if (step.node, k) not in shared
    )
    widest = max((sizes | _few(graphs, sizes)).values(), default=0)
    for step in steps:  # of a part of a graph edges lead out
        for e in step.edges:
            if e is not None and (e.node, e.slot) not in sizes:
                sizes[e.node, e.slot] = size_of(e.meta)
    for slot in shared:
        if slot in sizes:
            sizes[slot] *= samples
    live = max((_live(g, sizes) for g in graphs), default=0)
    return Need(
        math.ceil(FORWARD * saved / samples),
        max(1, math.ceil(live / samples)),
        max(1, widest // samples),
    )


def _few(graphs: Sequence[Graph], sizes: Mapping[Slot, int]) -> dict[Slot, int]:
    """Bytes of rows that are ``block.Scattered``, for the cache; a budget counts whole planes."""
    few: dict[Slot, int] = {}
    for step in (step for graph in graphs for step in graph.steps):
        edge, mine = step.edges[0] if step.edges else None, few.get((step.node, 0))
        if step.name == "MaxPool2DWithIndicesBackward0":
            waits = (step.outputs[0].dtype, step.outputs[0].device.type) == (torch.float32, "cpu")
            mine = sizes[step.node, 0] if waits else None
        elif step.name != "ReluBackward0" and not views(step.name):
            continue
        if mine is not None and edge is not None and (edge.node, edge.slot) in sizes:
            few[edge.node, edge.slot] = mine
    return few


@functools.cache
def views(name: str) -> bool:
    """Whether the output of this kind of node is a view of what it took."""
    return VIEWS.fullmatch(name) is not None


def _live(graph: Graph, sizes: Mapping[Slot, int]) -> int:
    """The most bytes of blocks at one moment of a walk, for one row."""
    ends = {node for node, _ in graph.targets}
    pending: set[Slot] = set()
    waiting = peak = 0  # bytes of what is pending, and of targets that were reached
    for step in graph.steps:
        node, before = step.node, waiting
        mine = onward = 0
        for k in range(len(step.outputs)):
            slot = (node, k)
            mine += sizes[slot]
            if slot in pending:
                pending.remove(slot)
                if node not in ends or slot not in graph.targets:
                    waiting -= sizes[slot]
        for slot in {(e.node, e.slot) for e in step.edges if e is not None}:
            onward += sizes[slot]
            if slot not in pending:
                pending.add(slot)
                waiting += sizes[slot]
        peak = max(peak, before + int(WALK * (mine + onward)))
    return peak


def first(
    tensors: Sequence[Tensor], module: nn.Module | None, samples: int, allowed: int, told: bool
) -> int:
    """How many samples the first forward takes, before anything is known but its inputs.

    All of them where a generous guess says that they fit. ``told``: the caller set the budget, so
    that without a module to guess from, two samples tell what one needs.
    """
    if module is None and told:
        return min(samples, 2)
    weights = None if module is None else _weights(module)
    each = sum(t.numel() * _growth(t, weights) * t.element_size() for t in tensors) // samples
    parts = [t.nbytes / (FIRST if t.is_floating_point() else FIRST_OF_INDEX) for t in tensors]
    widest = max((p.shape[0] * p.element_size() for p in weights or ()), default=0)
    times = max(sum(parts), samples * widest / BLOCK)
    few = samples if times <= 2 else int(samples / times)
    return max(min(samples, 2), min(samples, few, allowed // max(1, each)))


def _growth(tensor: Tensor, weights: Sequence[Tensor] | None) -> int:
    """Bytes that a forward holds for one byte of this input; no weights of a mere function."""
    if weights is None:
        return _GROWTH if tensor.is_floating_point() else _GROWTH_OF_INDEX
    channels = sum(p.shape[0] for p in weights)
    return max(_PER_CHANNEL * channels, 64)


def _weights(module: nn.Module) -> list[Tensor]:
    """What makes outputs of its first axis: the matrices and kernels of all layers."""
    return [p for p in descend.parameters(module) if p.dim() > 1]


def chunk(need: Need, samples: int, rows: int, allowed: int, result: int, whole: bool) -> Chunk:
    """The largest chunk within ``allowed`` bytes: all rows first, then as many samples as fit.

    ``whole`` keeps all samples together, because they depend on each other. What fits is cut once
    more so that a walk stays in the cache: rows, which takes no second forward; samples only where
    one row of all of them is too large.
    """
    rows = max(1, rows)
    usable = spare(allowed, result)
    per_sample = need.saved + rows * need.live
    count = samples if whole else max(1, min(samples, usable // per_sample))
    fitting = min(rows, (usable // count - need.saved) // need.live)
    if fitting < 1:
        raise BudgetError(_too_small(count * (need.saved + need.live), allowed, result, whole))
    if not whole and count * need.widest > BLOCK:
        count = max(1, BLOCK // (min(rows, TOGETHER) * need.widest))
        fitting = min(rows, (usable // count - need.saved) // need.live)
    return Chunk(count, max(1, min(fitting, BLOCK // (count * need.widest))))


def spare(allowed: int, result: int) -> int:
    """What chunks may take: all beside the result but what is set aside for held pages."""
    left = allowed - result
    return left - math.ceil(left / HELD)


def _too_small(least: int, allowed: int, result: int, whole: bool) -> str:
    total = result + math.ceil(least * HELD / (HELD - 1)) + 1
    return (
        f"max_memory allows {text(allowed)}, but what is kept takes {text(result)} and "
        f"{'the whole batch' if whole else 'one sample'} with one row {text(total - result)} "
        f"beside it; the least that would do is max_memory={total}. If the result is what is "
        "large, select outputs= or pass out= a memory-mapped array"
    )


def beside_columns(allowed: int) -> int:
    """What an operator's forward may take with one row: columns of products wait beside it."""
    return spare(allowed, 0) * RECORDED[0] // RECORDED[1]


def too_small_beside(least: int, allowed: int, whole: bool) -> str:
    """What to say where ``least`` bytes are more than ``beside_columns``."""
    of_all = math.ceil(least * RECORDED[1] / RECORDED[0])
    total = math.ceil(of_all * HELD / (HELD - 1)) + 1
    return (
        f"max_memory allows {text(allowed)}, but {'the whole batch' if whole else 'one sample'} "
        f"with one row takes {text(least)}, and products need room beside it; the least that would "
        f"do is max_memory={total}. {'Take fewer samples' if whole else 'Raise it'}"
    )


def text(size: int) -> str:
    """A number of bytes as people read it."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"
