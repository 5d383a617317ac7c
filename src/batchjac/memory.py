"""Bytes: what is free, what was promised, what a walk needs, and the chunks that follow.

    peak = result + samples * (saved + rows * live)

``saved`` is what the forward keeps for one sample, ``live`` the largest sum of blocks that exist
at one moment of the walk, for one sample and one row.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from batchjac.errors import BudgetError, InputError, InputTypeError
from batchjac.graph import Graph, Meta

SHARE = 0.5  # of what is free, unless max_memory says otherwise
# A node computes its gradient beside what it reads (im2col columns, a padded copy, a cast), and
# the forward keeps masks, indices and copies the graph does not name: counted as once more.
SLACK = 2.0
# Blocks that stay in the last-level cache; larger ones stream through memory at a tenth the speed.
# Source: docs/performance notes, tuned on 2 cores; any value from 4 to 32 MiB is within 10 %.
CACHE = 8 << 20

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Bytes for one sample: ``saved`` by the forward, ``live`` per row of the walk."""

    saved: int
    live: int


@dataclass(frozen=True)
class Chunk:
    """How many samples one forward takes, and how many rows one walk pushes."""

    samples: int
    rows: int


def budget(max_memory: int | str | None, device: torch.device) -> int:
    """The promise in bytes: what the caller allows, or a share of what is free."""
    if max_memory is None:
        return int(SHARE * free(device))
    if isinstance(max_memory, str):
        return _parse(max_memory)
    if isinstance(max_memory, bool) or not isinstance(max_memory, int | float):
        raise InputTypeError(
            f'max_memory must be bytes or text such as "512MiB", got {type(max_memory).__name__}'
        )
    if not max_memory > 0:
        raise InputError(f"max_memory must be positive, got {max_memory}")
    return int(max_memory)


def _parse(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or match[1].count(".") > 1:
        raise InputError(f'max_memory must be bytes or text such as "512MiB", got {text!r}')
    return int(float(match[1]) * _UNITS[match[2]])


def free(device: torch.device) -> int:
    """Bytes that can be allocated now on this device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_meminfo(), _cgroup())


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup() -> int:
    """What a container still allows; a huge number outside one."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return 1 << 62
    return int(limit) - int(used) if limit.isdigit() else 1 << 62


def _size(meta: Meta) -> int:
    return math.prod(meta.shape) * meta.dtype.itemsize


def need(graphs: Sequence[Graph], samples: int) -> Need:
    """What these graphs, recorded on this many samples, hold for each of them."""
    saved = sum(_size(m) for g in graphs for step in g.steps for m in step.outputs)
    live = max((_live(g) for g in graphs), default=0)
    return Need(math.ceil(SLACK * saved / samples), max(1, math.ceil(live / samples)))


def _live(graph: Graph) -> int:
    """The most bytes of blocks at one moment of a walk, for one row."""
    pending: dict[tuple[object, int], int] = {}
    peak = 0
    for step in graph.steps:
        own = sum(_size(m) for m in step.outputs)
        waiting = sum(pending.values())
        for k, meta in enumerate(step.outputs):
            if pending.pop((step.node, k), None) is not None and (step.node, k) in graph.targets:
                pending[(step.node, -1 - k)] = _size(meta)
        edges = [e for e in step.edges if e is not None]
        onward = sum(_size(e.meta) for e in edges)
        peak = max(peak, waiting + int(SLACK * (own + onward)))
        for edge in edges:
            pending[(edge.node, edge.slot)] = _size(edge.meta)
    return peak


def chunk(need: Need, samples: int, rows: int, left: int, whole: bool) -> Chunk:
    """The largest chunk within ``left`` bytes: all rows first, then as many samples as fit.

    ``whole`` keeps all samples together, because they depend on each other. Rows are then cut so
    that a block stays in the cache.
    """
    per_sample = need.saved + rows * need.live
    count = samples if whole else min(samples, left // per_sample)
    if count >= 1 and count * per_sample <= left:
        return Chunk(count, rows)
    count = samples if whole else 1
    fitting = (left // count - need.saved) // need.live
    if fitting < 1:
        least = count * (need.saved + need.live)
        raise BudgetError(
            f"max_memory leaves {_text(max(left, 0))} beside the result, but "
            f"{'the whole batch' if whole else 'one sample'} and one row need "
            f"{_text(least)}; allow at least {_text(least - left)} more, or pass out= a "
            "memory-mapped array if the result is what is large"
        )
    return Chunk(count, min(rows, fitting))


def _text(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


text = _text
