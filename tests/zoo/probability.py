"""Densities, flows and samplers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributions, nn

from .registry import BY_PLACE, NOISY, NOT_ITS_SLOPE, case

GROUP = "probability"


class Coupling(nn.Module):
    """RealNVP: one half moves the other; the log-determinant comes along."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
        self.swap = swap

    def forward(self, x: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
        fixed, moved = x.chunk(2, dim=1)[:: -1 if self.swap else 1]
        scale, shift = self.net(fixed).chunk(2, dim=1)
        moved = moved * scale.tanh().exp() + shift
        halves = (moved, fixed) if self.swap else (fixed, moved)
        return torch.cat(halves, dim=1), logdet + scale.tanh().sum(1)


@case("coupling_flow", group=GROUP)
def coupling_flow() -> Any:
    layers = nn.ModuleList(Coupling(k % 2 == 1) for k in range(3))

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(len(x))
        for layer in layers:
            x, logdet = layer(x, logdet)
        return x, logdet - 0.5 * (x.square().sum(1) + 4 * math.log(2 * math.pi))

    return f, torch.randn(4, 4)


@case("invertible_linear_flow", group=GROUP)
def invertible_linear_flow() -> Any:
    """Glow's 1x1 convolution, its inverse and its log-determinant, with activation norm."""
    weight, log_scale = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def f(x: Tensor) -> Tensor:
        z = (x * log_scale.exp()) @ weight
        back = torch.linalg.solve(weight.T, z.tanh().T).T
        return torch.cat(
            [back, torch.linalg.slogdet(weight)[1].expand(len(x), 1) * z[:, :1]], dim=1
        )

    return f, torch.randn(4, 3)


@case("rational_quadratic_bins", group=GROUP)
def rational_quadratic_bins() -> Any:
    """A monotone spline: bins found by search, values by gather."""
    raw = nn.Parameter(torch.randn(6))

    def f(x: Tensor) -> Tensor:
        edges = torch.cat([raw.new_zeros(1), raw.softmax(0).cumsum(0)])
        u = x.sigmoid()
        k = torch.searchsorted(edges.detach(), u.detach(), right=True).clamp(1, 6) - 1
        low, width = edges[k], edges[k + 1] - edges[k]
        t = (u - low) / width
        return (t**2 + 0.5 * t * (1 - t)) / (1 + t * (1 - t)) * width + low

    return f, torch.randn(4, 3)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(3, 2))
        self.roots = nn.Parameter(torch.randn(3, 2, 2))
        self.logits = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        lower = self.roots.tril(-1) + torch.diag_embed(self.roots.diagonal(0, 1, 2).exp())
        away = torch.linalg.solve_triangular(
            lower, (x.unsqueeze(1) - self.means).unsqueeze(3), upper=False
        )
        each = -0.5 * away.square().sum((2, 3)) - lower.diagonal(0, 1, 2).log().sum(1)
        return torch.logsumexp(each + self.logits.log_softmax(0), dim=1)


@case("gaussian_mixture_log_density", group=GROUP)
def gaussian_mixture_log_density() -> Any:
    return Mixture(), torch.randn(5, 2)


# The value at which the density is read is cut off from the gradient.
@case("distributions_log_prob", group=GROUP, without=NOT_ITS_SLOPE)
def distributions_log_prob() -> Any:
    net = nn.Linear(3, 4)

    def f(x: Tensor) -> Tensor:
        a, b, c, d = net(x).unbind(1)
        value = x[:, 0].detach().sigmoid()
        laws = [distributions.Normal(a, b.exp()), distributions.Beta(c.exp() + 1, d.exp() + 1)]
        laws += [distributions.Gamma(a.exp(), b.exp()), distributions.Laplace(c, d.exp())]
        entropy = distributions.Categorical(logits=net(x)).entropy()
        return torch.stack([*(law.log_prob(value) for law in laws), entropy], dim=1)

    return f, torch.randn(4, 3)


@case("divergences", group=GROUP)
def divergences() -> Any:
    net = nn.Linear(3, 4)

    def f(x: Tensor) -> Tensor:
        p = distributions.Normal(net(x)[:, :2], net(x)[:, 2:].exp())
        kl = distributions.kl_divergence(p, distributions.Normal(0.0, 1.0))
        cross = nn.functional.kl_div(
            net(x).log_softmax(1), x.new_full((4,), 0.25), reduction="none"
        )
        return torch.cat([kl, cross], dim=1)

    return f, torch.randn(4, 3)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        image = self.decoder(mean + (0.5 * logvar).exp() * noise).sigmoid()
        return image, -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1)


@case("vae_train", group=GROUP, without=NOISY)
def vae_train() -> Any:
    return VAE().train(), torch.randn(4, 4)


@case("gumbel_softmax_hard", group=GROUP, without=NOISY | NOT_ITS_SLOPE)
def gumbel_softmax_hard() -> Any:
    net = nn.Linear(3, 4)

    def f(x: Tensor) -> Tensor:
        return nn.functional.gumbel_softmax(net(x), tau=0.7, hard=True)

    return f, torch.randn(4, 3)


@case("implicit_reparametrisation", group=GROUP, without=NOISY | NOT_ITS_SLOPE)
def implicit_reparametrisation() -> Any:
    """Gamma and Dirichlet samples whose gradient is implicit in the distribution function."""

    def f(x: Tensor) -> Tensor:
        gamma = distributions.Gamma(x.exp() + 1, x.exp()).rsample()
        return torch.cat([gamma, distributions.Dirichlet(x.exp() + 0.5).rsample()], dim=1)

    return f, torch.randn(3, 3)


@case("diffusion_denoising_steps", group=GROUP)
def diffusion_denoising_steps() -> Any:
    """Two deterministic DDIM steps with a sinusoidal time embedding."""
    net = nn.Sequential(nn.Linear(7, 6), nn.SiLU(), nn.Linear(6, 3))

    def f(x: Tensor) -> Tensor:
        for now, later in ((0.3, 0.6), (0.6, 0.9)):
            time = x.new_tensor(
                [math.sin(now), math.cos(now), math.sin(9 * now), math.cos(9 * now)]
            )
            noise = net(torch.cat([x, time.expand(len(x), -1)], dim=1))
            clean = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
            x = math.sqrt(later) * clean + math.sqrt(1 - later) * noise
        return x

    return f, torch.randn(4, 3)


# The labels stay where they are.
@case("per_sample_losses", group=GROUP, without=BY_PLACE)
def per_sample_losses() -> Any:
    """The gradient of each sample's own loss, several losses at once."""
    net, target = nn.Linear(4, 3), torch.tensor([0, 2, 1, 1])

    def f(x: Tensor) -> Tensor:
        logits, labels = net(x), target[: len(x)]
        cross = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
        binary = nn.functional.binary_cross_entropy_with_logits(
            logits, nn.functional.one_hot(labels, 3).to(x.dtype), reduction="none"
        )
        margin = nn.functional.multi_margin_loss(logits, labels, reduction="none")
        nll = nn.functional.nll_loss(logits.log_softmax(1), labels, reduction="none")
        return torch.stack([cross, binary.sum(1), margin, nll], dim=1)

    return f, torch.randn(4, 4)


@case("connectionist_temporal_loss", group=GROUP)
def connectionist_temporal_loss() -> Any:
    def f(x: Tensor) -> Tensor:
        logs = x.log_softmax(2).transpose(0, 1)
        n = len(x)
        words, lengths = torch.tensor([[1, 2]]).expand(n, 2), torch.full((n,), x.shape[1])
        return nn.functional.ctc_loss(logs, words, lengths, torch.full((n,), 2), reduction="none")

    return f, torch.randn(3, 4, 3)
