"""Digits read through noise, by a network whose Jacobian was kept small.

How far a score moves when the image does is the Jacobian of the scores by the pixels. Adding its
squared Frobenius norm to the loss of the training,

    cross entropy + λ/2 mean |J|²,

keeps it small, and so the network steady under noise (Hoffman, Roberts and Yaida, 2019,
arXiv 1908.02729, who estimate the norm by random projections; here it is exact).

    python examples/robust_digits.py --out runs/examples
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import batchjac

NOISES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Standard deviations, where a pixel goes from 0, white, to 1, black."""
PENALTY = 0.01
GREY, RED = "#4d4d4d", "#c1272d"


@dataclass(frozen=True)
class Digits:
    """Real handwritten digits, images ``[N, 1, 8, 8]`` from 0 to 1."""

    images: Tensor
    labels: Tensor
    new_images: Tensor
    new_labels: Tensor


def digits() -> Digits:
    """Three quarters to train on, the rest to test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    x, new_x = (torch.tensor(p, dtype=torch.float32).view(-1, 1, 8, 8) for p in parts[:2])
    return Digits(x, torch.tensor(parts[2]), new_x, torch.tensor(parts[3]))


def network(seed: int) -> nn.Module:
    """Two convolutions and two linear layers, 38,000 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip


def loss_of(model: nn.Module, x: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Cross entropy, and the Jacobian's squared norm unless the penalty is zero."""
    if penalty == 0:
        return functional.cross_entropy(model(x), labels)
    scores, jacobian = batchjac.value_and_jacobian(model, x, create_graph=True)
    size = jacobian.square().flatten(1).sum(1).mean()
    return functional.cross_entropy(scores, labels) + penalty / 2 * size


def train(data: Digits, seed: int, penalty: float, epochs: int) -> nn.Module:
    """Adam from the same beginning, in the same order, with and without the penalty."""
    model, order = network(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(data.images), generator=order).split(64):
            optimizer.zero_grad()
            loss_of(model, data.images[index], data.labels[index], penalty).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracies(model: nn.Module, data: Digits, repeats: int = 10) -> Tensor:
    """Share of new digits read correctly at each of `NOISES`, the mean over draws of noise."""
    generator, found = torch.Generator().manual_seed(0), []
    for noise in NOISES:
        right = 0.0
        for _ in range(repeats):
            shaken = data.new_images + noise * torch.randn(data.new_images.shape,
                                                           generator=generator)  # fmt: skip
            right += (model(shaken).argmax(1) == data.new_labels).float().mean().item()
        found.append(right / repeats)
    return torch.tensor(found)


@dataclass(frozen=True)
class Found:
    """Accuracies ``[seeds, noises]`` and mean norms of the Jacobian ``[seeds]``, of both."""

    plain: Tensor
    steady: Tensor
    plain_norm: Tensor
    steady_norm: Tensor


def compare(data: Digits, seeds: int, epochs: int) -> tuple[Found, nn.Module, nn.Module]:
    """Train both for every seed; the last two networks are kept for the picture."""
    rows: dict[float, list[Tensor]] = {0.0: [], PENALTY: []}
    norms: dict[float, list[Tensor]] = {0.0: [], PENALTY: []}
    models = {}
    for seed in range(seeds):
        for penalty in rows:
            start = time.perf_counter()
            model = models[penalty] = train(data, seed, penalty, epochs)
            seconds = time.perf_counter() - start
            rows[penalty].append(accuracies(model, data))
            jacobian = batchjac.jacobian(model, data.new_images)
            norms[penalty].append(jacobian.flatten(1).norm(dim=1).mean())
            print(f"seed {seed}, λ = {penalty:<4}: {seconds:.0f} s, accuracy "
                  + " ".join(f"{a:.3f}" for a in rows[penalty][-1].tolist()))  # fmt: skip
    found = [torch.stack(part[p]) for part in (rows, norms) for p in (0.0, PENALTY)]
    return Found(*found), models[0.0], models[PENALTY]


def draw_figure(found: Found, data: Digits, plain: nn.Module, steady: nn.Module) -> Figure:
    """Accuracy by noise, and how each pixel of four digits moves the score of its own class."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 0.95))
    accuracy_plot(left.subplots(), found)
    chosen = [int((data.new_labels == digit).nonzero()[0]) for digit in (0, 3, 5, 8)]
    x, labels = data.new_images[chosen], data.new_labels[chosen]
    noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    maps = [batchjac.jacobian(model, x, outputs=labels) for model in (plain, steady)]
    rows = (
        (x, "the digit", "gray_r", 0.0, 1.0),
        (noisy, "noise 0.3", "gray_r", 0.0, 1.0),
        *((m, f"∂ score / ∂ pixel\n{name}", "RdBu_r", -most, most)
          for m, name, most in zip(maps, ("without", "with"), 2 * [float(maps[0].abs().max())],
                                   strict=True)),
    )  # fmt: skip
    for line, (images, name, colours, low, high) in zip(right.subplots(4, 4), rows, strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image[0].numpy(), cmap=colours, vmin=low, vmax=high)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def accuracy_plot(axes: Axes, found: Found) -> None:
    """The mean over seeds, in a band from the worst to the best."""
    for values, norm, name, colour in (
        (found.steady, found.steady_norm, f"with λ = {PENALTY}", RED),
        (found.plain, found.plain_norm, "without", GREY),
    ):
        label = f"{name}: mean |J| = {norm.mean():.1f}"
        axes.plot(NOISES, 100 * values.mean(0), "o-", color=colour, ms=4, label=label)
        low, high = 100 * values.amin(0), 100 * values.amax(0)
        axes.fill_between(NOISES, low, high, color=colour, alpha=0.2, lw=0)
    axes.set(xlabel="standard deviation of the noise (black is 1)", ylabel="read correctly, %",
             title=f"450 new digits; bands: worst to best of {len(found.plain)} seeds")  # fmt: skip
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def main(out: Path, quick: bool = False) -> Found:
    """Train both ways for several seeds, measure under noise, and draw."""
    seeds, epochs = (1, 15) if quick else (5, 30)
    data = digits()
    found, plain, steady = compare(data, seeds, epochs)
    for name, values in (("without", found.plain), (f"with λ = {PENALTY}", found.steady)):
        clean, noisy = values[:, 0], values[:, NOISES.index(0.3)]
        print(
            f"{name}: {clean.mean():.1%} of the clean digits read correctly, "
            f"{noisy.mean():.1%} at noise 0.3 ({noisy.min():.1%} to {noisy.max():.1%} by seed)"
        )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "robust_digits.png"
    draw_figure(found, data, plain, steady).savefig(path, dpi=100)
    print(f"see {path}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
