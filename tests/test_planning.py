"""What ``batchjac.plan`` says before anything is computed, and the same question asked again."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac.engines import reference
from batchjac.errors import BudgetError, InputTypeError, MismatchError
from tests.common import close
from tests.routes import walk_by

pytestmark = pytest.mark.usefixtures("float64")


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers)


def test_a_plan_says_what_will_happen() -> None:
    planned = batchjac.plan(net(4, 8, 3), torch.zeros(5, 4))
    text = str(planned)
    assert text.splitlines()[0].split(maxsplit=1)[1] == "5 samples x 3 outputs x 4 inputs"
    for line in ("5 of 5 in one forward", "3 of 3 in one walk", "proved from the graph"):
        assert line in text
    assert "AddmmBackward0, TanhBackward0" in text
    made = planned.plan.prediction
    assert made is not None
    assert (made.rows, made.columns) == (3, 0)
    assert made.multiply_adds == 5 * 3 * (4 * 8 + 8 * 3)
    assert made.seconds > 0
    assert 0 < made.attainable <= 1


@pytest.mark.parametrize(("mode", "passed"), [("reverse", 3), ("forward", 4)])
def test_operations_are_counted_layer_by_layer(mode: str, passed: int) -> None:
    made = batchjac.plan(net(4, 80, 3), torch.zeros(5, 4), mode=mode).plan.prediction
    assert made is not None
    assert made.multiply_adds == 5 * passed * (4 * 80 + 80 * 3)


def test_a_plan_by_way_of_a_bottleneck_names_its_stages() -> None:
    planned = batchjac.plan(net(40, 40, 2, 40, 40), torch.zeros(64, 40), mode="mixed")
    text = str(planned)
    assert "joined: 40 x 2 x 40" in text or "come from" in text
    x = torch.randn(64, 40)
    close(planned(x), reference.jacobian(planned.function, x))


def test_nothing_is_walked_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def refuse(*rest: Any, **more: Any) -> Any:
        pytest.fail("a plan walked")

    walk_by(monkeypatch, refuse)
    monkeypatch.setattr("batchjac.job.engine_rows", refuse)
    planned = batchjac.plan(model, torch.randn(5, 4))
    assert "to be probed" in str(planned)  # in training the samples meet in the batch norm
    assert model.training
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_a_plan_holds_no_tensors() -> None:
    planned = batchjac.plan(net(4, 8, 3), torch.zeros(5, 4), wrt="parameters")

    def look(value: Any) -> None:
        assert not isinstance(value, Tensor)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                look(getattr(value, field.name))
        elif isinstance(value, tuple | list):
            for part in value:
                look(part)
        elif hasattr(value, "items"):
            for part in value.values():
                look(part)

    look(planned.plan)
    look(planned.kinds)
    assert len(planned.plan.axes) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        planned.plan.samples = 1  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize("samples", [1, 5, 7, 30])
def test_the_same_question_of_other_samples(samples: int) -> None:
    model = net(4, 8, 3)
    planned = batchjac.plan(model, torch.zeros(7, 4), outputs=[2, 0], max_memory="1MiB")
    x = torch.randn(samples, 4)
    close(planned(x), reference.jacobian(model, x)[:, [2, 0]])


def test_the_chunks_are_those_that_were_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(64, 256, 64)
    planned = batchjac.plan(model, torch.zeros(64, 64), max_memory="4MiB")
    assert planned.plan.samples < 64
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    x = torch.randn(64, 64)
    found = planned(x)
    assert max(sizes) <= max(planned.plan.samples, 16)  # looks across borders take up to 16
    assert planned.plan.samples in sizes
    close(found, batchjac.jacobian(model, x))


def test_a_result_in_memory_that_the_caller_brings() -> None:
    model, x = net(4, 8, 3), torch.randn(5, 4)
    out = torch.empty(5, 3, 4)
    assert batchjac.plan(model, x)(x, out=out) is out
    close(out, reference.jacobian(model, x))


def test_inputs_of_another_kind_are_refused_field_by_field() -> None:
    planned = batchjac.plan(lambda a, b: a * b.sum(1, keepdim=True), (torch.zeros(5, 4),) * 2)
    with pytest.raises(MismatchError) as caught:
        planned((torch.zeros(5, 3), torch.zeros(5, 4, dtype=torch.float32)))
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  inputs[0]: planned [N, 4] torch.float64 on cpu, got [N, 3] torch.float64 on cpu",
        "  inputs[1]: planned [N, 4] torch.float64 on cpu, got [N, 4] torch.float32 on cpu",
    ]
    with pytest.raises(MismatchError, match=r"inputs\[1\]: planned .*, got nothing"):
        planned((torch.zeros(5, 4),))


def test_hooks_go_one_at_a_time_which_nobody_can_predict() -> None:
    model = net(4, 8, 3)
    model[0].register_full_backward_hook(lambda module, into, out: None)
    planned = batchjac.plan(model, torch.zeros(5, 4))
    assert planned.plan.engine == "rows"
    assert planned.plan.prediction is None


def test_what_cannot_be_is_refused_before() -> None:
    with pytest.raises(BudgetError, match="the least that would do"):
        batchjac.plan(net(4, 8, 3), torch.zeros(5, 4), max_memory=100)
    with pytest.raises(InputTypeError, match="meta device"):
        batchjac.jacobian(net(4, 3), torch.zeros(5, 4, device="meta"))


def test_shapes_alone_do() -> None:
    model = net(4, 8, 3).to("meta")
    planned = batchjac.plan(model, torch.zeros(5, 4, device="meta"))
    assert "5 samples x 3 outputs x 4 inputs" in str(planned)
