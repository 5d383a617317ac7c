"""The benchmark suite's pieces, on cases so small that no figure means anything."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import __main__ as suite
from benchmarks import limit, models, table
from benchmarks.cases import ALL, CASES, FURTHER, POINTS
from benchmarks.measure import Form, off, reference, result, tensor, worth_tuning
from benchmarks.page import page
from benchmarks.translate import forward, to_last
from benchmarks.ways import SAMPLE_LOOP, SEEDS, WAYS, Way

NEEDS = {"TorchJD": "torchjd", "JAX": "jax", "TensorFlow": "tensorflow"}
HERE = [
    way
    for way in (*WAYS, SAMPLE_LOOP)
    if way.name != "TensorFlow" and (way.name not in NEEDS or find_spec(NEEDS[way.name]))
]
TINY = {
    "mlp": (models.mlp(3, 5, 4, activation=nn.Tanh), (3,)),
    "cnn": (models.cnn1d, (1, 24)),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(3, 2, 4, 2, 1)
        ),
        (2, 6, 6),
    ),
}
# JAX compiles for each size and in both modes, which takes the longest for the "cnn"
PAIRS = [(way, name) for way in HERE for name in TINY if (way.name, name) != ("JAX", "cnn")]


def tiny(name: str, samples: int) -> tuple[nn.Module, torch.Tensor]:
    build, shape = TINY[name]
    torch.manual_seed(0)
    return build().eval().requires_grad_(False), torch.randn(samples, *shape)


@pytest.mark.parametrize(("way", "name"), PAIRS, ids=lambda p: p if isinstance(p, str) else p.name)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # inside torch's jacfwd
def test_every_way_gives_the_jacobian(way: Way, name: str) -> None:
    model, x = tiny(name, 5)
    truth = reference(model, x)
    whole = tensor(Form(way.documented(model, x), x, 5)())
    assert whole.shape == truth.shape
    assert off(whole, truth) < 1e-5
    out = torch.full_like(result(model, x), math.nan)
    Form(way.tuned(model, x), x, 2, out)()  # two, two, and the one that is left
    assert off(out, truth) < 1e-5


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (models.encoder_layers(8, 2, 12, 1), (3, 5, 8)),
        (models.Block(8, 2), (3, 5, 8)),
        (models.LastState(4, 6), (3, 5, 4)),
        (nn.Sequential(models.Patches(3, 8, 4, 4), models.TokenMean()), (3, 3, 8, 8)),
        (nn.Sequential(models.Residual(2, 4, 2, normed=True), nn.Flatten()), (3, 2, 8, 8)),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten()),
         (3, 2, 9, 9)),
        (nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2)), nn.Flatten()), (3, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_a_model_written_again_is_the_same_function(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    from benchmarks.in_jax import JaxOps

    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    for norm in (m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)):
        # BatchNorm's buffers may be None without statistics; these have some
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    layer.eval()
    x = torch.randn(shape)
    images = x.ndim == 4
    given = to_last(nn.Sequential(nn.Conv2d(1, 1, 1)) if images else layer, x)
    there = np.asarray(forward(JaxOps(), layer, given))
    with torch.no_grad():
        np.testing.assert_allclose(there, layer(x).numpy(), rtol=2e-4, atol=2e-5)


def test_cases_are_all_there_and_have_names_of_their_own() -> None:
    assert len(CASES) == 9
    assert len(FURTHER) == 8
    assert all(case.targets for case in CASES)
    assert {case.curve for case in POINTS} == {"batch", "outputs", "inputs"}
    assert len({case.name for case in ALL}) == len(ALL)
    assert [way.name for way in SEEDS] == [
        "batchjac", "row loop", "functional.jacobian", "sum trick", "loop over samples",
        "vmap(jacrev)",
    ]  # fmt: skip


def test_only_what_fails_for_its_size_is_tried_in_chunks() -> None:
    row_loop, torchjd = WAYS[1], next(w for w in WAYS if w.name == "TorchJD")
    assert worth_tuning(row_loop, {"median": 1.0})
    assert worth_tuning(row_loop, {"failed": "too large"})
    assert worth_tuning(row_loop, {"failed": "too slow", "estimate": None})
    assert not worth_tuning(row_loop, {"failed": "too slow", "estimate": 90.0})
    assert not worth_tuning(row_loop, {"failed": "RuntimeError: no"})
    assert worth_tuning(torchjd, {"failed": "RuntimeError: no"})


Chain = list[tuple[int, int, int, bool]]


def by_brute_force(chain: Chain) -> int:
    """The cheapest of every order in which the chain can be put together."""
    if len(chain) == 1:
        n, m, macs, linear = chain[0]
        return 0 if linear else min(n, m) * macs
    n, m = chain[0][0], chain[-1][1]
    options = [min(n, m) * sum(c[2] for c in chain)]
    for k in range(1, len(chain)):
        lower, upper = chain[:k], chain[k:]
        down, up = sum(c[2] for c in lower), sum(c[2] for c in upper)
        options += [
            by_brute_force(upper) + m * down,
            by_brute_force(lower) + n * up,
            by_brute_force(upper) + by_brute_force(lower) + m * upper[0][0] * n,
        ]
    return min(options)


def test_the_limit_counts_the_best_order() -> None:
    generator = np.random.default_rng(0)
    for length in (1, 2, 3, 4, 5):
        widths = [int(w) for w in generator.integers(1, 30, length + 1)]
        chain = [
            (a, b, int(generator.integers(1, 500)), bool(generator.integers(2)))
            for a, b in itertools.pairwise(widths)
        ]
        assert limit.fewest(chain) == by_brute_force(chain)
    model, x = models.mlp(64, 16, 2, 16, 64)(), torch.randn(3, 64)
    pure = 64 * (64 * 16 + 16 * 2) * 2
    need = limit.work(model, x)
    assert need["forward_multiply_adds"] == 3 * (64 * 16 + 16 * 2) * 2
    assert need["multiply_adds"] < 3 * pure / 5  # joined at the bottleneck
    assert need["result_bytes"] == 3 * 64 * 64 * 4


CHILDREN = """
import json, os, signal, sys, time
from benchmarks.fresh import in_child
from benchmarks.ways import NotWrittenError

def well(say):
    say({"at": "first"})
    return {"good": 1}

def fails(say):
    raise ValueError("first | line\\nsecond")

def absent(say):
    import there_is_no_such_module

def unwritten(say):
    raise NotWrittenError("Strange")

def full(say):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

def dies(say):
    say({"at": "here"})
    os.kill(os.getpid(), signal.SIGSEGV)

def grows(say):
    held = [bytearray(os.urandom(1 << 20)) * 8 for _ in range(64)]
    time.sleep(5)
    return {"held": len(held)}

def sleeps(say):
    time.sleep(20)
    return {}

print(json.dumps([in_child(f, 64 << 20, 1.0) for f in
                  (well, fails, absent, unwritten, full, dies, grows, sleeps)]))
"""


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_child_that_fails_dies_grows_or_stays_is_an_answer() -> None:
    well, fails, absent, unwritten, full, dies, grows, sleeps = json.loads(python("-c", CHILDREN))
    assert well == [[{"at": "first"}, {"good": 1}], ""]
    assert fails == [[{"failed": "ValueError: first / line"}], "error"]
    assert absent == [[{"failed": "not installed"}], "error"]
    assert unwritten == [[{"failed": "not written"}], "error"]
    assert full == [[{"failed": "too large"}], "error"]
    assert dies == [[{"at": "here"}], "crash: SIGSEGV"]
    assert grows == [[], "too large"]
    assert sleeps == [[], "too slow"]


def test_the_suite_measures_and_checks_a_case(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    said = python(
        "-m", "benchmarks", "--quick", "--only", "square block", "--ways", "batchjac,row loop",
        "--out", str(path),
    )  # fmt: skip
    data = json.loads(path.read_text())
    (found,) = data["results"]
    for forms in found["ways"].values():
        for cell in forms.values():
            assert cell["off"] < 1e-5
            assert cell["median"] > 0
            assert len(cell["times"]) == 2
            assert cell["peak"] is None or cell["peak"] >= 0
    assert found["jacobian"] == [12, 64, 64]
    assert "square block" in said
    assert "nan" not in said


def figures(ours: float, others: dict[str, Any]) -> dict[str, Any]:
    """The forms of every way; a number is seconds, a text or a dict a failure."""

    def cell(value: Any) -> dict[str, Any]:
        if isinstance(value, float):
            times = [value] * 3
            return {"median": value, "times": times, "chunk": 4, "peak": 3 << 20, "off": 1e-6}
        return value if isinstance(value, dict) else {"failed": value}

    ways = {"batchjac": ours, **others}
    return {w: {"documented": cell(v), "tuned": cell(v)} for w, v in ways.items()}


def stored() -> dict[str, Any]:
    """A run as the suite writes it: met, missed, failed in every way there is."""
    rates = {"mm": 4e10, "onednn linear": 1e11, "write": 3e10}
    need = {"multiply_adds": 10**8, "forward_multiply_adds": 10**6, "result_bytes": 10**6}
    shared = {"rates": rates, "need": need, "jacobian": [8, 3, 5], "took": 1.0, "along": 0}
    odd = {
        "row loop": 0.004, "sum trick": "too large", "JAX": math.inf,
        "vmap(jacfwd)": {"failed": "too slow", "estimate": 52.0},
        "vmap(jacrev)": "RuntimeError: boom", "TorchJD": "not installed",
        "TensorFlow": "crash: SIGSEGV",
        "functional.jacobian": {"median": math.nan, "chunk": 4, "peak": None, "once": True},
    }  # fmt: skip
    results = [
        {"case": "fast", "curve": "", "targets": [1.5, 1.0],
         "ways": figures(0.0018, {"row loop": 0.004, "JAX": 0.002}), **shared},
        {"case": "slow", "curve": "", "targets": [4.0, 2.0], "ways": figures(0.004, odd), **shared},
        {"case": "broken", "curve": "", "failed": "CouplingError: no"},
    ]  # fmt: skip
    for curve in ("batch", "outputs", "inputs"):
        for along in (1, 10):
            ways = figures(0.001 * along, {"row loop": 0.002 * along, "JAX": "too large"})
            point = {"case": f"{curve} {along}", "curve": curve, "targets": None, "ways": ways}
            results.append({**shared, **point, "along": along})
    growth = {
        "points": [
            {"way": way, "samples": n, "seconds": n * 1e-5, "peak": 1 << 25, "off": 1e-6,
             "result_bytes": n * 2688}
            for n in (1000, 2000) for way in ("batchjac", "row loop")
        ] + [{"way": "row loop", "samples": 4000, "failed": "too slow"}],
        "loop over samples": {"measured": 10, "seconds_per_sample": 7e-4},
        "budget": 512 << 20, "chunk": 128,
    }  # fmt: skip
    environment = {
        "processor": "a processor", "threads": 2, "vectors": "AVX2", "torch": "2", "python": "3",
        "jax": "0.1", "torchjd": None, "tensorflow-cpu": None, "when": "today", "device": "cpu",
    }  # fmt: skip
    return {"environment": environment, "results": results, "growth": growth}


def test_the_page_is_made_of_the_json_alone_and_never_shows_nan(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(stored()))
    written = page(tmp_path, tmp_path / "docs")
    text = written.read_text()
    shown = text.replace("\n", " ").lower().replace("tensorflow", "")
    assert "nan" not in shown
    assert "inf" not in shown.replace("information", "")
    for words in (
        "too large", "too slow (≈ 52.0 s)", "error [1]", "[1] `RuntimeError: boom`",
        "`CouplingError: no`", "not installed", "crash: SIGSEGV", "no figure", "**missed**",
        "| met |", "- **slow**: 1.00× of the best PyTorch way, aimed at 4×",
        "Not installed in this run: tensorflow-cpu, torchjd", "Not measured",
    ):  # fmt: skip
        assert words in text, words
    assert "- **fast**" not in text
    images = sorted((tmp_path / "docs" / "img").glob("*.png"))
    assert [p.stem for p in images] == [
        "performance-cpu-curves", "performance-cpu-growth", "performance-cpu-ratios"
    ]  # fmt: skip
    assert all(p.stat().st_size > 5000 and f"img/{p.name}" in text for p in images)
    again = page(tmp_path, tmp_path / "docs").read_text()
    assert again == text


def test_what_is_ahead_is_the_faster_form_of_each() -> None:
    fast, slow = table.leads(stored())
    assert fast.ratios == (pytest.approx(0.004 / 0.0018), pytest.approx(0.002 / 0.0018))
    assert fast.share == pytest.approx((1e8 / 1e11 + 1e6 / 3e10) / 0.0018)
    assert not fast.missed
    assert len(slow.missed) == 3


def test_a_run_that_stops_loses_nothing_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "run.json", []
    kept = {r["case"]: r for r in stored()["results"][:2]}

    def job(name: str, *errors: BaseException) -> Any:
        waiting = list(errors)

        def run() -> dict[str, Any]:
            calls.append(name)
            if waiting:
                raise waiting.pop(0)
            return kept.get(name, {**kept["fast"], "case": name})

        return run

    jobs = {
        "fast": job("fast"), "breaks": job("breaks", ValueError("once")),
        "slow": job("slow", KeyboardInterrupt()),
    }  # fmt: skip
    monkeypatch.setattr(suite, "jobs", lambda *_: jobs)
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--out", str(path)])
    half = json.loads(path.read_text())["results"]
    assert [(r["case"], "failed" in r) for r in half] == [("fast", False), ("breaks", True)]
    suite.main(["--out", str(path), "--resume"])
    whole = json.loads(path.read_text())["results"]
    assert {r["case"] for r in whole} == {"fast", "breaks", "slow"}
    assert not any("failed" in r for r in whole)
    assert calls == ["fast", "breaks", "slow", "breaks", "slow"]


def test_a_few_samples_may_be_on_the_other_side_of_a_kink():
    truth = torch.ones(100, 3, 4)
    few, many = truth.clone(), truth.clone()
    few[:2] = 5
    many[:3] = 5
    assert off(few, truth) == 0
    assert off(many, truth) == 4
    assert off(few[:49], truth[:49]) == 4  # one in fifty, and not one in forty-nine
