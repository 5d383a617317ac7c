"""Nothing is left changed: not the model, not the inputs, not torch, after success or an error."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import jacobian
from batchjac.errors import BudgetError, CouplingError, OutError, StateError
from batchjac.testing import jacobian_in_chunks
from tests.watch import QUESTIONS, Watch, busy

N = 6


def test_the_watch_sees_every_change() -> None:
    """The tests below would pass with a blind watch: what one plain forward does, it reports."""
    model, x = busy(), torch.randn(N, 3)
    model.norm.train()
    watch = Watch(model, x)
    model(x)
    assert set(watch.changes()) >= {
        "input 0", "python random", "numpy random", "torch random", ".history", ".table", ".marks",
        ".recent", ".to_delete", ".to_replace", ".appears", "._buffers", "._modules",
        "last._forward_hooks", "last._parameters", "first._parameters", "norm._buffers",
        "norm.momentum", "drop.training",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        lambda: torch.set_grad_enabled(False),
        lambda: torch.set_autocast_dtype("cpu", torch.float16),
    ],
)
def test_the_watch_sees_flags(change: Callable[[], Any]) -> None:
    before = (torch.get_default_dtype(), torch.get_autocast_dtype("cpu"))
    watch = Watch(None)
    change()
    try:
        assert len(watch.changes()) > 0
    finally:
        torch.set_default_dtype(before[0])
        torch.set_autocast_dtype("cpu", before[1])
        torch.use_deterministic_algorithms(False)
        torch.set_grad_enabled(True)


CALLERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "the module": lambda m: m,
    "a method": lambda m: m.forward,
    "a partial": functools.partial,
    "a closure": lambda m: lambda x: m(x),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("caller", CALLERS)
def test_nothing_changes(caller: str, question: str) -> None:
    options = QUESTIONS[question]
    if caller == "a closure" and {"wrt", "of"} & set(options):
        options = {"outputs": [0]}  # a plain function has no names
    model, x = busy(), torch.randn(N, 3, requires_grad=True)
    x.grad = torch.ones(N, 3)
    watch = Watch(model, x)
    j = jacobian(CALLERS[caller](model), x, **options)
    del j
    assert watch.changes() == []


COUPLED = {k: v for k, v in QUESTIONS.items() if "coupling" in v}


@pytest.mark.parametrize("question", COUPLED)
@pytest.mark.parametrize("track", [True, False])
def test_batch_statistics_stay(question: str, track: bool) -> None:
    model, x = busy(), torch.randn(N, 3)
    model.norm.train()
    if not track:
        model.norm.momentum = None  # a cumulative average, which counts batches
    watch = Watch(model, x)
    jacobian(model, x, **COUPLED[question])
    assert watch.changes() == []
    with torch.no_grad():
        model.norm(torch.randn(N, 4))
    assert "norm._buffers" in watch.changes()


@pytest.mark.parametrize("caller", CALLERS)
def test_nothing_changes_when_samples_are_coupled(caller: str) -> None:
    model, x = busy(), torch.randn(N, 3)
    model.norm.train()
    watch = Watch(model, x)
    with pytest.raises(CouplingError, match=r"BatchNorm1d|NativeBatchNorm"):
        jacobian(CALLERS[caller](model), x)
    assert watch.changes() == []


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("caller", CALLERS)
def test_nothing_changes_when_the_function_fails(caller: str, question: str) -> None:
    options = QUESTIONS[question]
    if caller == "a closure" and {"wrt", "of"} & set(options):
        options = {}
    model, x = busy(fails=True), torch.randn(N, 3)
    watch = Watch(model, x)
    with pytest.raises(ArithmeticError, match="in the forward"):
        jacobian(CALLERS[caller](model), x, **options)
    assert watch.changes() == []


REFUSALS: list[tuple[type[Exception], dict[str, Any]]] = [
    (BudgetError, {"max_memory": 1}),
    (OutError, {"out": torch.empty(1)}),
    (StateError, {"wrt": "extra"}),
    (IndexError, {"outputs": 9}),
]


@pytest.mark.parametrize(("error", "options"), REFUSALS)
def test_nothing_changes_when_the_question_is_refused(
    error: type[Exception], options: dict[str, Any]
) -> None:
    model, x = busy(), torch.randn(N, 3)
    if options.get("wrt") == "extra":
        model.extra = nn.Linear(1, 1)  # never runs: the forward makes another
    watch = Watch(model, x)
    with pytest.raises(error):
        jacobian(model, x, **options)
    assert watch.changes() == []


def test_nothing_changes_in_chunks() -> None:
    model, x = busy(), torch.randn(N, 3)
    watch = Watch(model, x)
    jacobian_in_chunks(model, x, 2, 1)
    assert watch.changes() == []


def test_nothing_changes_one_sample_at_a_time() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.drop = nn.Dropout(0.3)
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            y: Tensor = self.drop(self.layer(x))
            return y * (1.0 if float(x.detach().sum()) > 0 else 2.0)  # vmap cannot, a loop can

    model, x = One(), torch.randn(N, 3)
    watch = Watch(model, x)
    assert jacobian(model, x, batched=False).shape == (N, 2, 3)
    assert watch.changes() == []


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        functools.partial(torch.autocast, "cpu", torch.bfloat16),
        functools.partial(torch.autograd.set_detect_anomaly, True),
        functools.partial(torch.autograd.set_multithreading_enabled, False),
        functools.partial(torch.device, "cpu"),
    ],
    ids=lambda c: getattr(c, "__name__", None) or c.func.__name__,
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_nothing_changes_inside_a_context(around: Callable[[], Any]) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 3)
    with around():
        watch = Watch(model, x)
        j = jacobian(model, x)
        assert watch.changes() == []
    assert j.shape == (N, 2, 3)
    assert not j.is_inference()


def test_deterministic_algorithms_stay_on() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model, x = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten()), torch.randn(N, 1, 5)
        watch = Watch(model, x)
        jacobian(model, x)
        assert watch.changes() == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_double_by_default_stays() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, x = nn.Linear(3, 2), torch.randn(N, 3)
        watch = Watch(model, x)
        assert jacobian(model, x).dtype == torch.float64
        assert watch.changes() == []
    finally:
        torch.set_default_dtype(torch.float32)


class Overwrites(nn.Module):
    """Writes into its input and into views of it."""

    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        x.add_(1)
        x.t()[1].mul_(3)
        return x.relu_()


@pytest.mark.parametrize("f", [Overwrites(), Overwrites().forward, lambda x: Overwrites()(x)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_inputs_are_not_written_to(f: Callable[[Tensor], Tensor], create_graph: bool) -> None:
    wide = torch.randn(N, 5)
    for given in (wide, wide[:, 1:4], torch.randn(3, N).T, torch.randn(1, 3).expand(N, 3)):
        watch = Watch(None, given, wide)
        jacobian(f, given, create_graph=create_graph)
        assert watch.changes() == []


def test_a_graph_of_the_callers_own_still_runs_backward() -> None:
    """A needless write into a buffer would spoil what autograd saved of it."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(N, 3)
    for training in (True, False):
        model.train(training)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        y = model(x)
        jacobian(model, x, coupling="full")
        found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)


def test_the_next_training_step_is_as_without_us() -> None:
    """Also what is drawn: a dropout mask after the call is the mask without it."""
    results = []
    for ask in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimiser = torch.optim.Adam(model.parameters())
        for _ in range(3):
            x = torch.randn(N, 3)
            loss = model(x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            if ask:
                jacobian(model, x)
                jacobian(model, x, wrt="parameters")
            optimiser.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for without, beside in zip(*results, strict=True):
        assert torch.equal(without, beside)


class Renaming(nn.Linear):
    """Its forward renames an attribute, and deletes one that is None."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.first = "text"
        self.nothing = None

    def forward(self, x: Tensor) -> Tensor:
        self.second = self.__dict__.pop("first")
        return super().forward(x)


class Deleting(Renaming):
    def forward(self, x: Tensor) -> Tensor:
        del self.nothing
        return super().forward(x)


@pytest.mark.parametrize("kind", [Renaming, Deleting])
def test_attributes_keep_their_names(kind: type[Renaming]) -> None:
    model = kind()
    before = list(vars(model))
    for samples in (4, 400):
        batchjac.jacobian(model, torch.randn(samples, 3), max_memory=80_000)
    assert sorted(vars(model)) == sorted(before)
    assert (model.first, model.nothing) == ("text", None)


def test_numpys_random_numbers_are_loaded_by_nobody_but_the_function() -> None:
    """A function that is the first to ask for them, and seeds them, leaves no seed behind."""
    script = """
import sys, torch, batchjac
batchjac.jacobian(torch.nn.Linear(2, 2), torch.ones(3, 2))
print("numpy.random" in sys.modules)

def f(x):
    import numpy
    numpy.random.seed(3)
    return x * numpy.random.rand()

batchjac.jacobian(f, torch.ones(3, 2))
import numpy
left = numpy.random.get_state()[1].tolist()
f(torch.ones(1))
print(left == numpy.random.get_state()[1].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
