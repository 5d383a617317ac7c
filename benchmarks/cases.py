"""What is measured: a model, a batch, and the targets for the nine first cases."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.models import mlp

CURVES = ("batch", "outputs", "inputs")


@dataclass(frozen=True)
class Case:
    """A named model and the shape of one batch, the batch axis first."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: tuple[float, float] | None = None
    """How many times faster than the best PyTorch way, and than the best of all, is aimed at."""
    curve: str = ""
    """The plot this is a point of; empty for a case of its own."""
    along: int = 0
    """Where on that plot's horizontal axis."""

    def make(self, device: str = "cpu") -> tuple[nn.Module, Tensor]:
        """The model, frozen and in evaluation mode, and its inputs; the same every time."""
        torch.manual_seed(0)
        model = self.build().eval().requires_grad_(False)
        return model.to(device), torch.randn(self.shape).to(device)


CASES = (
    Case("LeNet5", models.lenet5, (256, 1, 32, 32), (4, 4)),
    Case("1-D CNN", models.cnn1d, (1024, 1, 224), (2.5, 2.5)),
    Case("MLP 784-512-512-10", mlp(784, 512, 512, 10), (512, 784), (2.4, 1.3)),
    Case("autoencoder", mlp(784, 256, 16, 256, 784), (64, 784), (15, 8)),
    Case("field network", mlp(2, 256, 256, 256, 3, activation=nn.Tanh), (4096, 2), (3, 1.3)),
    Case("decoder", mlp(16, 256, 512, 1024), (256, 16), (2.5, 1.2)),
    Case("square block", mlp(64, 128, 64, activation=nn.Tanh), (256, 64), (5, 1)),
    Case("small ResNet", models.small_resnet, (64, 3, 32, 32), (2, 2)),
    Case("transformer encoder", models.encoder, (64, 32, 64), (2.5, 2.5)),
)
FURTHER = (
    Case("LeNet5, batch 12", models.lenet5, (12, 1, 32, 32)),
    Case("LeNet5, batch 4096", models.lenet5, (4096, 1, 32, 32)),
    Case("conv autoencoder", models.conv_autoencoder, (2, 3, 32, 32)),
    Case("ResNet18", models.resnet18, (32, 3, 32, 32)),
    Case("ViT", models.vit, (32, 3, 32, 32)),
    Case("GRU", models.gru, (64, 32, 16)),
    Case("GPT block, per token", models.gpt_block, (8, 16, 64)),
    Case("deep MLP, batch 1", mlp(64, *[256] * 16, 64, activation=nn.Tanh), (1, 64)),
)
POINTS = (
    *(
        Case(f"by batch {n}", models.lenet5, (n, 1, 32, 32), curve="batch", along=n)
        for n in (4, 16, 64, 256, 1024)
    ),
    *(
        Case(f"by outputs {o}", mlp(256, 256, 256, o), (32, 256), curve="outputs", along=o)
        for o in (1, 8, 64, 512)
    ),
    *(
        Case(f"by inputs {i}", mlp(i, 256, 256, 64), (32, i), curve="inputs", along=i)
        for i in (2, 16, 128, 1024)
    ),
)
ALL = CASES + FURTHER + POINTS


def named(name: str) -> Case:
    """The case of this name."""
    return next(case for case in ALL if case.name == name)
