"""Question 5: the inverse of an inner layer's Jacobian, in training, for the whole batch.

A damped pendulum moves in a way that no matrix describes: the further it swings, the slower. But
there are coordinates ``y = block1(x)`` in which its motion is linear, ``dy/dt = A y`` (Hartman and
Grobman). To learn them, the linear motion is pulled back to the pendulum's own coordinates,

    dx/dt = J(x)⁻¹ A block1(x),        J = ∂block1/∂x,

and compared with the pendulum's velocity. Every step of the training inverts a Jacobian for every
sample, and goes back through the inverse. The question did that in a loop over samples.

    python examples/inverse_in_training.py --out runs/examples
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import batchjac

DAMPING = 0.3
RED = "#c1272d"
Inverse = Callable[["Net", Tensor], Tensor]


def pendulum(x: Tensor) -> Tensor:
    """The velocity of angle and angular velocity, ``[N, 2]``, friction included."""
    angle, speed = x.unbind(1)
    return torch.stack([speed, -angle.sin() - DAMPING * speed], 1)


class Net(nn.Module):
    """Learned coordinates and the linear motion in them, both odd, so that rest stays rest."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.block1 = Residual(
            nn.Linear(2, width, bias=False), nn.Tanh(),
            nn.Linear(width, width, bias=False), nn.Tanh(),
            nn.Linear(width, 2, bias=False),
        )  # fmt: skip
        self.motion = nn.Linear(2, 2, bias=False)
        # Begin as the pendulum near rest: J = 1, far from any that has no inverse.
        nn.init.zeros_(self.block1[-1].weight)
        self.motion.weight.data = batchjac.jacobian(pendulum, torch.zeros(1, 2))[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.motion(self.block1(x))
        return y


class Residual(nn.Sequential):
    """``x + body(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + super().forward(x)
        return y


def whole_batch(net: Net, x: Tensor) -> Tensor:
    """The inverses for all samples at once, ``[N, 2, 2]``."""
    return torch.linalg.inv(batchjac.jacobian(net.block1, x, create_graph=True))


def sample_by_sample(net: Net, x: Tensor) -> Tensor:
    """The question's loop: a row at a time, one sample after the other."""
    inverses = []
    for point in x.split(1):
        point = point.detach().requires_grad_()
        y = net.block1(point)
        rows = [torch.autograd.grad(y[0, i], point, create_graph=True)[0][0] for i in range(2)]
        inverses.append(torch.linalg.pinv(torch.stack(rows)))
    return torch.stack(inverses)


def velocity(net: Net, x: Tensor, inverse: Inverse) -> Tensor:
    """The linear motion, pulled back to the pendulum's coordinates: ``[N, 2]``."""
    return (inverse(net, x) @ net(x)[:, :, None])[:, :, 0]


def loss_of(net: Net, x: Tensor, inverse: Inverse) -> Tensor:
    return (velocity(net, x, inverse) - pendulum(x)).square().sum(1).mean()


@dataclass(frozen=True)
class Run:
    """A training: the loss of every step, and the seconds from the start to its end."""

    losses: list[float]
    seconds: list[float]

    @property
    def per_step(self) -> float:
        return float(torch.tensor(self.seconds).diff().median())


def draw(samples: int, generator: torch.Generator) -> Tensor:
    """States with up to 2 radians and 1 radian a second: below the top, where motions part."""
    return (2 * torch.rand(samples, 2, generator=generator) - 1) * torch.tensor([2.0, 1.0])


def train(steps: int, batch: int, inverse: Inverse) -> tuple[Net, Run]:
    """Adam from the same beginning on the same samples, whichever way the inverse is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, seconds, start = [], [], time.perf_counter()
    for _ in range(steps):
        loss = loss_of(net, draw(batch, generator), inverse)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return net, Run(losses, seconds)


def largest_difference(net: Net, samples: int) -> float:
    """Between both ways in float64: of the loss, and of its gradient by every parameter."""
    net = copy.deepcopy(net).double()
    x = draw(samples, torch.Generator().manual_seed(2)).double()
    found = []
    for inverse in (whole_batch, sample_by_sample):
        loss = loss_of(net, x, inverse)
        found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    return max(float((a - b).detach().abs().max()) for a, b in zip(*found, strict=True))


def follow(move: Callable[[Tensor], Tensor], x: Tensor, steps: int, dt: float = 0.05) -> Tensor:
    """The path from ``x [N, 2]`` by Runge and Kutta's fourth order: ``[steps + 1, N, 2]``."""
    path = [x]
    for _ in range(steps):
        a = move(x)
        b = move(x + dt / 2 * a)
        c = move(x + dt / 2 * b)
        x = x + dt / 6 * (a + 2 * b + 2 * c + move(x + dt * c))
        path.append(x)
    return torch.stack(path)


def draw_figure(net: Net, ours: Run, loop: Run) -> Figure:
    """The motion in both coordinates, and both trainings by the clock."""
    figure = Figure(figsize=(13.5, 4.3), layout="constrained")
    angle_speed, straight, clock = figure.subplots(1, 3)
    turn = torch.arange(4) * torch.pi / 2
    starts = torch.stack([1.4 * turn.cos(), 0.9 * turn.sin()], 1)
    true = follow(pendulum, starts, 120)
    learned = follow(lambda x: velocity(net, x, whole_batch).detach(), starts, 120)
    for k in range(len(starts)):
        angle_speed.plot(*true[:, k].T, color="black", lw=4, alpha=0.25)
        angle_speed.plot(*learned[:, k].T, color=RED, lw=1.4)
        straight.plot(*net.block1(true[:, k]).detach().T, color="black", lw=4, alpha=0.25)
        straight.plot(*linear(net, true[0, k], 120).T, color=RED, lw=1.4)
    angle_speed.set(title="the pendulum", xlabel="angle, rad", ylabel="angular velocity, rad/s")
    straight.set(title="the same in the learned coordinates", xlabel="y₁", ylabel="y₂")
    straight.plot([], [], color="black", lw=4, alpha=0.25, label="the pendulum's motion")
    straight.plot([], [], color=RED, lw=1.4, label="linear motion, dy/dt = A y")
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    for run, name, style in (
        (loop, "sample by sample", {"color": "#4d4d4d", "lw": 3, "alpha": 0.6}),
        (ours, "whole batch", {"color": RED, "lw": 1.0}),
    ):
        label = f"{name}: {len(run.losses)} steps, {1e3 * run.per_step:.3g} ms each"
        clock.plot(run.seconds, run.losses, label=label, **style)
    clock.set(title="training", xlabel="seconds", xscale="log", yscale="log",
              ylabel="mean squared error of the velocity")  # fmt: skip
    clock.legend(frameon=False, fontsize=9, loc="upper right")
    for axes in (angle_speed, straight, clock):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def linear(net: Net, start: Tensor, steps: int, dt: float = 0.05) -> Tensor:
    """``exp(A t) y``: the path of the linear motion from one state, ``[steps + 1, 2]``."""
    times = dt * torch.arange(steps + 1)
    flow = torch.linalg.matrix_exp(times[:, None, None] * net.motion.weight)
    return (flow @ net.block1(start[None])[0]).detach()


def main(out: Path, quick: bool = False) -> dict[str, float]:
    """Train both ways, draw, and return what was found."""
    steps, looped, batch = (300, 3, 64) if quick else (3000, 60, 256)
    net, ours = train(steps, batch, whole_batch)
    off = largest_difference(net, 16)
    assert off < 1e-9, f"the loop and the batch differ by {off}"
    _, loop = train(looped, batch, sample_by_sample)
    ratio = loop.per_step / ours.per_step
    print(f"loss and gradients of both ways differ by {off:.0e} at most, in float64")
    print(f"one step, {batch} samples: {1e3 * loop.per_step:.1f} ms sample by sample, "
          f"{1e3 * ours.per_step:.1f} ms for the whole batch: {ratio:.0f} times faster")  # fmt: skip
    print(f"error of the velocity: {ours.losses[0]:.3g} before, {ours.losses[-1]:.2g} after")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "inverse_in_training.png"
    draw_figure(net, ours, loop).savefig(path, dpi=100)
    print(f"see {path}")
    return {"off": off, "ratio": ratio, "first": ours.losses[0], "last": ours.losses[-1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
