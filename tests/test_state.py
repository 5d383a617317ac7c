"""Nothing is left changed: not the model, not the inputs, not torch, after success or an error."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import jacobian, verify
from batchjac.errors import BudgetError, CouplingError, OutError, StateError
from batchjac.testing import jacobian_in_chunks
from tests.watch import Watch, busy

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


QUESTIONS: dict[str, dict[str, Any]] = {
    "inputs": {},
    "outputs": {"outputs": "argmax"},
    "a layer": {"wrt": "first"},
    "of a layer": {"of": "first"},
    "parameters": {"wrt": "parameters"},
    "several": {"wrt": ["inputs", "drop", "last.weight"]},
    "with a history": {"create_graph": True},
    "little memory": {"max_memory": "20kB"},
    "frozen": {"coupling": "frozen"},
    "sum": {"coupling": "sum"},
    "full": {"coupling": "full"},
    "full parameters": {"coupling": "full", "wrt": "parameters"},
}

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


class Token:
    """Something that a recorded node holds."""


class Holds(torch.autograd.Function):
    """The identity; its node holds a token for as long as the graph lives."""

    alive: ClassVar[weakref.WeakSet[Token]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        Holds.alive.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Holds.apply(self.layer(Holds.apply(x)))
        return y


@pytest.fixture
def without_gc() -> Iterator[None]:
    """Whatever waits for the cycle collector holds memory that nobody asked for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


GRAPHS = {k: v for k, v in QUESTIONS.items() if k not in ("with a history", "several")} | {
    "a layer": {"wrt": "layer"}, "of a layer": {"of": "layer"}
}  # fmt: skip


@pytest.mark.parametrize("question", GRAPHS)
@pytest.mark.usefixtures("without_gc")
def test_no_graph_stays(question: str) -> None:
    model, x = Holding(), torch.randn(N, 3)
    kept = batchjac.value_and_jacobian(model, x, **GRAPHS[question])
    assert len(Holds.alive) == 0
    del kept


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.usefixtures("without_gc")
def test_nobody_else_holds_the_answer(question: str) -> None:
    options = QUESTIONS[question] if question != "several" else {}
    j = jacobian(nn.Sequential(OrderedDict(first=nn.Linear(3, 2))), torch.randn(N, 3), **options)
    held = [weakref.ref(part) for part in (j.values() if isinstance(j, dict) else [j])]
    del j
    assert [ref() for ref in held] == [None] * len(held)


@pytest.mark.usefixtures("without_gc")
def test_no_graph_stays_after_an_error() -> None:
    class Fails(Holding):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError(str(super().forward(x).shape))

    for model, options in (
        (Fails(), {}),
        (Holding(), {"max_memory": 1}),
        (Holding(), {"outputs": 9}),
    ):
        with pytest.raises((ArithmeticError, BudgetError, IndexError)) as caught:
            jacobian(model, torch.randn(N, 3), **options)
        caught.value.__traceback__ = None  # frames hold what they held
        caught.value.__context__ = caught.value.__cause__ = None
        del caught
        assert len(Holds.alive) == 0


@pytest.mark.usefixtures("without_gc")
def test_a_history_lives_as_long_as_the_jacobian() -> None:
    j = jacobian(Holding(), torch.randn(N, 3), create_graph=True)
    del j
    assert len(Holds.alive) == 0


def live_tensors() -> Counter[tuple[int, ...]]:
    gc.collect()
    return Counter(tuple(o.shape) for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_two_hundred_calls_take_no_more_memory_than_ten() -> None:
    model, x = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 16)), torch.randn(64, 64)

    def calls(count: int) -> None:
        for k in range(count):
            jacobian(model if k % 2 else lambda x: model(x), x)  # a new function every other time
            jacobian(model, x, wrt=["0.bias", "1"], outputs=[k % 16])

    calls(10)
    tensors, trusted, before = live_tensors(), len(verify._trusted), resident()
    calls(200)
    assert live_tensors() == tensors
    assert len(verify._trusted) == trusted
    # the answers of the calls alone take 100 MiB
    assert resident() - before < 16 << 20


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
