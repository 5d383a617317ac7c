"""Norms and Grams of parameter Jacobians beside the libraries made for them, in turns.

``python -m benchmarks.gram``; writes ``benchmarks/results/gram.json`` and prints a table. For every
sample and output the gradient by all parameters is a row: ``norm`` is the squared norm of each
sample's rows ``[N]``, ``kernel`` all inner products ``[N, O, N, O]``.

The peers, where they are installed: TorchJD (autogram's engine), nngeometry (its Gram matrix) and
BackPACK (``BatchL2Grad``, one backward for each output). The last two ask for torchvision or for
nothing that is held to a version; ``pip install --no-deps backpack-for-pytorch nngeometry einops
unfoldNd`` is enough. Every way runs alone first, in a process of its own, for its peak memory and
to be compared; then those that are right are timed in turns in one process.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchjac
from benchmarks import fresh
from benchmarks.__main__ import environment
from benchmarks.fresh import Say
from benchmarks.models import Residual, resnet18

RESULTS = Path(__file__).parent / "results" / "gram.json"
TOLERANCE = 1e-3  # of the largest entry, in float32
LIMIT, SECONDS = 6 << 30, 150.0  # of one call
PAUSE = 0.01

Compute = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its batch, and whether a dense Jacobian fits beside it."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def make(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return self.model().eval(), torch.randn(self.shape)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                         nn.Linear(1024, 10))  # fmt: skip


def plain_cnn() -> nn.Module:
    """Six convolutions without normalisation, so that every library takes it."""
    layers: list[nn.Module] = []
    for a, b, pool in ((3, 32, 0), (32, 32, 1), (32, 64, 0), (64, 64, 1), (64, 128, 0),
                       (128, 128, 1)):  # fmt: skip
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))


class Layered(Residual):
    """The same block with its last activation as a layer, which BackPACK's converter asks for."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.body(x) + self.skip(x))
        return y


def layered_resnet18() -> nn.Module:
    model = resnet18()
    for m in model.modules():
        if isinstance(m, Residual):
            m.__class__ = Layered
            m.add_module("act", nn.ReLU())
    return model


CASES = (
    Case("mlp", mlp, (64, 784)),
    Case("cnn", plain_cnn, (32, 3, 32, 32)),
    Case("resnet18", layered_resnet18, (32, 3, 32, 32)),
)


def ours_kernel(model: nn.Module, x: Tensor) -> Compute:
    return lambda: batchjac.operator(model, x, wrt="parameters").gram(across=True)


def ours_norm(model: nn.Module, x: Tensor) -> Compute:
    return lambda: batchjac.operator(model, x, wrt="parameters").norm(squared=True)


def jacobian_of(model: nn.Module, x: Tensor) -> Tensor:
    """``[n, O, P]`` by ``vmap(jacrev)``."""
    named = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def one(p: Any, sample: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, (p, buffers), (sample[None],))[0]
        return y

    j = torch.func.vmap(torch.func.jacrev(one), (None, 0))(named, x)
    return torch.cat([t.flatten(2) for t in j.values()], 2)


def dense_kernel(model: nn.Module, x: Tensor) -> Compute:
    def compute() -> Tensor:
        j = jacobian_of(model, x)
        rows = j.flatten(0, 1)
        return (rows @ rows.T).reshape(*j.shape[:2], *j.shape[:2])

    return compute


def dense_norm(model: nn.Module, x: Tensor) -> Compute:
    """Two samples at a time, so that it fits."""
    return lambda: torch.cat([jacobian_of(model, part).square().sum((1, 2)) for part in x.split(2)])


def torchjd_kernel(model: nn.Module, x: Tensor) -> Compute:
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)

    def compute() -> Tensor:
        y = model(x)
        return engine.compute_gramian(y).reshape(*y.shape, *y.shape)

    return compute


def nngeometry_kernel(model: nn.Module, x: Tensor) -> Compute:
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x), batch_size=len(x))
    layers = LayerCollection.from_model(model)

    def compute() -> Tensor:
        g = GramMatrix(model, loader, function=lambda *d: model(d[0]), layer_collection=layers)
        found: Tensor = g.to_torch().permute(1, 0, 3, 2)
        return found

    return compute


def backpack_norm(model: nn.Module, x: Tensor) -> Compute:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    residual = any(isinstance(m, Residual) for m in model.modules())
    extended = extend(model, use_converter=residual)

    def compute() -> Tensor:
        y, total = extended(x), torch.zeros(len(x))
        for o in range(y.shape[1]):
            more = o + 1 < y.shape[1]
            with backpack(BatchL2Grad(), retain_graph=more):
                y[:, o].sum().backward(retain_graph=more)
            total = total + torch.stack([p.batch_l2 for p in extended.parameters()]).sum(0)
        return total

    return compute


@dataclass(frozen=True)
class Way:
    name: str
    make: Callable[[nn.Module, Tensor], Compute]
    dense: bool = False  # it holds the whole Jacobian


WAYS = {
    "kernel": (
        Way("batchjac", ours_kernel), Way("TorchJD", torchjd_kernel),
        Way("nngeometry", nngeometry_kernel), Way("vmap(jacrev)", dense_kernel, dense=True),
    ),
    "norm": (
        Way("batchjac", ours_norm), Way("BackPACK", backpack_norm),
        Way("vmap(jacrev), two samples", dense_norm),
    ),
}  # fmt: skip


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float((ours - theirs.detach()).abs().max() / theirs.detach().abs().max())


def exact(case: Case, figure: str) -> Tensor:
    """Of the first two samples, from dense rows in float64."""
    model, x = case.make()
    j = jacobian_of(model.double(), x[:2].double())
    if figure == "norm":
        return j.square().sum((1, 2)).float()
    return torch.einsum("nop,mqp->nomq", j, j).float()


def first_two(found: Tensor, figure: str) -> Tensor:
    return found[:2] if figure == "norm" else found[:2, :, :2]


def alone(case: Case, figure: str, way: Way, say: Say) -> dict[str, Any]:
    """Peak bytes and seconds of a first call, and how far it is from float64."""
    model, x = case.make()
    entries = len(x) * 10 * sum(p.numel() for p in model.parameters())
    if way.dense and entries * x.element_size() > LIMIT:
        return {"failed": "too large", "bytes": entries * x.element_size()}
    with torch.no_grad():
        model(x[:2])  # libraries start
    heights = fresh.heights()
    next(heights, 0)
    compute = way.make(model, x)
    start = time.perf_counter()
    found = compute()
    seconds, peak = time.perf_counter() - start, next(heights, None)
    error = off(first_two(found, figure), exact(case, figure))
    cell = {"peak": peak, "first": seconds, "off": error}
    return cell if error < TOLERANCE else {**cell, "failed": f"wrong: off by {error:.1g}"}


def tried(case: Case, figure: str, way: Way) -> dict[str, Any]:
    said, ended = fresh.in_child(partial(alone, case, figure, way), LIMIT, SECONDS)
    if ended in ("", "error") and said:
        return said[-1]
    return {"failed": ended or "error"}


def turns(case: Case, figure: str, ways: list[Way], repeats: int, say: Say) -> dict[str, Any]:
    """A B C A B C: seconds of thread time, each way with a model of its own."""
    computes = {way.name: way.make(*case.make()) for way in ways}
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    order = list(computes)
    for compute in computes.values():
        compute()
    for turn in range(repeats):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if sum(times[name]) > 40 and len(times[name]) >= 2:
                continue
            time.sleep(PAUSE)
            start = time.thread_time()
            computes[name]()
            times[name].append(time.thread_time() - start)
    return times


def measure(case: Case, figure: str, repeats: int) -> dict[str, Any]:
    ways = WAYS[figure]
    cells = {way.name: tried(case, figure, way) for way in ways}
    right = [way for way in ways if "failed" not in cells[way.name]]
    said, ended = fresh.in_child(
        partial(turns, case, figure, right, repeats), 2 * LIMIT, 8 * SECONDS
    )
    for name, times in (said[-1] if not ended else {}).items():
        cells[name] |= {"times": times, "median": statistics.median(times)}
    return {"case": case.name, "figure": figure, "shape": list(case.shape), "ways": cells}


def line(row: dict[str, Any]) -> str:
    """One row of the table, ratios to ours."""
    ours = row["ways"]["batchjac"].get("median")
    parts = []
    for name, cell in row["ways"].items():
        if "median" in cell:
            against = f" ({cell['median'] / ours:.1f}x)" if ours else ""
            peak = (cell["peak"] or 0) / 2**20
            parts.append(f"{name} {cell['median']:.3g} s{against} {peak:.0f} MiB")
        else:
            parts.append(f"{name}: {cell.get('failed', 'not timed')}")
    return f"{row['case']:>9} {row['figure']:>7} | " + " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        for figure in WAYS if case.name in given.cases else ():
            rows.append(measure(case, figure, given.repeats))
            print(line(rows[-1]), flush=True)
    data = {"environment": environment("cpu"), "rows": rows}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
