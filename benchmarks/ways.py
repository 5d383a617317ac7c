"""The ways to a batch's Jacobian: ours, PyTorch's own, TorchJD's; JAX and TensorFlow by name.

A way makes, from a model, a function of some samples. It gets the place for the result as well and
returns what it computed: that place, or something of its own, copied there by whoever called it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap

import batchjac

Compute = Callable[[Tensor, Tensor | None], Any]
Prepare = Callable[[nn.Module, Tensor], Compute]

CHUNKS = (4, 16, 32, 64, 128, 512)
FEW = (32, 128)
"""For a way that compiles anew for each size."""


class NotWrittenError(Exception):
    """This case's model has not been written for this library."""


def single(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as a function of one sample, which ``torch.func.vmap`` wants."""

    def one(sample: Tensor) -> Tensor:
        y: Tensor = model(sample[None])[0]
        return y

    return one


def walk(model: nn.Module, _: Tensor) -> Compute:
    """batchjac, into ``out=`` where there is one."""

    def compute(x: Tensor, into: Tensor | None) -> Any:
        return batchjac.jacobian(model, x, out=into)

    return compute


def row_loop(model: nn.Module, _: Tensor) -> Compute:
    """Seed 2: ``autograd.grad`` once per output, stacked, or written into the result."""

    def compute(x: Tensor, into: Tensor | None) -> Tensor:
        x = x.detach().requires_grad_()
        y = model(x)
        rows, last = y.flatten(1), y[0].numel() - 1
        place = None if into is None else into.view(len(x), last + 1, *x.shape[1:])
        found = []
        for o in range(last + 1):
            (row,) = torch.autograd.grad(rows[:, o].sum(), x, retain_graph=o < last)
            if place is None:
                found.append(row)
            else:
                place[:, o] = row
        if into is None:
            return torch.stack(found, 1).unflatten(1, y.shape[1:])
        return into

    return compute


def rows(y: Tensor) -> Tensor:
    """``[V, N, *out]``: row ``v`` picks output ``v`` of every sample."""
    width = y[0].numel()
    seeds = torch.eye(width, dtype=y.dtype, device=y.device).view(width, 1, *y.shape[1:])
    return seeds.expand(width, *y.shape)


def samples_first(j: Tensor, y: Tensor) -> Tensor:
    """``[V, N, *in]`` as ``[N, *out, *in]``."""
    return j.transpose(0, 1).unflatten(1, y.shape[1:])


def graph_vmap(model: nn.Module, _: Tensor) -> Compute:
    """All rows in one ``autograd.grad(..., is_grads_batched=True)``."""

    def compute(x: Tensor, into: Tensor | None) -> Tensor:
        x = x.detach().requires_grad_()
        y = model(x)
        (j,) = torch.autograd.grad(y, x, rows(y), is_grads_batched=True)
        return samples_first(j, y)

    return compute


def vmap_of(jacobian: Callable[..., Any]) -> Prepare:
    """``vmap(jacrev(f))`` or ``vmap(jacfwd(f))``."""

    def prepare(model: nn.Module, _: Tensor) -> Compute:
        function = vmap(jacobian(single(model)))
        return lambda x, into: function(x)

    return prepare


def diagonal(j: Tensor, y_shape: torch.Size, x_shape: torch.Size) -> Tensor:
    """From ``[N, *out, N, *in]`` what belongs to one sample."""
    n, width = x_shape[0], y_shape[1:].numel()
    own = torch.einsum("noni->noi", j.reshape(n, width, n, x_shape[1:].numel()))
    return own.reshape(n, *y_shape[1:], *x_shape[1:])


def functional(model: nn.Module, _: Tensor) -> Compute:
    """Seeds 1 and 4: ``functional.jacobian(vectorize=True)`` and its diagonal by einsum."""

    def compute(x: Tensor, into: Tensor | None) -> Tensor:
        j: Any = torch.autograd.functional.jacobian(model, x, vectorize=True)
        return diagonal(j, torch.Size(j.shape[: j.ndim - x.ndim]), x.shape)

    return compute


def sample_loop(model: nn.Module, _: Tensor) -> Compute:
    """Seed 3: ``functional.jacobian`` sample by sample."""

    def compute(x: Tensor, into: Tensor | None) -> Tensor:
        parts: list[Any] = [
            torch.autograd.functional.jacobian(lambda s: model(s[None])[0], sample) for sample in x
        ]
        return torch.stack(parts)

    return compute


def sum_trick(model: nn.Module, _: Tensor) -> Compute:
    """Seed 5: the Jacobian of the sum over samples."""

    def compute(x: Tensor, into: Tensor | None) -> Tensor:
        j: Any = torch.autograd.functional.jacobian(lambda t: model(t).sum(0), x)
        return j.movedim(-x.ndim, 0)

    return compute


def torchjd_plain(model: nn.Module, _: Tensor) -> Compute:
    """TorchJD's ``jac`` as its example calls it: ``[N*out, N, *in]``, then the diagonal."""
    from torchjd.autojac import jac

    def compute(x: Tensor, into: Tensor | None) -> Tensor:
        x = x.detach().requires_grad_()
        y = model(x)
        return diagonal(jac(y, x)[0], y.shape, x.shape)

    return compute


def torchjd_rows(model: nn.Module, _: Tensor) -> Compute:
    """TorchJD's ``jac`` with ``jac_outputs``: one row for an output of all samples."""
    from torchjd.autojac import jac

    def compute(x: Tensor, into: Tensor | None) -> Tensor:
        x = x.detach().requires_grad_()
        y = model(x)
        return samples_first(jac(y, x, jac_outputs=rows(y))[0], y)

    return compute


def jax_way(model: nn.Module, x: Tensor) -> Compute:
    from benchmarks.in_jax import prepare

    return prepare(model, x)


def tensorflow_way(model: nn.Module, x: Tensor) -> Compute:
    from benchmarks.in_tensorflow import prepare

    return prepare(model, x)


@dataclass(frozen=True)
class Way:
    """One way, as its documentation has it (the whole batch) and as somebody would tune it."""

    name: str
    documented: Prepare
    tuned: Prepare
    chunks: tuple[int, ...] = CHUNKS
    doubled: tuple[bool, bool] = (False, False)
    """Whether the batch axis appears twice on the way: (documented, tuned)."""
    torch: bool = True
    """Whether it differentiates the PyTorch model itself."""
    loops: bool = False
    """One output at a time: rows take no memory together."""

    @staticmethod
    def of(name: str, prepare: Prepare, **facts: Any) -> "Way":
        return Way(name, prepare, prepare, **facts)


OURS, ROW_LOOP = "batchjac", "row loop"
WAYS = (
    Way.of(OURS, walk, chunks=()),
    Way.of(ROW_LOOP, row_loop, loops=True),
    Way.of("graph-level vmap", graph_vmap),
    Way.of("vmap(jacrev)", vmap_of(jacrev)),
    Way.of("vmap(jacfwd)", vmap_of(jacfwd)),
    Way.of("functional.jacobian", functional, chunks=(1, 4, 16), doubled=(True, True)),
    Way.of("sum trick", sum_trick, loops=True),
    Way("TorchJD", torchjd_plain, torchjd_rows, doubled=(True, False)),
    Way.of("JAX", jax_way, chunks=FEW, torch=False),
    Way.of("TensorFlow", tensorflow_way, chunks=FEW, torch=False),
)
SAMPLE_LOOP = Way.of("loop over samples", sample_loop, loops=True, chunks=())
SEEDS = (
    *(w for w in WAYS if w.name in (OURS, ROW_LOOP, "functional.jacobian", "sum trick")),
    SAMPLE_LOOP,
    *(w for w in WAYS if w.name == "vmap(jacrev)"),
)
"""The five ways of the seeds, beside ours."""


def chosen(names: list[str]) -> list[Way]:
    """The ways with these names."""
    known = {way.name: way for way in (*WAYS, SAMPLE_LOOP)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no way is called {unknown[0]!r}; there are: {', '.join(known)}")
    return [known[name] for name in names]
