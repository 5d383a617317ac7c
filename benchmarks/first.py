"""The walk beside the five ways of the seeds, taken in turns: ``python -m benchmarks.first``.

Ways: the row loop of seed 2 (one ``autograd.grad`` per output, tuned: the best of several chunks
of samples, into a result made beforehand), ``functional.jacobian(vectorize=True)`` with the
diagonal taken (seeds 1 and 4), the loop over samples of seed 3 (on a few samples, scaled up and
marked), the sum trick of seed 5, and ``vmap(jacrev)`` of its last answer. Each way's result is
compared with the walk's before it is timed. Prints a table, writes JSON with the environment.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchjac
from benchmarks.cases import CASES, Case

Way = Callable[[nn.Module, Tensor], Tensor]
CHUNKS = (8, 32, 64, 128, 512, 4096)
ROW_LOOP = "row loop, tuned"
LOOP_SAMPLES = 4


def walk(model: nn.Module, x: Tensor) -> Tensor:
    """batchjac."""
    j: Tensor = batchjac.jacobian(model, x)
    return j


def row_loop(chunk: int) -> Way:
    """One ``autograd.grad`` per output and chunk of samples, written in place."""

    def way(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            width = model(x[:1]).flatten(1).shape[1]
        j = torch.empty(len(x), width, *x.shape[1:])
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk].detach().requires_grad_()
            y = model(part).flatten(1)
            for o in range(width):
                one = torch.zeros_like(y)
                one[:, o] = 1
                (j[start : start + chunk, o],) = torch.autograd.grad(
                    y, part, one, retain_graph=o + 1 < width
                )
        return j

    return way


def functional_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """The doubled batch axis, then its diagonal."""
    j = torch.autograd.functional.jacobian(model, x, vectorize=True)
    each = torch.arange(len(x))
    diagonal: Tensor = j[each, :, each]
    return diagonal


def sample_loop(model: nn.Module, x: Tensor) -> Tensor:
    """``functional.jacobian`` sample by sample."""
    found = [torch.autograd.functional.jacobian(model, x[n : n + 1]) for n in range(len(x))]
    return torch.stack([j[0, :, 0] for j in found])


def sum_trick(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of the sum over samples."""
    j = torch.autograd.functional.jacobian(lambda t: model(t).sum(0), x)
    return j.transpose(0, 1)


def vmap_jacrev(model: nn.Module, x: Tensor) -> Tensor:
    """``torch.func.vmap(torch.func.jacrev(f))``."""
    j: Tensor = torch.func.vmap(torch.func.jacrev(lambda s: model(s[None])[0]))(x)
    return j


WAYS: dict[str, Way] = {
    "batchjac": walk,
    ROW_LOOP: row_loop(1 << 30),  # replaced by the best chunk for each case
    "functional.jacobian + diagonal": functional_jacobian,
    "loop over samples": sample_loop,
    "sum trick": sum_trick,
    "vmap(jacrev)": vmap_jacrev,
}


def seconds(way: Way, model: nn.Module, x: Tensor) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    way(model, x)
    return time.perf_counter() - start


def tuned(model: nn.Module, x: Tensor) -> tuple[Way, int]:
    """The row loop at its best chunk of samples."""
    times = {chunk: float("inf") for chunk in CHUNKS if chunk < 2 * len(x)}
    for _ in range(4):  # in turns; the first is for warming up
        for chunk in times:
            times[chunk] = min(times[chunk], seconds(row_loop(chunk), model, x))
    best = min(times, key=lambda c: times[c])
    return row_loop(best), best


def _applies(name: str, model: nn.Module, x: Tensor) -> bool:
    """The doubled axis takes ``N`` times the memory, its activations more; 64 MiB is the limit."""
    if name != "functional.jacobian + diagonal":
        return True
    width = model(x[:1]).numel()
    return len(x) ** 2 * width * x[0].numel() * 4 < 64 << 20


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Median seconds of every way on one case, taken in turns."""
    model, x = case.make()
    loop, chunk = tuned(model, x)
    ways = {n: w for n, w in {**WAYS, ROW_LOOP: loop}.items() if _applies(n, model, x)}
    walk(model, x)  # what is measured or compared once is not part of a call
    truth = walk(model, x[:LOOP_SAMPLES])
    errors = {}
    for name, way in ways.items():
        errors[name] = float((way(model, x[:LOOP_SAMPLES]) - truth).abs().max() / truth.abs().max())
        assert errors[name] < 1e-3, f"{case.name}: {name} is off by {errors[name]}"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            few = name == "loop over samples"
            taken = seconds(way, model, x[:LOOP_SAMPLES] if few else x)
            times[name].append(taken * (len(x) / LOOP_SAMPLES if few else 1))
    median = {name: statistics.median(t) for name, t in times.items()}
    pairs = [a / b for a, b in zip(times[ROW_LOOP], times["batchjac"], strict=True)]
    return {
        "case": case.name, "shape": list(case.shape), "row_loop_chunk": chunk,
        "median_seconds": median, "largest_relative_difference": errors,
        "row_loop_over_batchjac": statistics.median(pairs),
        "extrapolated": ["loop over samples"],
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(), "batchjac": batchjac.__version__,
    }  # fmt: skip


def row(result: dict[str, Any]) -> str:
    """One line of the table, in milliseconds."""
    cells = [result["case"]]
    for name in WAYS:
        taken = result["median_seconds"].get(name)
        mark = "*" if name in result["extrapolated"] else ""
        cells.append("too large" if taken is None else f"{taken * 1e3:.1f}{mark}")
    cells.append(f"{result['row_loop_over_batchjac']:.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print and write."""
    warnings.simplefilter("ignore")  # vmap says where it loops inside
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/first.json"))
    arguments = parser.parse_args()
    print(f"milliseconds, median of {arguments.repeats}; * measured on {LOOP_SAMPLES} samples")
    print("| case | " + " | ".join(WAYS) + " | row loop / batchjac |")
    print("|" + "---|" * (len(WAYS) + 2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.only not in case.name:
            continue
        results.append(measure(case, arguments.repeats))
        print(row(results[-1]), flush=True)
        text = json.dumps({"environment": environment(), "results": results}, indent=1)
        arguments.out.write_text(text + "\n")  # after every case: a run that stops loses nothing


if __name__ == "__main__":
    main()
