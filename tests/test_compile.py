"""``compile=True``: the walk as it was written down, replayed with the numbers of each new call."""

from __future__ import annotations

import ast
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

import batchjac
from batchjac import convolutions, kernels, rules
from batchjac.engines import compiled, reference
from batchjac.engines.trace import Refused, describe
from batchjac.memory import Chunk
from tests.common import close, mlp
from tests.compiling import Counted, Module, answer, kinds, lines, walks
from tests.zoo import CASES, Case, seeded
from tests.zoo.rowloop import differentiable, tree_map
from tests.zoo.verdict import difference

pytestmark = pytest.mark.usefixtures("nothing_compiled")


KINDS = (
    "lenet", "resnet_eval", "mlp_every_smooth_activation", "transformer_encoder_eval",
    "gpt_tied_embeddings", "gru_time_first", "lstm_last_step", "layer_norm", "batch_norm_eval",
    "group_norm", "inplace_first_layer", "inplace_activations", "residual_mlp", "tied_autoencoder",
    "integer_input_embedding", "several_in_several_out", "max_pool_overlapping_dilated",
    "batch_norm_train_frozen",
)  # fmt: skip


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("case", [c for c in CASES if c.name in KINDS], ids=lambda c: c.name)
def test_another_inputs_walk_replayed_is_this_inputs_jacobian(case: Case) -> None:
    compiler = "aot_eager"
    f, x = case.build()
    with case.around(), seeded(case.seed):
        expected = reference.jacobian(f, x, **case.options)
    f, x = case.build()
    other = tree_map(lambda t: t.detach() * 0.7 + 0.1 if differentiable(t) else t, x)
    answer(f, other, compiler, **case.options)
    assert [len(each) for each in compiled._known.values()] == [1] * len(compiled._known)
    assert not any(one.refused for each in compiled._known.values() for one in each)
    before = len(compiled._known)
    found = answer(f, x, compiler, **case.options)
    assert [len(each) for each in compiled._known.values()] == [1] * before
    assert not difference(found, expected, case)


def test_every_kind_is_in_the_zoo() -> None:
    assert {c.name for c in CASES} >= set(KINDS)


@pytest.mark.usefixtures("taken", "float64")
def test_weights_are_read_anew() -> None:
    model, x, count = mlp(), torch.randn(5, 3), Counted()
    answer(model, x, count)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    close(answer(model, x, count), reference.jacobian(model, x))
    assert (count.compiled, count.ran) == (1, 3)  # once when it is made, once when it is compared


@pytest.mark.usefixtures("taken", "float64")
def test_what_was_compiled_is_not_compiled_again() -> None:
    model, count = mlp(), Counted()
    for k in range(3):
        x = torch.randn(5, 3)
        close(answer(model, x, count), reference.jacobian(model, x))
        assert (count.compiled, count.ran) == (1, 2 + k)


@pytest.mark.usefixtures("taken", "float64")
@pytest.mark.parametrize(
    "branches", [(torch.sin, torch.cos), (lambda x: x**2, lambda x: x**3)], ids=["nodes", "numbers"]
)
def test_a_branch_on_a_value(branches: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    def f(x: Tensor) -> Tensor:
        return branches[int(x.sum() > 0)](x) * 2

    count = Counted()
    for k, shift in enumerate((3.0, -3.0, 2.0, -2.0)):
        x = torch.rand(5, 3) + shift
        close(answer(f, x, count), torch.diag_embed(diagonal(f, x)))
        assert count.compiled == min(2, k + 1)


def diagonal(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(f(x).sum(), x)
    return found


@pytest.mark.usefixtures("taken", "float64")
def test_integer_inputs() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, words: Tensor, scores: Tensor) -> Tensor:
            rows = self.head(x.tanh() * self.table(words))
            return rows.gather(1, scores)

    model, count = Picked(), Counted()
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(5, 4), torch.randint(7, (5,)), torch.randint(3, (5, 2))
        close(answer(model, x, count)[0], reference.jacobian(model, x)[0])
    assert count.compiled == 1


@pytest.mark.usefixtures("taken", "float64")
@pytest.mark.parametrize(
    "options",
    [
        {"wrt": "parameters"},
        {"wrt": "2"},
        {"outputs": [2, 0]},
        {"outputs": torch.tensor([0, 1, 2, 3, 0])},
        {"outputs": "argmax"},
        {"coupling": "full"},
        {"batched": False},
    ],
    ids=str,
)
def test_whatever_is_asked(options: dict[str, Any]) -> None:
    model, count = mlp(), Counted()
    answer(model, torch.randn(5, 3), count, **options)
    made = count.compiled
    x = torch.randn(5, 3)
    close(answer(model, x, count, **options), reference.jacobian(model, x, **options))
    assert made == count.compiled > 0


@pytest.mark.usefixtures("taken", "float64")
def test_a_walk_to_a_bottleneck() -> None:
    widths, count = (12, 12, 2, 12, 12), Counted()
    layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*itertools.chain(*layers))
    answer(model, torch.randn(5, 12), count, mode="mixed")
    x = torch.randn(5, 12)
    close(answer(model, x, count, mode="mixed"), reference.jacobian(model, x))
    assert (count.compiled, count.ran) == (1, 3)


@pytest.mark.usefixtures("taken", "float64")
def test_other_shapes_are_compiled_anew() -> None:
    model, count = mlp(), Counted()
    for k, n in enumerate((5, 2, 7, 5)):
        x = torch.randn(n, 3)
        close(answer(model, x, count), reference.jacobian(model, x))
        assert count.compiled == min(3, k + 1)


@pytest.mark.usefixtures("taken", "float64")
def test_chunks_that_come_once_are_not_compiled() -> None:
    model, x, count = mlp(), torch.randn(7, 3), Counted()
    expected = reference.jacobian(model, x)
    close(answer(model, x, count, fixed=Chunk(2, 99)), expected)  # 2, 2, 2 and 1 samples
    assert (count.compiled, count.ran) == (1, 3)
    close(answer(model, x, count, fixed=Chunk(2, 99)), expected)
    assert count.compiled == 2  # the last sample came again


@pytest.mark.usefixtures("taken", "float64")
def test_rows_in_chunks_and_an_answer_in_the_callers_memory() -> None:
    model, x, count = mlp(), torch.randn(5, 3), Counted()
    out = torch.empty(5, 4, 3)
    answer(model, x, count, fixed=Chunk(5, 1), out=out)
    close(out, reference.jacobian(model, x))
    assert (count.compiled, count.ran) == (1, 4)  # 4 rows: the second is compiled


def test_what_a_value_is_described_by() -> None:
    def same(a: Any, b: Any) -> bool:
        return bool(describe(a, []) == describe(b, []))

    assert same((1.5, torch.nan, None), (1.5, torch.nan, None))
    assert same(torch.zeros(2, 3), torch.ones(2, 3))
    for a, b in (
        (0.0, -0.0), (1, True), (1, 1.0), ((1,), [1]), (1j, -1j), ("sum", "mean"),
        (torch.zeros(2, 3), torch.zeros(3, 2).t()), (torch.zeros(2), torch.zeros(2).double()),
        (torch.zeros(2), (torch.zeros(2),)), (torch.zeros(1j.imag.__int__()), None),
    ):  # fmt: skip
        assert not same(a, b)
    for odd in (torch.zeros(2, 2).to_sparse(), object()):
        with pytest.raises(Refused):
            describe(odd, [])


@pytest.mark.parametrize("f", [mlp, lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(),
                                                           nn.MaxPool2d(2), nn.Flatten())],
                         ids=["mlp", "convolution"])  # fmt: skip
def test_inductor(
    f: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    monkeypatch.setattr(compiled, "_seconds", lambda act, noted: 1.0)
    monkeypatch.setattr(compiled, "_MARGIN", 2.0)
    caplog.set_level(logging.DEBUG, "batchjac")
    settings = [module.get_config_copy() for module in (dynamo, inductor)]
    model = f()
    shape = (5, 3) if isinstance(model[0], nn.Linear) else (5, 1, 8, 8)
    batchjac.jacobian(model, torch.randn(shape), compile=True)
    x = torch.randn(shape)
    y, found = batchjac.value_and_jacobian(model, x, compile=True)
    assert walks(caplog) == ["walks by inductor: 1"]
    assert kinds(caplog, -1) == kinds(caplog, 0) != []
    assert lines(caplog) == []
    torch.testing.assert_close(found, batchjac.jacobian(model, x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, model(x).detach())
    assert [module.get_config_copy() for module in (dynamo, inductor)] == settings


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_our_own_kernels_are_called(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(convolutions, "_SMALL_CONVOLUTION", 0)
    monkeypatch.setattr(convolutions, "_fastest_convolution", lambda *_: convolutions.columns)
    monkeypatch.setattr(kernels, "fastest", lambda: lambda g, w: torch.mm(g, w.t()))
    called: set[str] = set()

    def watched(module: Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        called.update(str(node.target) for node in module.graph.nodes)
        run: Callable[..., Any] = lookup_backend(compiler)(module, inputs)
        return run

    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 3),
        nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    model.insert(2, nn.Flatten(2))
    for _ in range(2):
        x = torch.randn(5, 1, 4, 8)
        found = answer(model, x, watched)
    assert {"batchjac.linear.default", "batchjac.columns.default"} <= called
    assert not any(one.refused for each in compiled._known.values() for one in each)
    torch.testing.assert_close(found, reference.jacobian(model, x), rtol=1e-5, atol=1e-6)


def test_a_plan_is_called_with_what_it_was_made_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = mlp(), torch.randn(5, 3)
    monkeypatch.setattr(compiled, "_candidates", lambda *_: {})
    planned = batchjac.plan(model, x, compile=True)
    assert "compiled      when called" in str(planned)
    assert "compiled" not in str(batchjac.plan(model, x))
    torch.testing.assert_close(planned(x), batchjac.jacobian(model, x))
    assert lines(caplog)[0].startswith("compile=True, but not compiled")


def test_there_is_room_for_what_a_compiled_walk_holds_at_once() -> None:
    model, x = mlp(), torch.randn(5000, 3)
    plans = [
        batchjac.plan(model, x, mode="reverse", max_memory=10**6, compile=c).plan
        for c in (True, False)
    ]
    assert plans[0].samples <= 0.6 * plans[1].samples < plans[1].batch


def test_rules_call_nodes_only_where_it_is_watched() -> None:
    """What a rule reads past ``Step.saved`` and ``Step.called`` would be that of the first call."""
    calls, reads = [], []
    for path in Path(rules.__file__).parent.glob("*.py"):
        text = path.read_text()
        reads += re.findall("_saved_|data_ptr", text)
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef):
                calls += [function.name for _ in re.findall(r"\.node\(", ast.unparse(function))]
    assert sorted(calls) == ["_on_ones", "_starts"]
    assert reads == []
