"""What several forwards of one call must not change: values, state, answers."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils.checkpoint as checkpoints
from torch import Tensor, nn

import batchjac
from batchjac.errors import BatchAxisError, CouplingError
from batchjac.testing import jacobian_in_chunks
from batchjac.tree import flatten

F64 = torch.float64


def halves() -> Tensor:
    """The first half of the batch negative, the second positive."""
    return torch.cat([-torch.rand(8, 3, dtype=F64) - 0.1, torch.rand(8, 3, dtype=F64) + 2])


class Counts(nn.Module):
    """Each forward multiplies by one more."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 0
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.k += 1
        self.calls += 1
        return x.sin() * self.k * float(self.calls)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.sin() if x.sum() > 0 else -x.sin(),
        lambda x: x / x.detach().std(0),
    ],
    ids=["branch", "detached"],
)
def test_a_value_that_depends_on_the_batch_is_refused_in_chunks(
    f: Callable[[Tensor], Tensor],
) -> None:
    x = halves()
    whole = batchjac.jacobian(f, x)
    assert whole.shape == (16, 3, 3)
    with pytest.raises(CouplingError, match="depends on which other samples"):
        jacobian_in_chunks(f, x, 12, 3)


def test_coupling_before_the_layer_that_is_asked_for() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Tanh()).to(F64).train()
    with pytest.raises(CouplingError, match="depends on which other samples"):
        jacobian_in_chunks(net, halves(), 12, 2, wrt="1")


def test_every_forward_finds_the_module_as_the_first_did() -> None:
    x, net = halves(), Counts()
    want = torch.diag_embed(x.cos())
    torch.testing.assert_close(jacobian_in_chunks(net, x, 5, 2), want)
    assert (net.k, float(net.calls)) == (0, 0)


def test_values_of_chunks_are_joined_where_they_have_the_samples() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.sin(), torch.arange(3), x.argmax(1)

    x = torch.randn(64, 3, dtype=F64)
    y, _ = batchjac.value_and_jacobian(f, x, max_memory=40_000)
    assert [t.shape[0] for t in y] == [64, 3, 64]
    torch.testing.assert_close(y[2], x.argmax(1))


def test_values_that_cannot_be_joined_are_refused_and_jacobians_are_not() -> None:
    def f(x: Tensor) -> tuple[Tensor, list[str]]:
        return x.sin(), [str(n) for n in range(len(x))]

    x = torch.randn(64, 3, dtype=F64)
    j, _ = batchjac.jacobian(f, x, max_memory=40_000)
    torch.testing.assert_close(j, torch.diag_embed(x.cos()))
    with pytest.raises(BatchAxisError, match="nested differently"):
        batchjac.value_and_jacobian(f, x, max_memory=40_000)


def test_a_layer_by_itself_is_the_identity() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).to(F64)
    found = batchjac.jacobian(net, torch.randn(4, 3, dtype=F64), of="0", wrt="0")
    torch.testing.assert_close(found, torch.eye(2, dtype=F64).expand(4, 2, 2))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_no_input_to_probe_and_hooks() -> None:
    net = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 2)).to(F64)
    x = torch.randint(5, (3, 2))
    want = batchjac.jacobian(net, x, wrt="2.weight")
    handle = net[2].register_full_backward_hook(lambda m, i, o: None)
    torch.testing.assert_close(batchjac.jacobian(net, x, wrt="2.weight"), want)
    handle.remove()


def test_threads_share_a_model() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(F64)
    x = torch.randn(5, 3, dtype=F64)
    want = {wrt: batchjac.jacobian(net, x, wrt=wrt) for wrt in (None, "2.weight")}
    patched = (Tensor.register_hook, checkpoints.CheckpointFunction)
    wrong: list[object] = []

    def work(wrt: str | None) -> None:
        for _ in range(30):
            try:
                torch.testing.assert_close(batchjac.jacobian(net, x, wrt=wrt), want[wrt])
            except Exception as error:  # a thread would lose it; the test looks at the list
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(w,)) for w in (None, "2.weight") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert patched == (Tensor.register_hook, checkpoints.CheckpointFunction)
    assert all(p.requires_grad for p in net.parameters())


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Both:
    first: Tensor
    second: Tensor


@pytest.mark.parametrize("kind", [Pair, Both, dict, OrderedDict, tuple, list])
def test_no_chunk_outlives_its_turn(kind: Any) -> None:
    """However the outputs of a function, or of its layer, are nested."""
    alive: list[weakref.ref[Tensor]] = []

    def nested(x: Tensor) -> Any:
        both = x.sin(), x.cos()
        if issubclass(kind, dict):
            return kind(zip("ab", both, strict=True))
        return kind(both) if kind in (tuple, list) else kind(*both)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            gc.collect()
            assert not any(t() is not None for t in alive[:-1])  # the last is being compared
            out = nested(x)
            alive.extend(weakref.ref(t) for t in flatten(out).leaves[:1])
            return out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor) -> Any:
            return self.layer(x)

    x = torch.randn(12, 3, dtype=F64)
    jacobian_in_chunks(Net(), x, 4, 3)
    alive.clear()
    jacobian_in_chunks(Net(), x, 4, 3, wrt="layer")
    assert len(alive) > 3
