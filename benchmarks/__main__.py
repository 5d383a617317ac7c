"""The benchmark suite: ``python -m benchmarks``, then ``python -m benchmarks.page``.

Every case runs in processes of its own and is written to the JSON when it is done, so that a run
that stops loses nothing and ``--resume`` goes on where it was.
"""

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import fresh, growth
from benchmarks.cases import CASES, FURTHER, POINTS, Case
from benchmarks.measure import Options, measure
from benchmarks.table import report
from benchmarks.ways import SEEDS, WAYS, Way, chosen

RESULTS = Path("benchmarks/results")
CURVE_WAYS = ("batchjac", "row loop", "vmap(jacrev)", "vmap(jacfwd)", "JAX")
GROWTH = "growth"
SMALL = 12  # samples of a case, and hundreds of samples of the growth curve, with --quick


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((n.split(":")[1].strip() for n in lines if n.startswith("model name")), "unknown")


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("batchjac", "torch", "jax", "tensorflow-cpu", "torchjd", "numpy")
    found: dict[str, Any] = {name: version(name) for name in packages}
    found |= {
        "python": platform.python_version(), "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "processor": processor(), "machine": platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(), "device": device,
        "when": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if device != "cpu":

        def name(_: fresh.Say) -> dict[str, Any]:  # in a child: CUDA does not survive a fork
            return {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}

        said, _ = fresh.in_child(name, 8 << 30, 120)
        found["gpu"] = said[-1] if said else None
    return found


class Record:
    """The JSON of one run: read if it is to go on, written after every job."""

    def __init__(self, path: Path, device: str, resume: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"environment": environment(device), "results": []}
        if resume and path.exists():
            self.data = json.loads(path.read_text())
            self.data["results"] = [r for r in self.data["results"] if "failed" not in r]

    def has(self, name: str) -> bool:
        if name == GROWTH:
            points = self.data.get(GROWTH, {}).get("points", ())
            return bool(points) and not any("failed" in point for point in points)
        return any(result["case"] == name for result in self.data["results"])

    def put(self, name: str, result: dict[str, Any]) -> None:
        if name == GROWTH:
            self.data[GROWTH] = {"points": [], **result}
        else:
            self.data["results"].append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".part")  # a run that is killed here leaves the last whole one
        half.write_text(json.dumps(self.data, indent=1) + "\n")
        half.replace(self.path)


Job = Callable[[], dict[str, Any]]


def jobs(arguments: argparse.Namespace, options: Options, ways: Sequence[Way]) -> dict[str, Job]:
    """What there is to do, by name."""
    cases: tuple[Case, ...] = CASES if arguments.seeds else (*CASES, *FURTHER, *POINTS)
    if arguments.quick:
        cases = tuple(replace(c, shape=(min(SMALL, c.shape[0]), *c.shape[1:])) for c in cases)
    found: dict[str, Job] = {}
    for case in cases:
        own = [w for w in ways if not case.curve or w.name in CURVE_WAYS]
        found[case.name] = partial(measure, case, own, options)
    if not arguments.seeds:
        sizes = tuple(100 * k for k in range(1, 4)) if arguments.quick else growth.SIZES
        found[GROWTH] = partial(growth.measure, options, sizes)
    only = [part.strip() for part in arguments.only.split(",")]
    return {name: job for name, job in found.items() if any(part in name for part in only)}


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="parts of the cases' names, with commas")
    parser.add_argument("--ways", default="", help="names of the ways, with commas")
    parser.add_argument("--seeds", action="store_true", help="nine cases, the five seeds' ways")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small batches, to try the suite")
    parser.add_argument("--resume", action="store_true", help="go on with what the JSON lacks")
    parser.add_argument("--out", type=Path, help="the JSON; default: by device, under results/")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> Path:
    """Measure, print and write."""
    warnings.simplefilter("ignore")  # vmap says where it loops inside
    arguments = parse(given)
    options = Options(repeats=arguments.repeats, device=arguments.device)
    if arguments.quick:
        options = replace(options, repeats=2, seconds=2.0, share=0.3, tuning=0.01, memory=1 << 30)
    ways = chosen(arguments.ways.split(",")) if arguments.ways else list(WAYS)
    kind = "seeds" if arguments.seeds else arguments.device
    if arguments.seeds and not arguments.ways:
        ways = list(SEEDS)
    path = arguments.out or RESULTS / f"{'quick-' if arguments.quick else ''}{kind}.json"
    record = Record(path, arguments.device, arguments.resume)
    for name, job in jobs(arguments, options, ways).items():
        if record.has(name):
            continue
        start = time.perf_counter()
        try:
            result = job()
        except Exception as error:  # one case that fails is shown, and does not end the run
            result = {"case": name, "curve": "", "failed": fresh.brief(error)}
        record.put(name, result)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(report(record.data))
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
