"""The benchmark that compares predicted times with measured ones, and what it calls a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import prediction
from benchmarks.prediction import Line


def line(predicted: float = 5.0, measured: float = 5.0, **modes: float) -> Line:
    return Line("some", 3, predicted, measured, 10.0, modes)


@pytest.mark.parametrize(
    ("one", "holds"),
    [
        (line(), True),
        (line(predicted=9.9), True),
        (line(predicted=10.1), False),
        (line(predicted=2.6), True),
        (line(predicted=2.4), False),
        (line(reverse=12.0, mixed=8.5), True),
        (line(reverse=12.0, mixed=8.2), False),
    ],
)
def test_what_holds(one: Line, holds: bool) -> None:
    assert one.holds == holds
    assert ("off" in prediction.row(one)) != holds


def test_the_mode_that_would_have_won_is_named() -> None:
    assert "0.82 (mixed)" in prediction.row(line(reverse=12.0, mixed=8.2))
    assert "(" not in prediction.row(line())


@pytest.mark.parametrize("factor", [1.0, 1e9])
def test_a_run_writes_its_figures_and_says_whether_they_hold(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
) -> None:
    monkeypatch.setattr(prediction, "FACTOR", factor)
    monkeypatch.setattr(prediction, "SLOWER", 1e9)
    out = tmp_path / "prediction.json"
    code = prediction.main(["--only", "square block", "--out", str(out)])
    (case,) = json.loads(out.read_text())["cases"]
    assert case["case"] == "square block"
    assert case["modes"].keys() <= {"reverse", "forward", "mixed"}
    assert case["measured"] < case["whole"]  # the forward is not what was predicted
    assert code == (0 if case["holds"] else 1) == (1 if factor == 1.0 else 0)
    assert "beside the function's own forward" in capsys.readouterr().out
