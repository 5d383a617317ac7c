"""The main job: what it writes, and the parts it is made of."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import batchjac
from batchjac.demo import importance, plots, run, signals
from batchjac.demo.digits import load_digits
from batchjac.demo.extras import NEEDED, MissingExtraError
from batchjac.demo.loops import compare, einsum_of_functional, functional_per_sample
from batchjac.demo.models import LeNet5, SignalNet
from batchjac.demo.summary import axes_in_words
from batchjac.engines import reference


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    run(out, quick=True)
    return out


def summary(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def test_it_writes_pictures_results_and_a_summary(quick: Path) -> None:
    found = summary(quick)
    promised = {*found["digits"]["files"], *found["signals"]["files"]}
    assert {path.name for path in quick.iterdir()} == promised | {"summary.md", "summary.json"}
    for name in ("digits", "signals"):
        result = found[name]
        jacobian = np.load(quick / f"{name}_jacobian.npy", allow_pickle=False)
        assert list(jacobian.shape) == result["shape"]
        assert np.abs(jacobian).max(axis=tuple(range(1, jacobian.ndim))).all()
        assert result["comparison"]["largest_difference"] < 1e-4
        assert result["comparison"]["largest_entry"] > 1e-3
        picture = (quick / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        width, height = (int.from_bytes(picture[k : k + 4], "big") for k in (16, 20))
        assert width > 1000
        assert height > 400


def test_the_summary_says_the_axes_in_words_and_what_is_extrapolated(quick: Path) -> None:
    text = (quick / "summary.md").read_text(encoding="utf-8")
    assert "240 samples × 10 outputs × 1 × 32 × 32 inputs" in text
    assert "2500 samples × 3 outputs × 1 × 224 inputs" in text
    assert text.count("extrapolated") == 2
    loop = summary(quick)["digits"]["comparison"]
    assert loop["seconds_all"] == pytest.approx(loop["seconds"] * 240 / loop["samples"])


def test_importance_is_the_mean_of_what_is_in_the_file(quick: Path) -> None:
    jacobian = np.load(quick / "signals_jacobian.npy", allow_pickle=False)[:, :, 0]
    mean = np.load(quick / "signals_mean.npy", allow_pickle=False)
    size = np.load(quick / "signals_mean_abs.npy", allow_pickle=False)
    np.testing.assert_allclose(mean, jacobian.mean(0, dtype=float), atol=1e-6)
    np.testing.assert_allclose(size, np.abs(jacobian).mean(0, dtype=float), atol=1e-6)
    for o, row in enumerate(summary(quick)["signals"]["by_class"].values()):
        assert row["share"] == pytest.approx(size[o, signals.truth()[o]].sum() / size[o].sum())


def test_the_same_run_gives_the_same_numbers(quick: Path, tmp_path: Path) -> None:
    run(tmp_path, quick=True)
    names = sorted(path.name for path in quick.glob("*.npy"))
    assert names
    for name in names:
        again, first = (np.load(out / name, allow_pickle=False) for out in (tmp_path, quick))
        assert again.dtype == first.dtype
        # To rounding: how the samples are split depends on the memory that is free.
        np.testing.assert_allclose(again, first, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_full_job_finds_what_was_planted(tmp_path: Path) -> None:
    run(tmp_path)
    found = summary(tmp_path)
    digits, planted = found["digits"], found["signals"]
    assert digits["axes"] == "1797 samples × 10 outputs × 1 × 32 × 32 inputs"
    assert planted["axes"] == "20000 samples × 3 outputs × 1 × 224 inputs"
    assert digits["accuracy"] >= 0.97
    assert planted["accuracy"] >= 0.95
    for name, agreement in planted["by_class"].items():
        assert agreement["auc"] > 0.98
        assert agreement["precision"] > 0.9
        assert agreement["share"] > 0.5
        assert planted["by_variance"][name]["auc"] < 0.75
    for result in (digits, planted):
        loop = result["comparison"]
        assert loop["largest_difference"] < 1e-5 * max(1.0, loop["largest_entry"])
    assert_readme_tells_the_same(digits, planted)


def assert_readme_tells_the_same(digits: Any, planted: Any) -> None:
    """Compare with the README's numbers, as far as training on another machine may differ."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    told = text.split("## What the demo shows")[1].split("## ")[0]
    assert digits["axes"] in told
    assert planted["axes"] in told

    def numbers(row: str) -> list[float]:
        (line,) = [line for line in told.splitlines() if line.startswith(f"| {row}")]
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", line.split("|", 2)[2])]

    assert numbers("accuracy") == pytest.approx(
        [100 * digits["accuracy"], 450, 100 * planted["accuracy"], 20000], abs=1.0
    )
    shares = [row["share"] for row in planted["by_class"].values()]
    chances = [row["chance"] for row in planted["by_class"].values()]
    assert numbers("share of abs(J)") == pytest.approx(
        [100 * value for value in shares + chances], abs=5.0
    )
    areas = [row["auc"] for row in planted["by_class"].values()]
    without = [row["auc"] for row in planted["by_variance"].values()]
    assert numbers("ROC AUC of abs(J)") == pytest.approx(areas + without, abs=0.01)


@pytest.mark.parametrize(
    ("model", "shape", "loop"),
    [
        (LeNet5(n_classes=10), (14, 1, 32, 32), einsum_of_functional),
        (SignalNet(), (5, 1, 224), functional_per_sample),
    ],
)
def test_both_loops_and_the_library_agree_with_the_specification(
    model: nn.Module, shape: tuple[int, ...], loop: Any
) -> None:
    model, x = model.double(), torch.rand(shape, dtype=torch.float64)
    ours = batchjac.jacobian(model, x)
    torch.testing.assert_close(ours, reference.jacobian(model, x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours, loop(model, x), rtol=1e-10, atol=1e-12)


def test_a_wrong_jacobian_shows_in_the_comparison() -> None:
    model, x = nn.Linear(4, 3), torch.rand(20, 4)
    ours = model.weight.detach().expand(20, 3, 4).clone()
    right = compare(functional_per_sample, "loop", model, x, ours, samples=10)
    assert right.largest_difference == 0
    assert right.samples == 10
    assert right.largest_entry == pytest.approx(float(model.weight.detach().abs().max()))
    ours[7, 1, 2] += 0.5
    wrong = compare(functional_per_sample, "loop", model, x, ours, samples=10)
    assert wrong.largest_difference == pytest.approx(0.5)


def test_digits_are_split_and_resized() -> None:
    digits = load_digits()
    assert digits.x.shape == (1797, 1, 32, 32)
    assert 0 <= digits.x.min() < digits.x.max() <= 1
    both = torch.cat([digits.train, digits.test]).sort().values
    assert torch.equal(both, torch.arange(1797))
    counts = digits.labels[digits.test].bincount()
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 3


def test_a_class_changes_its_own_window_and_nothing_else() -> None:
    shapes, true = signals.packets(), signals.truth()
    for label in range(signals.BLANK):
        assert not shapes[:, label, ~true[label]].any()
        assert shapes[:, label, true[label]].any(axis=0).all()
    assert not shapes[:, signals.BLANK].any()
    assert (true.sum(axis=0) <= 1).all()
    assert not any(true[:, start:stop].any() for start, stop in signals.PEAKS)

    drawn = signals.make_signals(3000, seed=5, blanks=0.25)
    x, labels = drawn.x[:, 0].double(), drawn.labels
    for label in range(signals.BLANK):
        gap = (x[labels == label].mean(0) - x[labels == signals.BLANK].mean(0)).abs().numpy()
        assert gap[true[label]].max() > 4 * gap[~true[label]].max()


def test_agreement_of_a_perfect_and_a_reversed_ranking() -> None:
    true = np.array([True, True, False, False, False])
    perfect = importance.agreement(np.array([5.0, 4.0, 1.0, 0.5, 0.0]), true)
    assert (perfect.precision, perfect.auc, perfect.chance) == (1, 1, 0.4)
    reversed_ = importance.agreement(np.array([0.0, 0.5, 1.0, 4.0, 5.0]), true)
    assert (reversed_.precision, reversed_.auc) == (0, 0)
    assert importance.agreement(np.ones(5), true).auc == 0.5


def test_roc_auc_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    score, true = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.4
    assert importance.roc_auc(score, true) == pytest.approx(roc_auc_score(true, score))


def test_maps_share_one_symmetric_scale_on_which_zero_is_white() -> None:
    jacobian = torch.randn(3, 10, 1, 32, 32)
    jacobian[:, :, :, 0, 0] = 0
    figure = plots.digit_maps(
        torch.rand(3, 1, 32, 32), jacobian, torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    )
    maps = [image for axis in figure.axes for image in axis.images if image.get_cmap().N > 0]
    maps = [image for image in maps if image.get_cmap().name != "gray_r"]
    assert len(maps) == 30
    limits = {image.get_clim() for image in maps}
    assert len(limits) == 1
    low, high = limits.pop()
    assert low == -high < 0
    image = maps[0]
    red, green, blue, _ = image.cmap(image.norm(high))
    assert red > 2 * max(green, blue)
    assert min(image.cmap(image.norm(0.0))[:3]) > 0.98
    red, green, blue, _ = image.cmap(image.norm(low))
    assert blue > 2 * red


def test_axes_in_words() -> None:
    assert axes_in_words((20000, 3, 1, 224)) == "20000 samples × 3 outputs × 1 × 224 inputs"


@pytest.mark.parametrize("module", NEEDED)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r'pip install "batchjac\[demo\]"') as caught:
        run(tmp_path / "out")
    assert NEEDED[module] in str(caught.value)
    assert isinstance(caught.value, batchjac.errors.BatchjacError | ModuleNotFoundError)
    assert not (tmp_path / "out").exists()


def test_importing_the_demo_loads_neither_plots_nor_data() -> None:
    code = (
        "import sys, batchjac.demo, batchjac.demo.models\n"
        "print([m for m in ('sklearn', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
