"""The two networks of the demo, after questions 3 and 4 of docs/from_your_loop.md."""

import torch
from torch import Tensor, nn


class LeNet5(nn.Module):
    """Scores for `n_classes` from images ``[N, 1, 32, 32]``: logits ``[N, n_classes]``.

    The layer sizes of question 4, with the ReLUs and the pooling that turn 32 × 32 pixels
    into the 400 features its classifier expects (16 channels × 5 × 5).

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998,
    with ReLU and max pooling in place of the scaled tanh and the trained averages.

    >>> LeNet5(n_classes=10)(torch.zeros(12, 1, 32, 32)).shape
    torch.Size([12, 10])
    """

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(1, 6, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        features = torch.flatten(self.feature_extractor(x), 1)
        logits: Tensor = self.classifier(features)
        return logits


class SignalNet(nn.Module):
    """Scores for three classes from signals ``[N, 1, 224]``: logits ``[N, 3]``.

    Question 3 gives these shapes and "a 1-D CNN", no layers; these are three convolutions that
    halve the length twice, and a linear head that still knows where along the signal it is.

    >>> SignalNet()(torch.zeros(5, 1, 224)).shape
    torch.Size([5, 3])
    """

    def __init__(self, n_classes: int = 3, length: int = 224) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 16, kernel_size=7, padding=3),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(16, 32, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(32, 32, kernel_size=3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(32 * (length // 4), n_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.features(x), 1))
        return logits


class WithBlank(nn.Module):
    """The scores of `model` and, last, the constant zero that a blank signal is measured by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.model(x), (0, 1))
