"""The examples run, in small, and each shows what it claims."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import batchjac
from batchjac.engines import reference
from examples import flow_on_moons, inverse_in_training, robust_digits

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def drawn(folder: Path) -> list[str]:
    """Pictures that are more than an empty frame."""
    return [p.name for p in folder.glob("*.png") if p.stat().st_size > 20_000]


def test_the_inverse_of_a_batch_trains_as_the_loop_does_and_faster(tmp_path: Path) -> None:
    net, ours, loop = inverse_in_training.main(tmp_path, quick=True)
    assert ours.losses[-1] < ours.losses[0] / 10
    assert loop.losses == pytest.approx(ours.losses[: len(loop.losses)], rel=1e-4)
    assert loop.per_step > 2 * ours.per_step  # 10 to 70 times were measured
    x = inverse_in_training.draw(8, torch.Generator().manual_seed(0))
    away = batchjac.jacobian(net.block1, x) - torch.eye(2)
    assert away.flatten(1).norm(dim=1).min() > 0.1  # what is inverted is no identity
    assert inverse_in_training.largest_difference(net, x) < 1e-12
    assert drawn(tmp_path) == ["inverse_in_training.png"]


def test_the_flow_learns_the_moons(tmp_path: Path) -> None:
    found = flow_on_moons.main(tmp_path, quick=True)
    assert found.gaussian == pytest.approx(-1.90, abs=0.02)
    assert found.gaussian + 0.3 < found.flow < found.truth
    assert drawn(tmp_path) == ["flow_on_moons.png"]


def test_the_flow_is_a_density_and_its_samples_are_of_it() -> None:
    model = flow_on_moons.flow(3, 8)
    for layer in model.children():
        nn.init.constant_(layer.weight, -2)  # type: ignore[arg-type]  # all layers are Gradient
    across = torch.linspace(-5, 5, 501)
    nats = flow_on_moons.log_likelihood(model, torch.cartesian_prod(across, across))
    assert nats.exp().sum().item() * 0.02**2 == pytest.approx(1, abs=1e-3)
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(flow_on_moons.sample(model, 50)), z, rtol=1e-4, atol=1e-4)


def test_a_small_jacobian_reads_digits_through_noise(tmp_path: Path) -> None:
    found = robust_digits.main(tmp_path, quick=True)
    noisy = robust_digits.NOISES.index(0.4)
    assert found.steady[:, noisy].mean() > found.plain[:, noisy].mean() + 0.05
    assert found.steady[:, 0].min() > 0.93
    assert found.steady_norm.mean() < found.plain_norm.mean() / 2
    assert drawn(tmp_path) == ["robust_digits.png"]


def test_the_penalty_is_the_exact_norm() -> None:
    data = robust_digits.digits()
    x, labels = data.images[:6], data.labels[:6]
    model = robust_digits.network(0)
    plain, with_it = (robust_digits.loss_of(model, x, labels, p).item() for p in (0.0, 0.5))
    truth = reference.jacobian(model, x).square().sum() / 6
    assert with_it - plain == pytest.approx(0.25 * truth.item(), rel=1e-4)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_is_a_short_script_that_says_how_to_run_it(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert f"python examples/{example.name} --out runs/examples" in text
    done = subprocess.run(
        [sys.executable, str(example), "--help"], capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert "--quick" in done.stdout
    assert "--out" in done.stdout
