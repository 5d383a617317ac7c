"""The nine cases of the first measurements: a model, a batch, and nothing else."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A named model and the shape of one batch, the batch axis first."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def make(self) -> tuple[nn.Module, Tensor]:
        """The model, frozen and in evaluation mode, and its inputs; the same every time."""
        torch.manual_seed(0)
        return self.build().eval().requires_grad_(False), torch.randn(self.shape)


def lenet5() -> nn.Module:
    """LeCun et al., 1998, as the fourth seed sizes it, with ReLU and max pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def cnn1d() -> nn.Module:
    """A 1-D classifier of 224 features into 3 classes, as in the third seed."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    """Linear layers of these widths with an activation between them."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        return nn.Sequential(*layers[:-1])

    return build


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a skip."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def small_resnet() -> nn.Module:
    """Three residual stages of 16, 32 and 64 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Encoder(nn.Module):
    """A transformer encoder of two layers, its tokens averaged, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean(1))
        return y


CASES = (
    Case("LeNet5", lenet5, (256, 1, 32, 32)),
    Case("1-D CNN", cnn1d, (1024, 1, 224)),
    Case("MLP 784-512-512-10", mlp(784, 512, 512, 10), (512, 784)),
    Case("autoencoder", mlp(784, 256, 16, 256, 784), (64, 784)),
    Case("field network", mlp(2, 256, 256, 256, 3, activation=nn.Tanh), (4096, 2)),
    Case("decoder", mlp(16, 256, 512, 1024), (256, 16)),
    Case("square block", mlp(64, 128, 64, activation=nn.Tanh), (256, 64)),
    Case("small ResNet", small_resnet, (64, 3, 32, 32)),
    Case("transformer encoder", Encoder, (64, 32, 64)),
)
