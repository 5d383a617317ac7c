"""One case: every way tried alone, checked, tuned, and then all of them timed in turns."""

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import fresh, limit
from benchmarks.cases import Case
from benchmarks.fresh import Say
from benchmarks.translate import Compiled
from benchmarks.ways import OURS, WAYS, Compute, Way, row_loop

Cell = dict[str, Any]
OURS_WAY = WAYS[0]
FORMS = ("documented", "tuned")
FEW = 3  # samples that are compared where all would take too long
KINKS = 0.02  # of the samples may be at a kink
TOLERANCE = 1e-3  # of the largest entry, in float32; deep networks lose four digits
COMPILING = 60  # seconds more for a process: imports, compilers
PAUSE = 0.01  # between calls: another library's threads still spin for some milliseconds


@dataclass(frozen=True)
class Options:
    """How much a run may take."""

    repeats: int = 7
    device: str = "cpu"
    memory: int = 4 << 30
    seconds: float = 20.0
    """Beyond this a call is not made; what it would take is extrapolated."""
    share: float = 4.0
    """Seconds for all repeats of one form of one way; two repeats are made whatever they take."""
    tuning: float = 0.12
    """Seconds for each size of chunk that is tried."""


@dataclass(frozen=True)
class Form:
    """A way, ready to be called on the whole batch: chunk by chunk into ``out`` where it has one.

    With ``out``, results are copied into place unless the way writes there itself.
    """

    compute: Compute
    x: Tensor
    chunk: int
    out: Tensor | None = None

    def __call__(self, count: int | None = None) -> Any:
        """On the first ``count`` samples."""
        n = len(self.x) if count is None else min(count, len(self.x))
        if self.chunk >= n:
            x = self.x if n == len(self.x) else self.x[:n]
            return self.compute(x, None if self.out is None else self.out[:n])
        assert self.out is not None
        for start in range(0, n, self.chunk):
            self.one(start)
        return self.out[:n]

    def one(self, start: int) -> None:
        """The chunk from ``start`` on, into its place."""
        assert self.out is not None
        place = self.out[start : start + self.chunk]
        j = self.compute(self.x[start : start + self.chunk], place)
        if j is not place:
            place.copy_(tensor(j))


def tensor(j: Any) -> Tensor:
    """A result as PyTorch would order it."""
    made: Tensor = j if isinstance(j, Tensor) else j.tensor()
    return made


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def shape_of(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """``[N, *out, *in]``."""
    with torch.no_grad():
        return (len(x), *model(x[:1]).shape[1:], *x.shape[1:])


def result(model: nn.Module, x: Tensor) -> Tensor:
    """The place for a Jacobian, not yet touched."""
    return torch.empty(shape_of(model, x), device=x.device)


def least_bytes(way: Way, doubled: bool, model: nn.Module, x: Tensor, chunk: int) -> int:
    """What this way holds at once at the very least: one block of its rows, or of its columns."""
    shape = torch.Size(shape_of(model, x))
    width = shape.numel() // x.numel()
    own = chunk * width * x[0].numel()  # the result
    if doubled:
        return own * chunk * x.element_size()
    return (own if way.loops else 2 * own) * x.element_size()


def alone(case: Case, way: Way, form: str, chunk: int, options: Options, say: Say) -> Cell:
    """In a fresh process: few samples, then the batch, with its time and its peak memory.

    A way that few samples show to be hopeless is not let loose on the batch.
    """
    model, x = case.make(options.device)
    tuned = form == "tuned"
    if least_bytes(way, way.doubled[tuned], model, x, chunk) > options.memory:
        return {"failed": "too large"}
    compute = getattr(way, form)(model, x)
    run = Form(compute, x, chunk, result(model, x) if tuned else None)
    if isinstance(compute, Compiled):
        compute.compile(x[:chunk])  # what a compiler takes is not the method's
    elif not tuned:
        estimate = hopeless(compute, x, options)
        if estimate is not None:
            return {"failed": "too slow", "estimate": estimate}
    if not isinstance(compute, Compiled) and (tuned or len(x) <= 2):
        compute(x[:2], None)  # libraries start; nothing did so yet
    j, cell = peak_and_time(run, options)
    ours = tensor(OURS_WAY.documented(model, x)(x[:FEW], None))
    cell["off"] = error = off(tensor(j)[:FEW], ours)
    if not error < TOLERANCE:
        return {"failed": f"wrong: off by {error:.1g} of the largest entry"}
    return cell


def hopeless(compute: Compute, x: Tensor, options: Options) -> float | None:
    """Seconds for the batch, if a few samples say that it is far too much."""
    for few, margin in ((2, 5), (8, 1.5)):
        if few >= len(x):
            continue
        call = partial(compute, x[:few], None)
        taken = seconds(call, options.device)
        if taken < 5:  # the first call of some ways takes seconds more than the later ones
            taken = min(taken, seconds(call, options.device))
        if taken * len(x) / few > margin * options.seconds:
            return taken * len(x) / few
    return None


def peak_and_time(run: Form, options: Options) -> tuple[Any, Cell]:
    """The result, a call's wall time, and how far memory rose in the first above where it stood."""
    cuda = options.device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    heights = fresh.heights()
    next(heights, 0)
    start = time.perf_counter()
    j = run()
    synchronise(options.device)
    taken = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - base if cuda else next(heights, None)
    if taken < 1:  # the first call of some ways does more than the later ones
        taken = min(taken, seconds(run, options.device))
    return j, {"median": taken, "peak": peak, "chunk": run.chunk, "once": True}


def tried(case: Case, way: Way, form: str, chunk: int, options: Options) -> Cell:
    """``alone`` in a child of this process; a child that dies is a cell too."""
    task = partial(alone, case, way, form, chunk, options)
    said, ended = fresh.in_child(task, options.memory, 1.5 * options.seconds + COMPILING)
    if ended in ("", "error"):
        return said[-1] if said else {"failed": "error"}
    if ended == "too slow":
        return {"failed": "too slow", "estimate": None}
    return {"failed": ended}


def tuned_chunk(
    compute: Compute,
    way: Way,
    model: nn.Module,
    out: Tensor,
    x: Tensor,
    options: Options,
    enough: float,
) -> tuple[int, float]:
    """The best number of samples at a time, and seconds for the batch at that.

    Beyond ``enough`` seconds the search ends where times rise, however little they do.
    """
    best, chunk = float("inf"), len(x)
    for size in [*(c for c in way.chunks if c < len(x)), len(x)]:
        if best < float("inf") and not fits(way, model, x, size, options):
            break
        form = Form(compute, x, size, out)
        form.one(0)
        spent, done = 0.0, 0
        while spent < options.tuning and done < len(x):
            start = done // size * size
            spent += seconds(partial(form.one, start), options.device)
            done += min(size, len(x) - start)
        estimate = spent / done * len(x)
        if estimate > (3 if best < enough else 1) * best:
            break
        if estimate < best:
            best, chunk = estimate, size
    return chunk, best


def fits(way: Way, model: nn.Module, x: Tensor, size: int, options: Options) -> bool:
    """With room for what ``least_bytes`` leaves out."""
    return least_bytes(way, way.doubled[1], model, x, size) < options.memory // 8


def off(j: Any, truth: Tensor) -> float:
    """The largest difference, as a share of the largest entry, in all samples but a few.

    Where an activation is within rounding of zero, or two entries of a window are that close, two
    ways that round differently are on two sides of a kink, and that sample's Jacobians differ.
    """
    each = (tensor(j).to(truth) - truth).abs().flatten(1).amax(1).sort().values
    most = each[: len(each) - int(KINKS * len(each))].max()
    return float(most / truth.abs().max().clamp_min(1e-30))


def reference(model: nn.Module, x: Tensor) -> Tensor:
    """The row loop in float64, on few samples."""
    double = copy.deepcopy(model).double()
    return tensor(row_loop(double, x)(x.double(), None))


def worth_tuning(way: Way, given: Cell) -> bool:
    """Whether smaller chunks could do what the whole batch could not."""
    if "failed" not in given or way.documented is not way.tuned:
        return True
    return given["failed"] == "too large" or (
        given["failed"] == "too slow" and given["estimate"] is None
    )


def slow(seconds: float, cells: dict[str, dict[str, Cell]]) -> bool:
    """Whether one call says enough: over a second, and ten times what another way takes."""
    known = [c["documented"]["median"] for c in cells.values() if "median" in c["documented"]]
    return seconds > max(1.0, 10 * min(known, default=float("inf")))


@dataclass
class Timing:
    """The state of the process that times all ways of a case in turns."""

    case: Case
    ways: list[Way]
    cells: dict[str, dict[str, Cell]]
    options: Options
    say: Say

    def run(self) -> dict[str, Any]:
        """Cells filled, with what the limit needs beside them."""
        model, x = self.case.make(self.options.device)
        need, rate = limit.work(model, x), limit.rates(self.options.device)
        forms = self.right(model, x)
        self.turns(forms)
        for name, form in forms:
            cell = self.cells[name][form]
            cell["median"] = statistics.median(cell["times"])
        return {"ways": self.cells, "need": need, "rates": rate, "jacobian": shape_of(model, x)}

    def right(self, model: nn.Module, x: Tensor) -> dict[tuple[str, str], Form]:
        """The forms that give what ours gives, and ours what float64 gives."""
        out = result(model, x)
        ours = tensor(Form(OURS_WAY.documented(model, x), x, len(x))())
        few = 1 if ours[0].numel() > 1 << 18 else 3
        truth = reference(model, x[:few])
        found: dict[tuple[str, str], Form] = {}
        for way in self.ways:
            self.say({"at": way.name})
            cells = self.cells[way.name]
            try:
                forms = self.ready(way, model, x, out)
            except Exception as error:  # a peer's failure is a finding, shown in the table
                cells["tuned"] = {"failed": fresh.brief(error)}
                continue
            for form, run in forms.items():
                j = tensor(run())
                error = off(j[:few], truth) if way.name == OURS else off(j, ours)
                if error < TOLERANCE:
                    kept = {"peak": cells.get(form, {}).get("peak"), "off": error}
                    cells[form] = {**kept, "chunk": run.chunk, "times": []}
                    found[way.name, form] = run
                else:
                    cells[form] = {"failed": f"wrong: off by {error:.1g} of the largest entry"}
        return found

    def ready(self, way: Way, model: nn.Module, x: Tensor, out: Tensor) -> dict[str, Form]:
        """The forms of a way that are worth timing in turns."""
        forms: dict[str, Form] = {}
        cells, options = self.cells[way.name], self.options
        given = cells["documented"]
        if "failed" not in given and not slow(given["median"], self.cells):
            forms["documented"] = Form(way.documented(model, x), x, len(x))
        if not worth_tuning(way, given):
            cells["tuned"] = dict(given)
            return forms
        compute = way.tuned(model, x)
        chunk, estimate = len(x), 0.0
        if way.chunks:
            enough = min(1.0, options.seconds)
            chunk, estimate = tuned_chunk(compute, way, model, out, x, options, enough)
        if estimate > options.seconds:
            cells["tuned"] = {"failed": "too slow", "estimate": estimate}
        elif slow(estimate, self.cells):
            cells["tuned"] = {"median": estimate, "chunk": chunk, "once": True}
        else:
            forms["tuned"] = Form(compute, x, chunk, out)
        return forms

    def turns(self, forms: dict[tuple[str, str], Form]) -> None:
        """One call of each, in an order drawn for each turn: nobody always follows the same.

        Threads of JAX's go on for a while: who came after it took up to twice its time.
        """
        order = random.Random(0)
        for _ in range(self.options.repeats):
            for name, form in order.sample(list(forms), len(forms)):
                times = self.cells[name][form]["times"]
                if len(times) >= 2 and sum(times) > self.options.share:
                    continue
                self.say({"at": name})
                time.sleep(PAUSE)
                times.append(seconds(forms[name, form], self.options.device))


def timed(case: Case, ways: list[Way], documented: dict[str, Cell], options: Options) -> Cell:
    """All ways in turns, in one child; a way that kills it is left out of the next."""
    ways = list(ways)
    lost: dict[str, dict[str, Cell]] = {}
    while True:
        cells = {way.name: {"documented": dict(documented[way.name])} for way in ways}

        def task(say: Say, ways: list[Way] = ways, cells: Any = cells) -> Cell:
            return Timing(case, ways, cells, options, say).run()

        said, ended = fresh.in_child(task, 4 * options.memory, 1200)
        if not ended:
            return {**said[-1], "ways": {**said[-1]["ways"], **lost}}
        at = next((fact["at"] for fact in reversed(said) if "at" in fact), OURS)
        reason = said[-1].get("failed", ended) if said else ended
        if at == OURS:
            raise RuntimeError(f"{case.name}: {reason}")
        lost[at] = {form: {"failed": reason} for form in FORMS}
        ways = [way for way in ways if way.name != at]


def measure(case: Case, ways: list[Way], options: Options) -> dict[str, Any]:
    """Everything about one case, as the JSON keeps it."""
    start = time.perf_counter()
    documented = {w.name: tried(case, w, "documented", case.shape[0], options) for w in ways}
    found = timed(case, ways, documented, options)
    for way in ways:
        cell = found["ways"][way.name]["tuned"]
        if "times" in cell:
            cell["peak"] = tried(case, way, "tuned", cell["chunk"], options).get("peak")
    return {
        "case": case.name, "shape": list(case.shape), "curve": case.curve, "along": case.along,
        "targets": case.targets, "took": time.perf_counter() - start, **found,
    }  # fmt: skip
