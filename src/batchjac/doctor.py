"""What this machine offers, and whether the Jacobians computed on it are right.

``batchjac doctor`` prints it; ``python -m batchjac.doctor`` does the same with torch alone.
"""

import logging
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchjac import calibration, chosen, kernels, memory, native
from batchjac.api import jacobian
from batchjac.engines import reference
from batchjac.rules import registry

Engine = Callable[[nn.Module, Tensor], Any]

# Which extra brings which distribution. Looked up by metadata: nothing of it is imported.
EXTRAS = {
    "numpy": "demo",
    "typer": "cli",
    "tqdm": "progress",
    "matplotlib": "report",
    "jinja2": "report",
    "zarr": "data",
    "safetensors": "weights",
    "scikit-learn": "demo",
}

# float64 carries 16 digits and the models are a few layers deep: rounding ends near 1e-15.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Finding:
    """One fact about the machine: ``present`` is False where something is missing."""

    name: str
    detail: str
    present: bool = True


@dataclass(frozen=True)
class Verdict:
    """One model of the self-check: the largest difference from the specification, or the error."""

    model: str
    difference: float
    passed: bool
    note: str = ""
    remarks: tuple[str, ...] = ()  # what the engine logged on the way


def versions() -> list[Finding]:
    """Versions of Python, torch and every package an extra of batchjac would bring."""
    found = [
        Finding("python", platform.python_version()),
        Finding("torch", torch.__version__),
        _distribution("batchjac", "pip install batchjac"),
    ]
    return found + [
        _distribution(name, f'missing: pip install "batchjac[{extra}]"')
        for name, extra in EXTRAS.items()
    ]


def _distribution(name: str, remedy: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, remedy, present=False)


def machine() -> list[Finding]:
    """Processor, threads, devices and free memory."""
    return [
        Finding("cpu", f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"),
        Finding(
            "threads",
            f"{torch.get_num_threads()} in an operator, "
            f"{torch.get_num_interop_threads()} between operators, {os.cpu_count()} cores",
        ),
        Finding("devices", ", ".join(_devices())),
        Finding("memory free", f"{memory.free(torch.device('cpu')) / 2**30:.1f} GiB"),
    ]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _devices() -> Iterator[str]:
    yield "cpu"
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    if torch.backends.mps.is_available():
        yield "mps"


def ground() -> list[Finding]:
    """Kernels and semi-private features of torch, each tried once on a tiny tensor."""
    probes: dict[str, Callable[[], object]] = {
        "oneDNN": torch.backends.mkldnn.is_available,
        "MKL": torch.backends.mkl.is_available,
        "OpenMP": torch.backends.openmp.is_available,
        "mkldnn._linear_pointwise": _linear_pointwise,
        "torch.vmap": _vmap,
        "node._input_metadata": _input_metadata,
        "node._saved_*": _saved_tensor,
        "calling a node": _node_call,
        "calling a node under vmap": _node_under_vmap,
        "apply of a Python node": _python_node,
    }
    with torch.random.fork_rng(devices=[]):
        return [_probe(name, probe) for name, probe in probes.items()]


def _probe(name: str, probe: Callable[[], object]) -> Finding:
    try:
        works = bool(probe())
    except Exception as error:  # whatever a foreign build of torch raises is the finding
        first = (str(error).splitlines() or [""])[0]
        return Finding(name, f"no: {type(error).__name__}: {first}"[:90], present=False)
    return Finding(name, "yes" if works else "no", present=works)


def _linear_pointwise() -> bool:
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    y = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.allclose(y, F.linear(x, w), atol=1e-5)


def _exponential() -> tuple[Tensor, Any]:
    """The value of exp at ones, and its graph node: d exp(x) = exp(x) dx."""
    y = torch.ones(3, requires_grad=True).exp()
    return y.detach(), y.grad_fn


def _vmap() -> bool:
    x = torch.randn(2, 3)
    return torch.equal(torch.vmap(torch.sin)(x), torch.sin(x))


def _input_metadata() -> bool:
    _, node = _exponential()
    (metadata,) = node._input_metadata
    return tuple(metadata.shape) == (3,) and metadata.dtype == torch.float32


def _saved_tensor() -> bool:
    y, node = _exponential()
    return torch.equal(node._saved_result, y)


def _node_call() -> bool:
    y, node = _exponential()
    return torch.equal(node(torch.full((3,), 2.0)), 2 * y)


def _node_under_vmap() -> bool:
    y, node = _exponential()
    rows = torch.randn(2, 3)
    return torch.equal(torch.vmap(node)(rows), rows * y)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


def _python_node() -> bool:
    twice: Any = _Twice.apply
    node = twice(torch.ones(3, requires_grad=True)).grad_fn
    return torch.equal(node.apply(torch.ones(3)), torch.full((3,), 2.0))


class _LastStep(nn.Module):
    """A GRU's output at the last time step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gru(x)[0][:, -1]
        return y


def models() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Small models in float64, each with a batch of three samples."""
    mlp = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    conv = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    )
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    for name, model, shape in (
        ("MLP", mlp, (5,)),
        ("conv net with pooling", conv, (1, 6, 6)),
        ("transformer layer", nn.Sequential(attention, nn.Flatten(), nn.Linear(32, 3)), (4, 8)),
        ("GRU", _LastStep(), (5, 3)),
    ):
        yield name, model.double(), torch.randn(3, *shape, dtype=torch.float64)


def self_check(engine: Engine = jacobian) -> list[Verdict]:
    """Compare ``engine`` with one ``autograd.grad`` per sample and output, model by model.

    Args:
        engine: from a model and its inputs ``[N, *in]`` to ``[N, *out, *in]``;
            :func:`batchjac.jacobian` unless given.

    Returns:
        One verdict per model; it passes when no entry is further than 1e-12 from the specification
        and the engine had nothing to warn of.

    Cost:
        A second; no random state, no tensor of the caller's is touched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [_compare(name, engine, reference.jacobian, model, x) for name, model, x in models()]


def _compare(name: str, engine: Engine, truth: Engine, model: nn.Module, x: Tensor) -> Verdict:
    try:
        with _listening() as records:
            found = engine(model, x)
        wanted = truth(model, x)
    except Exception as error:  # an engine that raises has failed; say how and go on
        return Verdict(name, float("inf"), False, f"{type(error).__name__}: {error}")
    if found.shape != wanted.shape:
        note = f"shape {list(found.shape)}, expected {list(wanted.shape)}"
        return Verdict(name, float("inf"), False, note)
    difference = (found - wanted).abs().max().item()
    # A warning means that the walk met a wrong rule and left the rows to autograd: the answer is
    # right, but what is examined here is the walk.
    warned = any(record.levelno >= logging.WARNING for record in records)
    remarks = tuple(record.getMessage() for record in records)
    passed = difference <= TOLERANCE and not warned
    return Verdict(name, difference, passed, f"J {list(found.shape)}", remarks)


@contextmanager
def _listening() -> Iterator[list[logging.LogRecord]]:
    """Everything our logger says meanwhile, kept from the console."""
    records: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Listener()
    log = logging.getLogger("batchjac")
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield records
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def run(write: Callable[[str], object] = print, engine: Engine = jacobian) -> int:
    """Write the whole examination line by line; the exit code is 1 when a self-check fails.

    Args:
        write: called with each line of text.
        engine: what the self-check examines; :func:`batchjac.jacobian` unless given.

    Returns:
        0 when every model of the self-check passes, else 1.
    """
    for title, findings in (
        ("versions", versions()),
        ("machine", machine()),
        ("torch features", [*ground(), _rules()]),
        ("kernels", products()),
    ):
        write(title)
        for finding in findings:
            mark = " " if finding.present else "-"
            write(f" {mark} {finding.name:<26}{finding.detail}")
    write("self-check: float64, against one autograd.grad per sample and output")
    verdicts = self_check(engine)
    for verdict in verdicts:
        word = "PASS" if verdict.passed else "FAIL"
        write(f"   {word}  {verdict.model:<24}{verdict.difference:<10.1e}{verdict.note}")
        for remark in verdict.remarks:
            write(f"         {remark}")
    failed = sum(not verdict.passed for verdict in verdicts)
    write(
        f"{failed} of {len(verdicts)} models fail: this installation is not to be trusted"
        if failed
        else f"all {len(verdicts)} models agree"
    )
    return 1 if failed else 0


def products() -> list[Finding]:
    """What was measured to be fastest here, and where that is kept for other processes."""
    kernels.fastest()
    if native.library() is not None:
        kernels.fastest_batched()
    layers = calibration.choices("Convolution")
    counts = Counter(chosen.CONVOLUTIONS.get(name, name) for name in layers.values())
    each = "; ".join(f"{name} {count}" for name, count in counts.most_common())
    return [
        Finding("matrix product", kernels.chosen_linear() or kernels.LINEAR[0]),
        Finding("batched product", kernels.chosen_batched() or kernels.BATCHED[0]),
        Finding("our own kernels", native.described(), present=native.library() is not None),
        Finding("convolutions", f"{len(layers)} shapes measured in a day{each and '; '}{each}"),
        Finding("kept in", str(calibration.folder())),
    ]


def _rules() -> Finding:
    count = len(registry.names())
    return Finding("rules", f"{count} kinds of graph node, the others by vmap", present=count > 0)


if __name__ == "__main__":
    sys.exit(run())
