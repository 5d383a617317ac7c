"""Predicted time beside measured, and the planner's choice beside every forced mode.

``python -m benchmarks.prediction`` goes through the cases of the suite. A plan predicts what comes
*beside the function's own forward*, so what is compared is a call of the plan less the time that
was spent inside the function during that very call. The exit code is 1 where a prediction is off by
more than a factor of two, or where a forced mode is more than 20 % faster than what was chosen.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchjac
from batchjac.errors import UnsupportedError
from batchjac.planning import Planned
from benchmarks.__main__ import environment
from benchmarks.cases import CASES, FURTHER, Case

RESULT = Path("benchmarks/results/prediction.json")
FACTOR = 2.0  # between predicted and measured
SLOWER = 1.2  # than the best forced mode
MODES = ("reverse", "forward", "mixed")
# Samples of the cases that take more than three seconds for each call.
FEWER = {"LeNet5, batch 4096": 1024, "ResNet18": 8, "GPT block, per token": 4, "ViT": 16}
REPEATS, SHARE = 7, 3.0  # calls of each kind, and seconds for all of them together
FAR = 3.0  # a mode this many times slower than the fastest is timed once
HOPELESS = 12.0  # one predicted to take this many times longer is not tried: it may take minutes

Clock = Callable[[], float]


class Timed(nn.Module):
    """A model, and the seconds spent in it, noted in a list that belongs to nobody's state."""

    def __init__(self, model: nn.Module, clock: Clock, spent: list[float]) -> None:
        super().__init__()
        self.model = model
        self.note = _Note(clock, spent)

    def forward(self, x: Tensor) -> Tensor:
        start = self.note.clock()
        y: Tensor = self.model(x)
        self.note.spent.append(self.note.clock() - start)
        return y


@dataclass(frozen=True)
class _Note:
    clock: Clock
    spent: list[float]


@dataclass(frozen=True)
class Line:
    """One case, times in milliseconds; ``modes`` with the forward, as ``whole`` is."""

    case: str
    batch: int
    predicted: float
    measured: float  # beside the forward
    whole: float
    modes: dict[str, float]

    @property
    def ratio(self) -> float:
        """Predicted by measured."""
        return self.predicted / self.measured

    @property
    def forced(self) -> float | None:
        """The best forced mode by what was chosen: below 1 where forcing it would have won."""
        return min(self.modes.values()) / self.whole if self.modes else None

    @property
    def holds(self) -> bool:
        """Within a factor of two, and no forced mode much faster."""
        near = 1 / FACTOR <= self.ratio <= FACTOR
        return near and (self.forced is None or self.forced * SLOWER >= 1)


def measured(case: Case, clock: Clock, modes: Sequence[str]) -> Line:
    """The case's plan, its prediction, and what calling it takes."""
    case = replace(case, shape=(FEWER.get(case.name, case.shape[0]), *case.shape[1:]))
    model, x = case.make()
    spent: list[float] = []
    timed = Timed(model, clock, spent).eval()
    auto = batchjac.plan(timed, x)
    assert auto.plan.prediction is not None
    ways: dict[str, Planned] = {"auto": auto}
    for mode in modes:
        try:
            way = batchjac.plan(timed, x, mode=mode)
        except UnsupportedError:  # not offered
            continue
        assert way.plan.prediction is not None
        if way.plan.directions == auto.plan.directions:  # the same computation, timed by chance
            continue
        if way.plan.prediction.seconds < HOPELESS * auto.plan.prediction.seconds:
            ways[mode] = way

    last: list[Any] = []

    def once(name: str) -> tuple[float, float]:
        spent.clear()
        start = clock()
        found = ways[name](x)
        whole = clock() - start
        last[:] = [found]  # kept meanwhile: whether freed memory comes again is chance
        return whole, whole - sum(spent)

    times: dict[str, list[tuple[float, float]]] = {}
    least = float("inf")
    for name in list(ways):
        try:
            first = once(name)  # kernels are chosen, and the plan's rules checked
        except UnsupportedError:
            del ways[name]
            continue
        times[name] = [first if first[0] > 2 * FAR * least else once(name)]
        least = min(least, times[name][0][0])
    near = [n for n in ways if n == "auto" or times[n][0][0] < FAR * least]
    turns = max(2, min(REPEATS, int(SHARE / sum(times[n][0][0] for n in near))))
    for _ in range(turns):
        for name in near:
            times[name].append(once(name))
    middle = {n: statistics.median(t[0] for t in times[n]) * 1e3 for n in ways}
    beside = statistics.median(t[1] for t in times["auto"]) * 1e3
    forced = {n: t for n, t in middle.items() if n != "auto"}
    predicted = auto.plan.prediction.seconds * 1e3
    return Line(case.name, len(x), predicted, beside, middle["auto"], forced)


HEAD = ("case", "batch", "predicted", "measured", "ratio", "whole", "forced / auto")


def row(line: Line) -> str:
    """One line of the table."""
    forced = "" if line.forced is None else f"{line.forced:.2f}"
    if line.forced is not None:
        forced += f" ({min(line.modes, key=lambda m: line.modes[m])})"
    mark = "" if line.holds else "  <- off"
    return (
        f"{line.case:<22}{line.batch:>6}{line.predicted:>11.2f}{line.measured:>11.2f}"
        f"{line.ratio:>8.2f}{line.whole:>10.2f}  {forced}{mark}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the JSON; 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.add_argument("--cpu-time", action="store_true", help="of this thread: wants one thread")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-modes", action="store_true", help="leave the forced modes out")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    if given.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time sees one thread; set OMP_NUM_THREADS=1")
    clock = time.thread_time if given.cpu_time else time.perf_counter
    print("milliseconds; predicted and measured are beside the function's own forward")
    print("{:<22}{:>6}{:>11}{:>11}{:>8}{:>10}  {}".format(*HEAD))
    lines = []
    for case in CASES + FURTHER:
        if given.only not in case.name:
            continue
        lines.append(measured(case, clock, () if given.no_modes else MODES))
        print(row(lines[-1]), flush=True)
    held: list[dict[str, Any]] = [
        {**asdict(n), "ratio": n.ratio, "forced": n.forced, "holds": n.holds} for n in lines
    ]
    clocked = "thread" if given.cpu_time else "wall"
    data = {"environment": {**environment("cpu"), "clock": clocked}, "cases": held}
    given.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if all(n.holds for n in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
