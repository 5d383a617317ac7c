"""The training steps beside every other way: ``python -m benchmarks.training``.

Every way's loss and gradients are compared with those of the row loop in float64 before its time
counts. All ways of a step take turns in one process; peak memory is that of a fresh process each.
"""

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import fresh
from benchmarks.__main__ import environment
from benchmarks.measure import COMPILING, PAUSE, TOLERANCE, seconds
from benchmarks.steps import JAX, STEPS, WAYS, Step, Taken, row_loop, trained
from benchmarks.training_table import report

RESULT = Path("benchmarks/results/training.json")
FEW = 8  # samples on which libraries start before memory is watched
Cell = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How much a run may take: samples, repeats, bytes and seconds."""

    timed: int = 256
    large: int = 4096
    repeats: int = 15
    memory: int = 4 << 30
    seconds: float = 30.0
    share: float = 6.0
    """Seconds for all repeats of one way; two are made whatever they take."""


def truth(step: Step, samples: int) -> Taken:
    """Loss and gradients of the row loop in float64."""
    model, x = step.make(samples)
    return trained(row_loop)(step, model.double(), x.double())()


def tensor(value: Any) -> Tensor:
    """A result of any library in float64."""
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.tensor(value.tolist(), dtype=torch.float64)


def off(taken: Taken, expected: Taken) -> float:
    """The largest difference in the loss or a gradient, by the largest entry of each."""
    pairs = zip((taken[0], *taken[1]), (expected[0], *expected[1]), strict=True)
    differences = ((tensor(a) - tensor(b)).abs().max() / tensor(b).abs().max() for a, b in pairs)
    return max(d.item() for d in differences)


def alone(step: Step, way: str, samples: int, _: fresh.Say) -> Cell:
    """Peak bytes and seconds of one call of a fresh process, and how far it is off."""
    model, x = step.make(samples)
    WAYS[way](step, model, x[:FEW])()
    call = WAYS[way](step, model, x)
    heights = fresh.heights()
    next(heights, 0)
    start = time.perf_counter()
    taken = call()
    once = time.perf_counter() - start
    peak = next(heights, None)
    return {"peak": peak, "seconds": once, "off": off(taken, truth(step, samples))}


def in_turns(
    step: Step, ways: Sequence[str], options: Options, say: fresh.Say
) -> dict[str, list[float]]:
    """Seconds of every call in this process, in an order that is drawn anew for each turn.

    Threads of JAX's go on for a while: whoever always came after it took twice its time.
    """
    model, x = step.make(options.timed)
    calls = {way: WAYS[way](step, model, x) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way, call in calls.items():
        say({"at": way})
        call()
    order = random.Random(0)
    for _ in range(options.repeats):
        for way in order.sample(ways, len(ways)):
            if len(times[way]) >= 2 and sum(times[way]) > options.share:
                continue
            time.sleep(PAUSE)
            times[way].append(seconds(calls[way], "cpu"))
    return times


def tried(step: Step, way: str, samples: int, options: Options) -> Cell:
    """``alone`` in a child; a wrong answer, an error or a limit passed is a finding."""
    limit = options.seconds + (COMPILING if way == JAX else 0)
    said, ended = fresh.in_child(partial(alone, step, way, samples), options.memory, limit)
    if ended not in ("", "error") or not said:
        return {"failed": ended}
    cell = said[-1]
    if "failed" not in cell and not cell["off"] < TOLERANCE:
        return {"failed": f"wrong: off by {cell['off']:.1g} of the largest entry"}
    return cell


def measure(step: Step, ways: Sequence[str], options: Options) -> dict[str, Any]:
    """Everything about one step, as the JSON keeps it."""
    sizes = (options.timed, options.large)
    cells = {way: {str(n): tried(step, way, n, options) for n in sizes} for way in ways}
    right = [way for way in ways if "failed" not in cells[way][str(options.timed)]]
    said, ended = fresh.in_child(partial(in_turns, step, right, options), 4 * options.memory, 600)
    if ended:
        raise RuntimeError(f"{step.name}: {said[-1] if said else ended}")
    for way, times in said[-1].items():
        cells[way] |= {"times": times, "median": statistics.median(times)}
    return {"step": step.name, "of": step.of, "budget": step.budget, "ways": cells}


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--only", default="", help="part of the steps' names")
    parser.add_argument("--ways", default="", help="names of the ways, with semicolons")
    parser.add_argument("--quick", action="store_true", help="few samples, to try the suite")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> Path:
    """Measure, print and write."""
    warnings.simplefilter("ignore")  # vmap says where it loops inside
    arguments = parse(given)
    options = Options(timed=12, large=48, repeats=2) if arguments.quick else Options()
    ways = arguments.ways.split(";") if arguments.ways else list(WAYS)
    data: dict[str, Any] = {
        "environment": environment("cpu"), "timed": options.timed, "large": options.large,
        "steps": [],
    }  # fmt: skip
    for step in STEPS:
        if arguments.only in step.name:
            data["steps"].append(measure(step, ways, options))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=1) + "\n")
    print(report(data))
    print(f"written to {arguments.out}")
    return Path(arguments.out)


if __name__ == "__main__":
    main()
