"""Every operator and module that torch tests, beside the reference; docs/conformance.md is this."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

import batchjac
from tests.conformance import MODULE_SAMPLES, OPERATOR_SAMPLES, modules, operators, report
from tests.conformance.__main__ import PAGE
from tests.conformance.survey import Subject, count, survey
from tests.conformance.verdict import Case, difference, judge

Record = Callable[[str, object], None]

# Subjects are dealt to the tests like cards: importing torch's databases takes seconds, which
# collecting the tests should not.
OPERATOR_DECKS = 48
MODULE_DECKS = 24

# No case of these can be right; each has the reason. The databases hold nothing else of the kind.
NEVER_RIGHT = {
    "as_strided_scatter": "torch reads the gradient's storage from its start, whatever its offset: "
    "samples reach each other in autograd itself, and the answer is CouplingError",
}


def settle(subjects: Iterable[Subject], what: str, record: Record) -> None:
    """Fail with everything that is wrong, and if anything was not compared at all."""
    found = list(subjects)
    for subject in found:
        record("tally", f"conformance: {what} {subject.outcome}")
        for outcome, n in subject.outcomes.items():
            for _ in range(n):
                record("tally", f"conformance: cases of {what} {outcome}")
    wrong = [f"{v.case}\n    {v.detail}" for s in found for v in s.wrong]
    assert not wrong, "\n".join(wrong)
    missing = [s.name for s in found if not s.routes and s.name not in NEVER_RIGHT]
    assert not missing, f"nothing was right, and nothing wrong: {missing}"


@pytest.mark.parametrize("deck", range(OPERATOR_DECKS))
def test_operators(deck: int, record_property: Record) -> None:
    dealt = operators.operators()[deck::OPERATOR_DECKS]
    found = [survey(operators.label(op), operators.cases(op, OPERATOR_SAMPLES)) for op in dealt]
    settle(found, "operators", record_property)
    for subject in found:
        compared = subject.routes["loop"] > 0 or subject.name in NEVER_RIGHT
        assert compared, f"{subject.name} was not compared node by node"


@pytest.mark.parametrize("deck", range(MODULE_DECKS))
def test_modules(deck: int, record_property: Record) -> None:
    dealt = modules.modules()[deck::MODULE_DECKS]
    found = [survey(info.name, modules.cases(info, MODULE_SAMPLES)) for info in dealt]
    settle(found, "modules", record_property)


def test_nothing_has_left_the_databases() -> None:
    names = [operators.label(op) for op in operators.operators()]
    layers = [info.name for info in modules.modules()]
    assert len(names) == len(set(names)) >= 540
    assert len(layers) == len(set(layers)) >= 114
    assert set(names) | set(layers) >= set(NEVER_RIGHT)


def cells(page: str) -> list[list[str]]:
    """The rows of every table on the page."""
    lines = (line for line in page.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def wrong_on(page: str) -> dict[str, str]:
    """Every row that says of anything that it is wrong, in the overview or in a table."""
    rows = cells(page)
    column = rows[0].index("wrong")
    counted = {row[0]: row[column] for row in rows[2:5] if row[column] != "0"}
    return counted | {row[0]: cell for row in rows for cell in row if "**wrong" in cell}


def test_the_page_has_all_of_them_and_nothing_wrong() -> None:
    page = PAGE.read_text()
    assert [row[0] for row in cells(page)[2:5]] == ["operators", "modules", "architectures"]
    assert wrong_on(page) == {}, "an answer on the page is wrong"
    rows = {row[0] for row in cells(page)}
    assert {operators.label(op) for op in operators.operators()} <= rows, "run make docs"
    assert {info.name for info in modules.modules()} <= rows, "run make docs"


@pytest.mark.parametrize("where", [0, 1, 2], ids=["an operator", "a module", "an architecture"])
@pytest.mark.parametrize("refused", [{}, {"CouplingError": 2}], ids=["alone", "beside an error"])
def test_a_wrong_answer_is_seen_on_the_page(where: int, refused: dict[str, int]) -> None:
    good = [Subject(name, outcomes=Counter(right=3)) for name in ("add", "Linear", "graphs")]
    assert wrong_on(report.page({"math": good[:1]}, good[1:2], good[2:])) == {}
    bad = list(good)
    bad[where] = replace(good[where], outcomes=Counter(right=2, wrong=1), refused=Counter(refused))
    found = wrong_on(report.page({"math": bad[:1]}, bad[1:2], bad[2:]))
    what = ("operators", "modules", "architectures")[where]
    assert found.keys() == {what, bad[where].name}


def square(x: torch.Tensor) -> torch.Tensor:
    return x**2


def case(f: Callable[..., Any] = square, **options: Any) -> Case:
    x = torch.arange(1.0, 7, dtype=torch.float64).reshape(3, 2)
    return Case("square", "batch", "[3, 2]", lambda: (f, (x,)), options)


def change_answers(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    truth = batchjac.jacobian

    def changed(*args: Any, **options: Any) -> Any:
        return tuple(change(j) for j in truth(*args, **options))

    monkeypatch.setattr(batchjac, "jacobian", changed)


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(case()).outcome == "right"
    change_answers(monkeypatch, lambda j: j + 1e-6)
    verdict = judge(case())
    assert (verdict.outcome, verdict.case.name) == ("wrong", "square")
    assert "at (" in verdict.detail
    found = survey("square", [case(), case()])
    assert count("operators", [found]) == "operators 0 right, 0 documented errors, 1 wrong"
    with pytest.raises(AssertionError, match="square"):
        settle([found], "operators", lambda key, value: None)


def test_an_answer_that_autograd_had_to_correct_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = batchjac.jacobian

    def corrected(*args: Any, **options: Any) -> Any:
        logging.getLogger("batchjac").warning("the walk and autograd disagree on this function")
        return truth(*args, **options)

    monkeypatch.setattr(batchjac, "jacobian", corrected)
    assert judge(case()).outcome == "wrong"


def test_errors_count_only_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judge(case(lambda x: x.sum()))
    assert (verdict.outcome, verdict.error) == ("documented error", "BatchAxisError")
    assert judge(case(lambda x: x.softmax(0))).error == "CouplingError"

    def broken(*args: Any, **options: Any) -> Any:
        raise batchjac.errors.CouplingError("there is none")

    monkeypatch.setattr(batchjac, "jacobian", broken)
    assert judge(case()).outcome == "wrong"
    assert judge(case(lambda x: x.sum())).outcome == "wrong"


def test_a_difference_is_put_in_words() -> None:
    a = torch.zeros(2, 3, dtype=torch.float64)
    b = a.clone()
    b[1, 2] = 1
    assert "at (1, 2) 0.0, reference: 1.0" in difference(a, b)
    b[1, 2] = torch.nan
    assert "at (1, 2)" in difference(a, b)
    assert difference(b, b) == ""
    assert "nested" in difference((a,), a)
    assert "float32" in difference(a.float(), a)
    assert "None" in difference(None, a)


def test_the_second_derivative_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(case(create_graph=True)).outcome == "right"
    change_answers(monkeypatch, torch.Tensor.detach)
    assert judge(case(create_graph=True)).outcome == "wrong"
    assert judge(case()).outcome == "right"
