"""Walks handed to a compiler, once for each kind of graph; then whichever way measures best.

The forward always runs as it is, so that its graph is the one of this very input, whatever its
Python did. A walk over a graph of a kind that is not known yet is written down (``trace``) and
compiled, and from then on replayed with the tensors that the present graph saved.

Law: equal to ``sweep.walk`` up to rounding. A compiled walk is compared with the walk when it is
made, and timed beside it and beside what was written down, replayed without a compiler; the
fastest of the three is what later calls take. What cannot be compiled is walked as it is.
"""

import logging
import math
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchjac.block import Block
from batchjac.engines.sweep import Kernels, Places, walk
from batchjac.engines.trace import Noted, Read, Refused, Task
from batchjac.errors import is_out_of_memory
from batchjac.graph import Graph, Slot

log = logging.getLogger("batchjac")

_MOST = 64  # kinds of graphs that are remembered
_EACH = 8  # compiled walks of one kind: what was read may differ
_LONG = 0.2  # seconds: longer walks are timed once
_MARGIN = 0.95  # of the walk's time: what is faster by less is noise

# A wrong walk is wrong by the size of the result; rounding is far below the square root of eps.
_ROOT_EPS = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}

Replay = Callable[..., Any]


@dataclass(frozen=True)
class _Compiled:
    """What is known about one kind of walk; ``replay`` is None where it is walked as it is."""

    reads: tuple[Read, ...] = ()
    found: tuple[tuple[int, int, tuple[int, ...]], ...] = ()  # step, output, shape of each target
    ways: Mapping[str, str] = field(default_factory=dict)  # of the nodes
    replay: Replay | None = None
    way: str = ""
    refused: str = ""


# The empty list: met once, and not compiled.
_known: OrderedDict[Any, list[_Compiled]] = OrderedDict()


def forget() -> None:
    """Forget all compiled walks, and free what they hold."""
    _known.clear()


@dataclass
class Compiler:
    """The walks of one call; ``patient``: only those that were met before are compiled.

    ``ways`` counts how they were computed, ``refused`` says why some were walked as they are.
    """

    backend: str | None
    patient: bool = False
    ways: Counter[str] = field(default_factory=Counter)
    refused: set[str] = field(default_factory=set)

    @property
    def lines(self) -> tuple[str, ...]:
        """The same in words."""
        counted = tuple(f"walks {way}: {n}" for way, n in sorted(self.ways.items()))
        return counted + tuple(f"not: {reason}" for reason in sorted(self.refused))

    def report(self, by_engine: bool) -> None:
        """Say in the log what was not compiled, and why."""
        if self.backend is None:
            return
        if by_engine:
            self.refused.add("rows went through autograd one at a time")
        elif not self.ways and not self.refused:
            self.refused.add("there was no walk in reverse")
        for reason in sorted(self.refused):
            log.warning("compile=True, but not compiled: %s", reason)

    def walk(
        self,
        graph: Graph,
        seeds: Mapping[Slot, Block],
        kernels: Kernels,
        places: Places | None = None,
        create_graph: bool = False,
    ) -> dict[Slot, Block]:
        """``sweep.walk``, compiled where it can be."""
        if self.backend is None:
            return walk(graph, seeds, kernels, places, create_graph)
        if create_graph:
            self.refused.add("create_graph=True: the walk must leave its own history")
            return walk(graph, seeds, kernels, places, create_graph)
        with torch.no_grad():
            task = Task(graph, seeds, places)
            try:
                return self._compiled(task, kernels)
            except Exception as error:  # the plain walk decides
                if is_out_of_memory(error):
                    raise
                self.refused.add(f"{type(error).__name__}: {error}")
                return task.walk(kernels)

    def _compiled(self, task: Task, kernels: Kernels) -> dict[Slot, Block]:
        key = (self.backend, *_settings(), *task.signature)
        known = _remembered(key)
        for one in known or ():
            given = task.arguments(one.reads)
            if given is not None:
                return self._again(one, given, task, kernels)
        if known is None and self.patient:
            _remember(key)
            self.ways["as it is, until it is met again"] += 1
            return task.walk(kernels)
        return self._first(key, task, kernels)

    def _again(
        self, one: _Compiled, given: list[Tensor], task: Task, kernels: Kernels
    ) -> dict[Slot, Block]:
        """A walk of a kind that is known."""
        self._count(one)
        if one.replay is None:
            return task.walk(kernels)
        for name, way in one.ways.items():
            kernels.took(name, way)
        return {
            (task.graph.steps[step].node, k): Block(data, shape)
            for (step, k, shape), data in zip(one.found, one.replay(*given), strict=True)
        }

    def _first(self, key: Any, task: Task, kernels: Kernels) -> dict[Slot, Block]:
        """Walk, and have the same compiled for the next time."""
        try:
            task.refuse()
            noted = task.note()
        except Refused as error:
            made = _Compiled(refused=str(error))
            _remember(key, made)
            self._count(made)
            return task.walk(kernels)
        for name, way in noted.kernels.ways.items():
            kernels.took(name, way)
        found = tuple((task.index[n], k, block.shape) for (n, k), block in noted.found.items())
        made = _Compiled(noted.reads, found, noted.kernels.ways)
        try:
            assert self.backend is not None
            way, replay = _fastest(task, noted, _candidates(task, noted, self.backend))
            made = replace(made, way=way, replay=replay)
        except Refused as error:
            made = replace(made, refused=str(error))
        except Exception as error:  # whatever a tracer or a compiler raises: the walk is done
            made = replace(made, refused=_brief(error))
        _remember(key, made)
        self._count(made)
        return noted.found

    def _count(self, one: _Compiled) -> None:
        if one.refused:
            self.refused.add(one.refused)
        else:
            self.ways[one.way] += 1


def _settings() -> tuple[Any, ...]:
    """What a compiled walk depends on beside the graph."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
    )


def _remembered(key: Any) -> list[_Compiled] | None:
    known = _known.get(key)
    if known is not None:
        _known.move_to_end(key)
    return known


def _remember(key: Any, *made: _Compiled) -> None:
    known = _known.setdefault(key, [])
    known.extend(made)
    del known[:-_EACH]
    while len(_known) > _MOST:
        _known.popitem(last=False)


def _brief(error: Exception) -> str:
    """One line of what torch's compilers say on pages."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said[:200]}"


def _candidates(task: Task, noted: Noted, backend: str) -> dict[str, Replay]:
    """The compiled walk, and what was written down for the compiler run as it stands."""
    with warnings.catch_warnings():
        # torch's tracers and compilers warn of their own age and settings; the walk is ours
        warnings.simplefilter("ignore")
        from torch._dynamo import lookup_backend

        module = task.write(noted)
        given = [tensor.detach() for tensor in noted.tensors]
        compiled = lookup_backend(backend)(module, given)  # as torch.compile hands it on
        compiled(*given)  # some compile at their first call
    return {f"by {backend}": compiled, "replayed without a compiler": module.forward}


def _fastest(task: Task, noted: Noted, candidates: dict[str, Replay]) -> tuple[str, Replay | None]:
    """Of those that agree with the walk, the fastest; None for the walk itself."""
    wrong = [way for way, run in candidates.items() if not _agrees(noted, run)]
    if wrong:
        raise Refused(f"the walk {' and '.join(wrong)} differs from the walk")

    def replay(run: Replay) -> None:
        run(*(task.arguments(noted.reads) or ()))

    times, usual = dict.fromkeys(candidates, math.inf), math.inf
    for _ in range(3):
        usual = min(usual, _seconds(lambda: task.walk(Kernels()), noted))
        for way, run in candidates.items():
            times[way] = min(times[way], _seconds(partial(replay, run), noted))
        if usual > _LONG:
            break
    best = min(times, key=times.__getitem__)
    if times[best] < _MARGIN * usual:
        return best, candidates[best]
    return "as it is, which measured fastest", None


def _seconds(act: Callable[[], Any], noted: Noted) -> float:
    devices = {t.device for t in noted.tensors if t.device.type == "cuda"}
    start = time.perf_counter()
    act()
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _agrees(noted: Noted, run: Replay) -> bool:
    """Whether a random combination of the rows is the same; of all rows, at one row's memory."""
    blocks = list(noted.found.values())
    answers = run(*noted.tensors)
    return len(answers) == len(blocks) and all(
        ours.data.shape == theirs.shape
        and ours.data.dtype == theirs.dtype
        and _close(ours.data, theirs, _ROOT_EPS.get(theirs.dtype, 1e-3))
        for ours, theirs in zip(blocks, answers, strict=True)
    )


def _combined(data: Tensor) -> Tensor:
    weights = torch.linspace(0.3, 3, len(data), dtype=torch.float64, device="cpu").cos()
    wide = data.dtype if data.is_complex() else torch.promote_types(data.dtype, torch.float32)
    total = torch.zeros(data.shape[1:], dtype=wide, device=data.device)
    for weight, row in zip(weights.tolist(), data, strict=True):
        total.add_(row, alpha=weight)
    return total


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    a, b = _combined(ours), _combined(theirs)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    if not finite.any():
        return True
    # gradients that cancel are rounding of what was cancelled
    size = max(float(a[finite].abs().max()), 0.1 * max(map(_largest, ours), default=0.0))
    return bool((a - b)[finite].abs().max() <= tolerance * size)


def _largest(row: Tensor) -> float:
    """The largest finite entry."""
    return float(row.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if row.numel() else 0.0
