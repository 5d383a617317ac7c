"""The job of seed 3 to a result on disk: 194,109 signals of 224 features, 3 outputs; and less."""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import batchjac
from benchmarks import fresh
from benchmarks.fresh import Say
from benchmarks.measure import Form, Options, off, shape_of, synchronise
from benchmarks.models import cnn1d
from benchmarks.ways import OURS, ROW_LOOP, row_loop, sample_loop, walk
from tests.resident import Watched, level

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 194_109)
BUDGET = 512 << 20
CHUNK = 128  # of the row loop: its best on this model is flat from 64 to 512
ON_DEVICE = 8192
LOOPED = 100  # samples of the seed's own loop
REPEATED = 10_000  # up to so many samples the median of three is kept
FOLDER = Path("runs/bench")


def into_file(way: str, model: nn.Module, x: Tensor, out: np.ndarray[Any, Any]) -> None:
    """The whole job, until the file has it."""
    place = torch.from_numpy(out)
    if x.device.type != "cpu":  # a file is not where a GPU writes: a part at a time, then copied
        compute = (walk if way == OURS else row_loop)(model, x)
        for start in range(0, len(x), ON_DEVICE):
            place[start : start + ON_DEVICE] = compute(x[start : start + ON_DEVICE], None).cpu()
    elif way == OURS:
        batchjac.jacobian(model, x, out=out, max_memory=BUDGET)
    else:
        Form(row_loop(model, x), x, CHUNK, place)()
    synchronise(x.device.type)
    if isinstance(out, np.memmap):
        out.flush()


def once(way: str, samples: int, options: Options, _: Say) -> dict[str, Any]:
    """Seconds and peak memory of one size, in this process; mapped pages are not counted."""
    torch.manual_seed(0)
    model = cnn1d().eval().requires_grad_(False).to(options.device)
    x = torch.randn(samples, 1, 224).to(options.device)
    shape = shape_of(model, x)
    few = min(256, samples)
    into_file(way, model, x[:few], np.empty((few, *shape[1:]), np.float32))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=FOLDER) as file:
        out = np.memmap(file.name, np.float32, "w+", shape=shape)
        times, peak = [], None
        for turn in range(3 if samples <= REPEATED else 1):
            if turn == 0:
                with Peak() as watched:
                    times.append(timed(partial(into_file, way, model, x, out)))
                peak = watched.bytes
            else:
                times.append(timed(partial(into_file, way, model, x, out)))
        some = torch.linspace(0, samples - 1, 32).long()
        truth = row_loop(model, x)(x[some], None)
        assert isinstance(truth, Tensor)
        error = off(torch.from_numpy(out[some.numpy()]), truth.cpu())
        assert error < 1e-3, f"{way}: off by {error}"
    return {
        "way": way, "samples": samples, "seconds": statistics.median(times), "peak": peak,
        "result_bytes": int(np.prod(shape)) * 4, "off": error,
    }  # fmt: skip


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Peak:
    """The rise of memory that no file stands behind; None where ``/proc`` does not tell."""

    def __enter__(self) -> "Peak":
        self.bytes: int | None = None
        self.watched: Watched | None = None
        try:
            self.base = level("RssAnon")
            self.watched = Watched().__enter__()
        except (OSError, AttributeError):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        if self.watched is not None:
            self.watched.__exit__()
            self.bytes = max(0, self.watched.peak - self.base)


def looped(options: Options, _: Say) -> dict[str, Any]:
    """The seed's loop over samples on a few, scaled up."""
    torch.manual_seed(0)
    model = cnn1d().eval().requires_grad_(False).to(options.device)
    x = torch.randn(LOOPED, 1, 224).to(options.device)
    compute = sample_loop(model, x)
    compute(x[:3], None)

    def call() -> None:
        compute(x, None)
        synchronise(options.device)

    return {"measured": LOOPED, "seconds_per_sample": timed(call) / LOOPED}


def measure(options: Options, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Every size by our way and by the row loop, each in a process of its own."""
    points = []
    for samples in sizes:
        for way in (OURS, ROW_LOOP):
            said, ended = fresh.in_child(partial(once, way, samples, options), 8 << 30, 600)
            fact = said[-1] if said else {"failed": ended}
            points.append({"way": way, "samples": samples, **fact})
    said, ended = fresh.in_child(partial(looped, options), 8 << 30, 600)
    loop = said[-1] if said else {"failed": ended}
    return {"points": points, "loop over samples": loop, "budget": BUDGET, "chunk": CHUNK}
