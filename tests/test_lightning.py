"""Under Lightning's trainer, which owns the loop: the steps of a plain loop, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchjac import jacobian, value_and_jacobian

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # in Lightning's data loops
]
EPOCHS, BATCH, CLIP, RATE = 2, 8, 0.05, 1e-2


def data() -> Tensor:
    return torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3))


def loss_of(y: Tensor, j: Tensor) -> Tensor:
    """A flow's."""
    return y.square().sum(1).mean() / 2 - torch.linalg.slogdet(j).logabsdet.mean()


def fitted(folder: Path, accumulate: int, own_steps: bool) -> tuple[Any, list[Tensor]]:
    """A module that Lightning trained, and the Jacobians that its validation saw."""
    import pytorch_lightning as lightning

    class Flow(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.automatic_optimization = not own_steps
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

        def training_step(self, rows: list[Tensor], index: int) -> Tensor:
            # of the module itself, which the trainer holds on to
            loss = loss_of(*value_and_jacobian(self, rows[0], create_graph=True))
            if own_steps:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=CLIP)
                optimizer.step()
            return loss

        def validation_step(self, rows: list[Tensor], index: int) -> None:
            modes.add(torch.is_inference_mode_enabled())
            self.seen.append(jacobian(self.net, rows[0]))
            self.log("mean", self.seen[-1].mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=RATE)

    modes: set[bool] = set()
    flow, rows = Flow(), DataLoader(TensorDataset(data()), BATCH)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, gradient_clip_val=None if own_steps else CLIP,
        accumulate_grad_batches=1 if own_steps else accumulate,
    )  # fmt: skip
    trainer.fit(flow, rows, rows)
    trainer.validate(flow, rows, verbose=False)
    assert modes == {False, True}  # without history in a fit, in inference mode by itself
    return flow.net, flow.seen


def plain(accumulate: int) -> tuple[nn.Module, list[Tensor]]:
    """The same by hand, with nested autograd."""
    net, x, seen = network(), data(), []
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    for _ in range(EPOCHS):
        for index, rows in enumerate(x.split(BATCH)):
            rows.requires_grad_()
            y = net(rows)
            j = [torch.autograd.grad(c.sum(), rows, create_graph=True)[0] for c in y.T]
            (loss_of(y, torch.stack(j, 1)) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                nn.utils.clip_grad_norm_(net.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        seen += [jacobian(net, rows.detach()) for rows in x.split(BATCH)]
    return net, seen + seen[-32 // BATCH :]


@pytest.mark.parametrize(
    ("accumulate", "own_steps"), [(1, False), (2, False), (1, True)],
    ids=["automatic", "accumulated", "manual"],
)  # fmt: skip
def test_a_trainer_takes_the_steps_of_a_plain_loop(
    accumulate: int, own_steps: bool, tmp_path: Path
) -> None:
    net, seen = fitted(tmp_path, accumulate, own_steps)
    expected, expected_seen = plain(accumulate)
    begun = network().state_dict()
    for name, p in net.state_dict().items():
        assert not torch.equal(p, begun[name])
        torch.testing.assert_close(p, expected.state_dict()[name], rtol=1e-7, atol=1e-9)
    assert len(seen) == (EPOCHS + 1) * 32 // BATCH
    for a, b in zip(seen, expected_seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
