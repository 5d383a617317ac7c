"""Functions that are mathematics more than layers: linear algebra, transforms, scans, sampling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import case

GROUP = "mathematics"


def matrices(x: Tensor, size: int = 3) -> Tensor:
    """Well-conditioned square matrices, one a sample."""
    return x.view(-1, size, size) + 3 * torch.eye(size, dtype=x.dtype)


@case("linear_solves", group=GROUP)
def linear_solves() -> Any:
    right = torch.randn(3)

    def f(x: Tensor) -> Tensor:
        a = matrices(x)
        solved = torch.linalg.solve(a, right)
        below = torch.linalg.solve_triangular(a.tril(), right.view(3, 1), upper=False)
        return torch.stack([solved, torch.linalg.inv(a) @ right, below.squeeze(-1)], dim=1)

    return f, torch.randn(3, 9)


@case("determinants", group=GROUP)
def determinants() -> Any:
    def f(x: Tensor) -> Tensor:
        a = matrices(x)
        sign, logabs = torch.linalg.slogdet(a)
        return torch.stack(
            [sign * logabs, torch.linalg.det(a), a.logdet(), a.diagonal(0, 1, 2).sum(1)], 1
        )

    return f, torch.randn(3, 9)


@case("decompositions", group=GROUP)
def decompositions() -> Any:
    def f(x: Tensor) -> Tensor:
        a = matrices(x)
        spd = a @ a.mT
        lower = torch.linalg.cholesky(spd)
        values, vectors = torch.linalg.eigh(spd)
        q, r = torch.linalg.qr(a)
        kept = [
            lower[:, 2],
            values,
            (vectors[..., 0] ** 2),
            torch.linalg.svdvals(a),
            q[:, 0],
            r[:, 0],
        ]
        return torch.stack(kept, dim=1)

    return f, torch.randn(2, 9)


@case("matrix_functions", group=GROUP)
def matrix_functions() -> Any:
    def f(x: Tensor) -> Tensor:
        a = x.view(-1, 2, 2)
        power = torch.linalg.matrix_power(a, 3)
        pseudo = torch.linalg.pinv(torch.cat([a, a.sin()], dim=1))
        return torch.cat(
            [torch.matrix_exp(a).flatten(1), power.flatten(1), pseudo.flatten(1)], dim=1
        )

    return f, torch.randn(3, 4)


@case("least_squares_layer", group=GROUP)
def least_squares_layer() -> Any:
    """Ridge regression inside the forward (R2D2): fit on half of the sample, predict the rest."""

    def f(x: Tensor) -> Tensor:
        a, b, query = x[:, :, :2], x[:, :, 2:], x[:, :2, :2]
        weight = torch.cholesky_solve(
            a.mT @ b, torch.linalg.cholesky(a.mT @ a + torch.eye(2, dtype=x.dtype))
        )
        return (query @ weight).squeeze(-1)

    return f, torch.randn(3, 4, 3)


@case("real_fourier_layer", group=GROUP)
def real_fourier_layer() -> Any:
    """A Fourier neural operator: low modes multiplied by complex weights."""
    weight = nn.Parameter(torch.randn(2, 2, 3, dtype=torch.complex128))

    def f(x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)[..., :3]
        return torch.fft.irfft(torch.einsum("ncm,com->nom", modes, weight), n=8).tanh()

    return f, torch.randn(2, 2, 8)


@case("complex_spectrum", group=GROUP)
def complex_spectrum() -> Any:
    def f(x: Tensor) -> Tensor:
        z = torch.fft.fft2(torch.complex(x, x.sin()), norm="ortho")
        features = [z.abs(), z.angle(), z.real * z.imag, (z * z.conj()).real, z.exp().imag]
        return torch.stack([part.mean((1, 2)) for part in features], dim=1)

    return f, torch.randn(3, 3, 4)


@case("short_time_fourier", group=GROUP)
def short_time_fourier() -> Any:
    window = torch.hann_window(4)

    def f(x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 4, 2, window=window, return_complex=True)
        loud = (spectrum.abs().square() + 1e-3).log()
        back = torch.istft(spectrum * 0.5, 4, 2, window=window, length=x.shape[1])
        return torch.cat([loud.flatten(1), back], dim=1)

    return f, torch.randn(2, 9)


@case("complex_layers", group=GROUP)
def complex_layers() -> Any:
    first, second = nn.Linear(3, 4, dtype=torch.complex128), nn.Linear(4, 2, dtype=torch.complex128)

    def f(x: Tensor) -> Tensor:
        z = first(torch.polar(x.abs() + 0.1, x))
        z = z / (1 + z.abs())
        return torch.view_as_real(second(z)).flatten(1)

    return f, torch.randn(4, 3)


@case("cumulative_operations", group=GROUP)
def cumulative_operations() -> Any:
    def f(x: Tensor) -> Tensor:
        running = [x.cumsum(1), x.cumprod(1), x.logcumsumexp(1), x.diff(dim=1, prepend=x[:, :1])]
        return torch.stack([*running, x.flip(1).cumsum(1).flip(1), x.cummax(1).values], dim=1)

    return f, torch.randn(3, 4)


@case("reductions", group=GROUP)
def reductions() -> Any:
    def f(x: Tensor) -> Tensor:
        flat = [
            x.mean(1),
            x.var(1),
            x.std(1, correction=0),
            x.prod(1),
            x.logsumexp(1),
            x.norm(dim=1),
        ]
        flat += [
            x.nansum(1),
            x.square().sum(1).rsqrt(),
            torch.trapezoid(x, dim=1),
            x.renorm(2, 0, 9.0).sum(1),
        ]
        return torch.stack(flat, dim=1)

    return f, torch.randn(4, 4)


@case("special_functions", group=GROUP)
def special_functions() -> Any:
    def f(x: Tensor) -> Tensor:
        y = x.sigmoid()
        parts = [
            x.erf(),
            y.erfinv(),
            y.lgamma(),
            y.digamma(),
            torch.special.i0e(x),
            x.sinc(),
            y.logit(),
        ]
        parts += [torch.special.log_ndtr(x), torch.special.entr(y), x.atan2(y), torch.hypot(x, y)]
        parts += [x.expm1(), y.log1p(), torch.xlogy(y, y), x.asinh(), (0.9 * y).atanh(), x.tan()]
        return torch.stack(parts, dim=1)

    return f, torch.randn(3, 2)


@case("spatial_transformer", group=GROUP)
def spatial_transformer() -> Any:
    """The image decides how it is turned; gradient through values and through places."""
    where = nn.Linear(16, 6)

    def f(x: Tensor) -> Tensor:
        theta = 0.3 * where(x.flatten(1)).tanh().view(-1, 2, 3) + torch.eye(2, 3, dtype=x.dtype)
        grid = F.affine_grid(theta, [len(x), 1, 3, 3], align_corners=False)
        return F.grid_sample(x, grid, align_corners=False, padding_mode="border")

    return f, torch.randn(3, 1, 4, 4)


@case("grid_sample_volume", group=GROUP)
def grid_sample_volume() -> Any:
    grid = torch.rand(1, 1, 2, 2, 3) * 2.4 - 1.2

    def f(x: Tensor) -> Tensor:
        places = grid.expand(len(x), -1, -1, -1, -1)
        return F.grid_sample(x.sin(), places, align_corners=True, padding_mode="zeros")

    return f, torch.randn(2, 1, 2, 3, 3)


@case("deformable_gather", group=GROUP)
def deformable_gather() -> Any:
    """Deformable attention in one dimension: read between the places the data points to."""
    offset = nn.Linear(6, 3)

    def f(x: Tensor) -> Tensor:
        place = 4.9 * offset(x).sigmoid()
        left = place.floor().long().clamp(0, 4)
        share = place - left
        return torch.gather(x, 1, left) * (1 - share) + torch.gather(x, 1, left + 1) * share

    return f, torch.randn(4, 6)


@case("capsule_routing", group=GROUP)
def capsule_routing() -> Any:
    votes_of = nn.Parameter(torch.randn(3, 2, 2, 4))  # inputs, capsules, width in, width out

    def squash(s: Tensor) -> Tensor:
        size = s.square().sum(-1, keepdim=True)
        return size / (1 + size) * s / (size + 1e-9).sqrt()

    def f(x: Tensor) -> Tensor:
        votes = torch.einsum("nid,icde->nice", x, votes_of)
        logits = x.new_zeros(len(x), 3, 2)
        for _ in range(3):
            capsules = squash((logits.softmax(2).unsqueeze(3) * votes).sum(1))
            logits = logits + (votes * capsules.unsqueeze(1)).sum(3)
        return capsules.norm(dim=2)

    return f, torch.randn(3, 3, 2)


class SplineLayer(nn.Module):
    """A Kolmogorov-Arnold layer: a sum of learnt cubic B-splines on every edge."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-4, 4, 9))
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 5))

    def basis(self, x: Tensor) -> Tensor:
        x, t = x.unsqueeze(-1), self.knots
        b = ((x >= t[:-1]) & (x < t[1:])).to(x.dtype)
        for k in range(1, 4):
            rise = (x - t[: -k - 1]) / (t[k:-1] - t[: -k - 1])
            fall = (t[k + 1 :] - x) / (t[k + 1 :] - t[1:-k])
            b = rise * b[..., :-1] + fall * b[..., 1:]
        return b

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nik,oik->no", self.basis(x), self.weight) + F.silu(x).sum(1, True)


@case("kolmogorov_arnold_splines", group=GROUP)
def kolmogorov_arnold_splines() -> Any:
    return nn.Sequential(SplineLayer(3, 2), nn.Tanh(), SplineLayer(2, 2)), torch.randn(4, 3)


@case("sinkhorn_transport", group=GROUP)
def sinkhorn_transport() -> Any:
    def f(x: Tensor) -> Tensor:
        log_plan = x.view(-1, 3, 3)
        for _ in range(4):
            log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(2, keepdim=True)
        return (log_plan.exp() * torch.arange(9.0, dtype=x.dtype).view(3, 3)).sum(2)

    return f, torch.randn(3, 9)


@case("robot_arm", group=GROUP)
def robot_arm() -> Any:
    """Forward kinematics: joint angles to the pose of the hand, by products of transforms."""

    def f(x: Tensor) -> Tensor:
        pose = torch.eye(3, dtype=x.dtype).expand(len(x), 3, 3)
        for joint in range(x.shape[1]):
            c, s, one = x[:, joint].cos(), x[:, joint].sin(), torch.ones(len(x), dtype=x.dtype)
            rows = [torch.stack(r, 1) for r in ((c, -s, c), (s, c, s), (0 * one, 0 * one, one))]
            pose = pose @ torch.stack(rows, dim=1)
        return torch.cat([pose[:, :2, 2], (pose[:, 1, 0] / math.pi).unsqueeze(1)], dim=1)

    return f, torch.randn(4, 3)


@case("tensor_products", group=GROUP)
def tensor_products() -> Any:
    def f(x: Tensor) -> Tensor:
        a, b = x[:, 0], x[:, 1]
        outer = torch.einsum("ni,nj->nij", a, b)
        cross = torch.linalg.cross(a, b)
        mixed = torch.tensordot(x, torch.ones(3, 2, dtype=x.dtype), dims=1).flatten(1)
        kron = torch.stack([torch.kron(u, v) for u, v in zip(a[:, :2], b[:, :2], strict=True)])
        return torch.cat(
            [outer.flatten(1), cross, mixed, kron, torch.linalg.vecdot(a, b).unsqueeze(1)], 1
        )

    return f, torch.randn(3, 2, 3)
