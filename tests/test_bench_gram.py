"""The benchmark of norms and Grams, on so few samples that no figure means anything."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gram, gram_table
from benchmarks.gram import WAYS, Case, Way
from benchmarks.page import page

PACKAGES = {"TorchJD": "torchjd", "nngeometry": "nngeometry", "BackPACK": "backpack"}
TINY = Case(
    "tiny", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (5, 4)
)  # fmt: skip
PAIRS = [
    pytest.param(figure, way, id=f"{figure}, {way.name}")
    for figure, ways in WAYS.items()
    for way in ways
    if way.name not in PACKAGES or find_spec(PACKAGES[way.name])
]


def said(_: dict[str, Any]) -> None:
    """What a child would tell its parent."""


@pytest.mark.parametrize(("figure", "way"), PAIRS)
def test_every_way_gives_the_figures_of_dense_rows(figure: str, way: Way) -> None:
    cell = gram.alone(TINY, figure, way, said)
    assert "failed" not in cell
    assert cell["off"] < 1e-5
    assert cell["first"] > 0
    model, x = TINY.make()
    shape = (5,) if figure == "norm" else (5, 3, 5, 3)
    assert way.make(model, x)().shape == shape


@pytest.mark.parametrize("figure", WAYS)
def test_a_way_that_is_wrong_is_seen(figure: str) -> None:
    ours = WAYS[figure][0]
    wrong = Way("wrong", lambda model, x: lambda: 1.01 * ours.make(model, x)())
    assert gram.alone(TINY, figure, wrong, said)["failed"] == "wrong: off by 0.01"


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "LIMIT", 100)
    dense = Way("dense", gram.dense_kernel, dense=True)
    assert gram.alone(TINY, "kernel", dense, said)["failed"] == "too large"


def test_ways_take_turns() -> None:
    came: list[str] = []

    def named(name: str) -> Way:
        return Way(name, lambda model, x: lambda: came.append(name) or torch.zeros(()))

    times = gram.turns(TINY, "norm", [named("a"), named("b")], 3, said)
    assert came == ["a", "b", *("a", "b"), *("b", "a"), *("a", "b")]  # a warm-up, then turns
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def stored() -> dict[str, Any]:
    """A case in which a peer is slower, and one in which all peers failed."""

    def cell(seconds: float, mebibytes: int) -> dict[str, Any]:
        return {"peak": mebibytes << 20, "median": seconds, "times": [seconds] * 3}

    rows = [
        {"case": "small", "figure": "kernel", "shape": [5, 4], "ways": {
            "batchjac": cell(0.01, 20), "slow": cell(0.05, 80), "fast": cell(0.03, 10)}},
        {"case": "large", "figure": "kernel", "shape": [50, 4], "ways": {
            "batchjac": cell(0.2, 40), "slow": {"failed": "ValueError: boom"},
            "fast": {"failed": "too slow"}}},
        {"case": "small", "figure": "norm", "shape": [5, 4], "ways": {
            "batchjac": {"failed": "crash: SIGSEGV"}, "slow": {"peak": 1 << 20},
            "fast": cell(0.01, 5)}},
    ]  # fmt: skip
    environment = {"processor": "a processor", "threads": 1, "torch": "2"}
    return {"environment": environment, "rows": rows}


def test_a_line_says_every_way() -> None:
    small, large, norm = (gram.line(row) for row in stored()["rows"])
    assert "batchjac 0.01 s (1.0x) 20 MiB | slow 0.05 s (5.0x) 80 MiB | fast 0.03 s (3.0x)" in small
    assert "slow: ValueError: boom | fast: too slow" in large
    assert "batchjac: crash: SIGSEGV | slow: not timed | fast 0.01 s 5 MiB" in norm


def test_leads_are_by_the_fastest_other_way() -> None:
    assert [gram_table.lead(row) for row in stored()["rows"]] == [
        "- kernel, small: 3.00× as fast as the fastest other way (fast), with 2.00× its memory.",
        "", "",
    ]  # fmt: skip


def test_the_page_shows_the_figures(tmp_path: Path) -> None:
    (tmp_path / "gram.json").write_text(json.dumps(stored()))
    text = page(tmp_path, tmp_path).read_text()
    for words in (
        "## Norms and Grams toward parameters", "a processor, threads: 1, torch 2",
        "10 outputs: small 5×4, large 50×4.", "| kernel | small, ms | peak, MiB | large, ms |",
        "| slow | 50.0 (5.00×) | 80.0 | error [1] | error [1] |", "[1] `ValueError: boom`",
        "| fast | 30.0 (3.00×) | 10.0 | too slow | too slow |", "- kernel, small: 3.00× as fast",
        "| batchjac | crash: SIGSEGV | crash: SIGSEGV |", "| slow | not timed | 1.0 |",
        "| fast | 10.0 | 5.0 |",
    ):  # fmt: skip
        assert words in text, words
    assert "nan" not in text
