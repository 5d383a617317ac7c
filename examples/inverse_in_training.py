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
from batchjac import linalg

RED = "#c1272d"
Inverse = Callable[["Net", Tensor], Tensor]


def pendulum(x: Tensor) -> Tensor:
    """The velocity of angle and angular velocity, ``[N, 2]``, with friction."""
    angle, speed = x.unbind(1)
    return torch.stack([speed, -angle.sin() - 0.3 * speed], 1)


class Net(nn.Module):
    """Learned coordinates and the linear motion in them, both odd, so that rest stays rest."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        first, middle = nn.Linear(2, width, bias=False), nn.Linear(width, width, bias=False)
        last = nn.Linear(width, 2, bias=False)
        self.block1 = Residual(first, nn.Tanh(), middle, nn.Tanh(), last)
        self.motion = nn.Linear(2, 2, bias=False)
        # Begin as the pendulum near rest: J = 1, far from any that has no inverse.
        nn.init.zeros_(last.weight)
        self.motion.weight.data = batchjac.jacobian(pendulum, torch.zeros(1, 2))[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.motion(self.block1(x))


class Residual(nn.Sequential):
    """``x + body(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def whole_batch(net: Net, x: Tensor) -> Tensor:
    """The inverses for all samples at once, ``[N, 2, 2]``."""
    return linalg.inverse(net, x, of="block1", create_graph=True)


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
    """The mean squared error of the velocity."""
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


def train(steps: int, batch: int, inverse: Inverse, until: int) -> tuple[Net, Run]:
    """The first steps of Adam's, on the same samples whichever way the inverse is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, seconds, start = [], [], time.perf_counter()
    for _ in range(until):
        loss = loss_of(net, draw(batch, generator), inverse)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return net, Run(losses, seconds)


def largest_difference(net: Net, x: Tensor) -> float:
    """Between both ways in float64: of the loss, and of its gradient by every parameter."""
    net, x = copy.deepcopy(net).double(), x.double()
    found = []
    for inverse in (whole_batch, sample_by_sample):
        loss = loss_of(net, x, inverse)
        found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


def follow(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Six seconds of the path from ``x [N, 2]``, by the midpoint rule: ``[steps, N, 2]``."""
    path, dt = [x], 0.02
    for _ in range(300):
        x = x + dt * move(x + dt / 2 * move(x)).detach()
        path.append(x)
    return torch.stack(path)


def draw_figure(net: Net, ours: Run, loop: Run) -> Figure:
    """The motion in both coordinates, and both trainings by the clock."""
    figure = Figure(figsize=(13.5, 4.3), layout="constrained")
    angle_speed, straight, clock = figure.subplots(1, 3)
    turn = torch.arange(4) * torch.pi / 2
    starts = torch.stack([1.4 * turn.cos(), 0.9 * turn.sin()], 1)
    true = follow(pendulum, starts)
    learned = follow(lambda x: velocity(net, x, whole_batch), starts)
    linear = follow(net.motion, net.block1(starts).detach())
    known = net.block1(true).detach()
    for axes, thick, thin in ((angle_speed, true, learned), (straight, known, linear)):
        for k in range(len(starts)):
            axes.plot(*thick[:, k].T, color="black", lw=4, alpha=0.25)
            axes.plot(*thin[:, k].T, color=RED, lw=1.4)
    angle_speed.set(title="the pendulum", xlabel="angle, rad", ylabel="angular velocity, rad/s")
    straight.set(title="the same in the learned coordinates", xlabel="y₁", ylabel="y₂")
    straight.plot([], [], color="black", lw=4, alpha=0.25, label="the pendulum's motion")
    straight.plot([], [], color=RED, lw=1.4, label="linear motion, dy/dt = A y")
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    for run, name, colour in ((loop, "sample by sample", "#7d7d7d"), (ours, "whole batch", RED)):
        label = f"{name}: {len(run.losses)} steps, {1e3 * run.per_step:.3g} ms each"
        clock.plot(run.seconds, run.losses, color=colour, lw=1.4, label=label)
    clock.set(title="training", xlabel="seconds", xscale="log", yscale="log",
              ylabel="mean squared error of the velocity")  # fmt: skip
    clock.legend(frameon=False, fontsize=9, loc="lower left")
    for axes in (angle_speed, straight, clock):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(out: Path, quick: bool = False) -> tuple[Net, Run, Run]:
    """Train both ways, draw, and return the network and both trainings."""
    steps, looped, batch = (300, 3, 64) if quick else (3000, 60, 256)
    net, ours = train(steps, batch, whole_batch, until=steps)
    _, loop = train(steps, batch, sample_by_sample, until=looped)
    off = largest_difference(net, draw(16, torch.Generator().manual_seed(2)))
    assert off < 1e-9, f"the loop and the batch differ by {off}"
    print(f"loss and gradients of both ways differ by {off:.0e} at most, in float64")
    print(
        f"a step of {batch}: {1e3 * loop.per_step:.1f} ms sample by sample, "
        f"{1e3 * ours.per_step:.1f} ms together, {loop.per_step / ours.per_step:.0f} times faster"
    )
    print(f"error of the velocity: {ours.losses[0]:.3g} before, {ours.losses[-1]:.2g} after")
    out.mkdir(parents=True, exist_ok=True)
    draw_figure(net, ours, loop).savefig(out / "inverse_in_training.png", dpi=100)
    print(f"see {out / 'inverse_in_training.png'}")
    return net, ours, loop


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
