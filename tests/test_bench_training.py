"""The benchmark of training steps, on so few samples that no figure means anything."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training_table
from benchmarks.page import page
from benchmarks.steps import BOUNDED, JAX, OURS, STEPS, WAYS, Step, row_loop, trained
from benchmarks.training import off, truth

HERE = [way for way in WAYS if way != JAX or find_spec("jax")]


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.name)
@pytest.mark.parametrize("way", HERE)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # inside torch's jacfwd
def test_every_way_takes_the_same_step(way: str, step: Step) -> None:
    model, x = step.make(5)
    assert off(WAYS[way](step, model, x)(), truth(step, 5)) < 1e-5


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.name)
def test_a_step_by_another_loss_or_gradient_is_seen(step: Step) -> None:
    model, x = step.make(5)
    loss, gradients = trained(row_loop)(step, model, x)()
    expected = truth(step, 5)
    assert off((loss, gradients), expected) < 1e-5
    assert off((loss * 1.01, gradients), expected) == pytest.approx(0.01, rel=0.1)
    wrong = [*gradients[:-2], gradients[-2] * 1.02, gradients[-1]]
    assert off((loss, wrong), expected) == pytest.approx(0.02, rel=0.1)


def test_the_blocks_can_be_inverted_in_float32() -> None:
    for step in STEPS:
        model, x = step.make(64)
        conditions = torch.linalg.cond(row_loop(model, x)[1])
        assert conditions.max() < 100


def test_a_run_measures_and_checks(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", "--quick", "--only", "flow", "--ways",
         f"{OURS};vmap(jacrev)", "--out", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    (found,) = data["steps"]
    assert list(found["ways"]) == [OURS, "vmap(jacrev)"]
    for cell in found["ways"].values():
        assert len(cell["times"]) == 2
        for samples in ("12", "48"):
            assert cell[samples]["off"] < 1e-4
            assert cell[samples]["seconds"] > 0
            assert cell[samples]["peak"] is None or cell[samples]["peak"] >= 0
    assert "the best PyTorch way (vmap(jacrev))" in done.stdout
    assert "nan" not in done.stdout


def cell(seconds: float, peak: int) -> dict[str, Any]:
    alone = {"peak": peak << 20, "seconds": 16 * seconds, "off": 1e-6}
    return {"12": alone, "48": {**alone, "peak": peak << 22}, "times": [seconds] * 3,
            "median": seconds}  # fmt: skip


def stored() -> dict[str, Any]:
    """One step in which all is met, one in which nothing is, and ways that failed."""
    failed = {"12": {"failed": "too large"}, "48": {"failed": "RuntimeError: boom"}}
    good = {OURS: cell(0.01, 50), BOUNDED: cell(0.02, 10), "row loop": cell(0.04, 50),
            "vmap(jacrev)": cell(0.031, 60), JAX: cell(0.011, 90)}  # fmt: skip
    bad = {OURS: cell(0.01, 50), BOUNDED: cell(0.02, 20), "row loop": cell(0.02, 50),
           "sum trick": failed, JAX: cell(0.009, 90)}  # fmt: skip
    steps = [
        {"step": name, "of": "inverse", "budget": 64 << 20, "ways": ways}
        for name, ways in (("good, 2", good), ("bad, 2", bad))
    ]
    environment = {"threads": 2, "processor": "a processor"}
    return {"environment": environment, "timed": 12, "large": 48, "steps": steps}


def test_leads_say_what_was_met() -> None:
    data = stored()
    good, bad = (training_table.leads(step, data) for step in data["steps"])
    assert good == [
        "- 3.10× as fast as the best PyTorch way (vmap(jacrev)); aimed at 3×: met.",
        "- 1.10× as fast as JAX; aimed at 1×: met.",
        "- 5.00× less memory with `max_memory` than the leanest PyTorch way (row loop); "
        "aimed at 4×: met.",
    ]
    assert [line.endswith("**missed**.") for line in bad] == [True] * 3
    assert [line.split("×")[0] for line in bad] == ["- 2.00", "- 0.90", "- 2.50"]


def test_the_page_shows_the_steps(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps(stored()))
    text = page(tmp_path, tmp_path).read_text()
    for words in (
        "## In training", "64 MiB for the good, 64 MiB for the bad", "| too large | too large |",
        "error [1]", "[1] `RuntimeError: boom`", "| vmap(jacrev) | 31.0 | 60.0 | 496 | 240 |",
    ):  # fmt: skip
        assert words in text, words
