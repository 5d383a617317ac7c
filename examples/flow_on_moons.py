"""A normalising flow trained by the exact log-determinant of its Jacobian.

A flow is a network ``z = f(x)`` that has an inverse. If z is standard normal, x has the density

    log p(x) = log N(f(x); 0, 1) + log |det J(x)|,        J = ∂f/∂x,

and training maximises it (Rezende and Mohamed, 2015). Most flows are built so that J is triangular,
which makes its determinant cheap. Here it is full and the determinant exact: each layer is the
gradient of a convex function, so that it has an inverse whatever its weights are (convex potential
flows, Huang et al., 2021). The same Jacobians solve f(x) = z for samples, by Newton's method.

    python examples/flow_on_moons.py --out runs/examples
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional

import batchjac
from batchjac import linalg

NOISE = 0.1


class Gradient(nn.Module):
    """The gradient of a convex function: ``a x + Wᵀ (c * tanh(W x + b)) + d``, with a, c > 0.

    Its Jacobian ``a + Wᵀ diag(c * tanh') W`` is symmetric and positive definite.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2, width)
        nn.init.normal_(self.inner.weight)
        self.scale = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.full((width,), -3.0))
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.softplus(self.weight) * self.inner(x).tanh()
        return self.scale.exp() * x + hidden @ self.inner.weight + self.shift


def flow(layers: int, width: int) -> nn.Module:
    """Layers one after the other: no gradient any more, its Jacobian no longer symmetric."""
    torch.manual_seed(0)
    return nn.Sequential(*(Gradient(width) for _ in range(layers)))


def log_likelihood(model: nn.Module, x: Tensor) -> Tensor:
    """Nats of every sample, ``[N]``."""
    z, jacobian = batchjac.value_and_jacobian(model, x, create_graph=True)
    base = MultivariateNormal(torch.zeros(2), torch.eye(2))
    return base.log_prob(z) + linalg.slogdet(jacobian).logabsdet


def moons(samples: int, seed: int) -> Tensor:
    """Two half circles that clasp each other, ``[samples, 2]``."""
    x, _ = make_moons(samples, noise=NOISE, random_state=seed)
    return torch.tensor(x, dtype=torch.float32)


def train(model: nn.Module, steps: int, batch: int) -> list[float]:
    """Fit by Adam to fresh samples at every step; the mean log-likelihood of each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data, found = moons(20_000, seed=0), []
    for step in range(steps):
        x = data[torch.arange(step * batch, (step + 1) * batch) % len(data)]
        mean = log_likelihood(model, x).mean()
        optimizer.zero_grad()
        (-mean).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        found.append(mean.item())
    return found


def sample(model: nn.Module, samples: int) -> Tensor:
    """Draw z and solve ``f(x) = z``, one layer after the other from the last to the first."""
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(2))
    for layer in reversed(list(model.children())):
        x = solve(layer, x)
    return x


def solve(layer: nn.Module, z: Tensor, iterations: int = 50) -> Tensor:
    """Newton's method for ``layer(x) = z``; a step that does not help is halved."""
    x, length = torch.zeros_like(z), torch.ones(len(z), 1)
    with torch.no_grad():
        for _ in range(iterations):
            y, jacobian = batchjac.value_and_jacobian(layer, x)
            step = linalg.solve(jacobian, z - y)
            nearer = (z - layer(x + length * step)).norm(dim=1) < (z - y).norm(dim=1)
            x = torch.where(nearer[:, None], x + length * step, x)
            length = torch.where(nearer[:, None], (2 * length).clamp_max(1), length / 2)
    return x


def gaussian(x: Tensor, seen: Tensor) -> Tensor:
    """Nats of every sample under the Gaussian with the mean and covariance of ``seen``."""
    return MultivariateNormal(seen.mean(0), seen.T.cov()).log_prob(x)


def truth(x: Tensor) -> Tensor:
    """Nats under what made the data: a Gaussian of width `NOISE` about every point of the arcs."""
    arcs, _ = make_moons(2000, noise=None)
    centres = torch.tensor(arcs, dtype=torch.float32)
    apart = torch.cdist(x, centres).square() / (2 * NOISE**2)
    volume = torch.tensor(2 * torch.pi * NOISE**2 * len(centres)).log()
    return (-apart).logsumexp(1) - volume


@dataclass(frozen=True)
class Found:
    """Mean nats on samples that no training saw."""

    flow: float
    gaussian: float
    truth: float


def draw_figure(model: nn.Module, drawn: Tensor, curve: list[float], found: Found) -> Figure:
    """The data, the flow's samples and its density, and the training beside both bounds."""
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    data, samples, density, training = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.9))
    for axes, points, title in ((data, moons(len(drawn), seed=3), "data"), (samples, drawn,
                                "samples of the flow")):  # fmt: skip
        axes.plot(*points.T, ".", color="#1f6fb2", ms=2, alpha=0.6)
        square(axes, title)
    across, up = torch.linspace(-1.75, 2.75, 180), torch.linspace(-1.25, 1.75, 120)
    grid = torch.cartesian_prod(across, up)
    nats = log_likelihood(model, grid).detach().unflatten(0, (180, 120)).T
    density.pcolormesh(
        across.numpy(), up.numpy(), nats.exp().numpy(), cmap="Blues", rasterized=True
    )
    square(density, "density of the flow")
    training.plot(smooth(curve), color="#c1272d", lw=1.2, label="the flow, in training")
    for value, name, style in (
        (found.truth, "what made the data", "--"),
        (found.gaussian, "a Gaussian", ":"),
    ):
        training.axhline(value, color="black", ls=style, lw=1, label=f"{name}: {value:.2f}")
    training.set(title=f"on new data: {found.flow:.2f} nats", xlabel="step",
                 ylabel="mean log-likelihood, nats")  # fmt: skip
    training.set_ylim(found.gaussian - 0.5, found.truth + 0.3)
    training.legend(frameon=False, fontsize=9)
    training.spines[["top", "right"]].set_visible(False)
    return figure


def smooth(curve: list[float], window: int = 80) -> Tensor:
    """Means of neighbouring steps."""
    return torch.tensor(curve).unfold(0, min(window, len(curve)), 1).mean(1)


def square(axes: Axes, title: str) -> None:
    """The same frame for data, samples and density."""
    axes.set(title=title, xlim=(-1.75, 2.75), ylim=(-1.25, 1.75), aspect="equal")


def main(out: Path, quick: bool = False) -> Found:
    """Train, measure, sample and draw."""
    steps, layers, width = (300, 4, 32) if quick else (3000, 8, 32)
    model, start = flow(layers, width), time.perf_counter()
    curve = train(model, steps, batch=256)
    seconds = time.perf_counter() - start
    new = moons(5000, seed=1)
    found = Found(
        flow=log_likelihood(model, new).mean().item(),
        gaussian=float(gaussian(new, moons(20_000, seed=0)).mean()),
        truth=float(truth(new).mean()),
    )
    print(f"{steps} steps of 256 samples in {seconds:.0f} s")
    print(f"log-likelihood of 5000 new samples, nats: {found.flow:.3f} by the flow, "
          f"{found.gaussian:.3f} by a Gaussian, {found.truth:.3f} by what made them")  # fmt: skip
    drawn = sample(model, 2000)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "flow_on_moons.png"
    draw_figure(model, drawn, curve, found).savefig(path, dpi=100)
    print(f"see {path}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
