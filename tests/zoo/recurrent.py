"""Sequences read step by step, by PyTorch's fused layers and by loops in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .registry import BY_PLACE, NOISY, case

GROUP = "recurrent"


@case("rnn_tanh_then_relu", group=GROUP)
def rnn_tanh_then_relu() -> Any:
    first = nn.RNN(2, 4, batch_first=True)
    second = nn.RNN(4, 3, nonlinearity="relu", batch_first=True)
    return lambda x: second(first(x)[0])[0][:, -1], torch.randn(4, 3, 2)


@case("lstm_last_step", group=GROUP)
def lstm_last_step() -> Any:
    lstm, head = nn.LSTM(2, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)
    return lambda x: head(lstm(x)[0][:, -1]), torch.randn(4, 4, 2)


@case("lstm_every_step_projected", group=GROUP)
def lstm_every_step_projected() -> Any:
    lstm = nn.LSTM(2, 5, proj_size=3, bias=False, batch_first=True)
    return lambda x: lstm(x)[0], torch.randn(3, 3, 2)


@case("lstm_final_states", group=GROUP)
def lstm_final_states() -> Any:
    """The states come as [layers, N, H]: the batch axis is the second."""
    lstm = nn.LSTM(2, 3, num_layers=2, batch_first=True)

    def f(x: Tensor) -> Tensor:
        _, (hidden, cell) = lstm(x)
        return torch.cat([hidden, cell]).transpose(0, 1)

    return f, torch.randn(3, 3, 2)


@case("lstm_initial_state_learnt", group=GROUP)
def lstm_initial_state_learnt() -> Any:
    lstm, start = nn.LSTM(2, 3, batch_first=True), nn.Parameter(torch.randn(2, 1, 1, 3))

    def f(x: Tensor) -> Tensor:
        hidden, cell = start.expand(-1, -1, len(x), -1).contiguous()
        return lstm(x, (hidden, cell))[0].mean(1)

    return f, torch.randn(3, 3, 2)


@case("gru_bidirectional", group=GROUP)
def gru_bidirectional() -> Any:
    gru, head = nn.GRU(2, 3, batch_first=True, bidirectional=True), nn.Linear(6, 2)
    return lambda x: head(gru(x)[0]).flatten(1), torch.randn(3, 3, 2)


@case("gru_time_first", group=GROUP)
def gru_time_first() -> Any:
    gru = nn.GRU(2, 3, num_layers=2)
    return lambda x: gru(x.transpose(0, 1))[0][-1], torch.randn(4, 4, 2)


# Noise between the layers.
@case("lstm_dropout_train", group=GROUP, without=NOISY)
def lstm_dropout_train() -> Any:
    lstm = nn.LSTM(2, 4, num_layers=2, dropout=0.5, batch_first=True).train()
    return lambda x: lstm(x)[0][:, -1], torch.randn(4, 3, 2)


# The lengths stay where they are.
@case("packed_sequences", group=GROUP, without=BY_PLACE)
def packed_sequences() -> Any:
    """Packing sorts the samples by length and drops the padding: rows of several samples mix."""
    gru = nn.GRU(2, 3, batch_first=True, bidirectional=True)
    lengths = torch.tensor([2, 4, 1])

    def f(x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(gru(packed)[0], batch_first=True, total_length=4)[0]

    return f, torch.randn(3, 4, 2)


class CellLoop(nn.Module):
    """Cells of all three kinds, called by hand, reading what the others wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(2, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        cell, hidden = x.new_zeros(n, 3), x.new_zeros(n, 3)
        state, last = x.new_zeros(n, 3), x.new_zeros(n, 2)
        for t in range(length):
            hidden, cell = self.lstm(x[:, t], (hidden, cell))
            state = self.gru(hidden, state)
            last = self.rnn(state, last)
        return torch.cat([last, cell], dim=1)


@case("cells_in_a_python_loop", group=GROUP)
def cells_in_a_python_loop() -> Any:
    return CellLoop(), torch.randn(4, 3, 2)


class NeuralODE(nn.Module):
    """The flow of a learnt field by classical Runge-Kutta steps."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))

    def slope(self, t: float, y: Tensor) -> Tensor:
        return self.field(torch.cat([y, torch.full_like(y[:, :1], t)], dim=1))

    def forward(self, y: Tensor, steps: int = 3) -> Tensor:
        h = 1.0 / steps
        for k in range(steps):
            t = k * h
            k1 = self.slope(t, y)
            k2 = self.slope(t + h / 2, y + h / 2 * k1)
            k3 = self.slope(t + h / 2, y + h / 2 * k2)
            k4 = self.slope(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y


@case("neural_ode_rk4", group=GROUP)
def neural_ode_rk4() -> Any:
    return NeuralODE(), torch.randn(4, 2)


class StateSpace(nn.Module):
    """A diagonal complex linear recurrence, as a scan and as a convolution by FFT, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.randn(3))
        self.turn = nn.Parameter(torch.randn(3))
        self.read = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        rate = torch.polar(torch.sigmoid(self.decay), self.turn)
        state = torch.zeros(len(x), 3, dtype=rate.dtype)
        scanned = []
        for value in x.unbind(1):
            state = rate * state + value.unsqueeze(1)
            scanned.append((state * self.read).sum(1).real)
        powers = rate ** torch.arange(x.shape[1]).unsqueeze(1)
        kernel = (powers * self.read).sum(1).real
        spectrum = torch.fft.rfft(x, 2 * x.shape[1]) * torch.fft.rfft(kernel, 2 * x.shape[1])
        return torch.stack(scanned, 1).tanh() + torch.fft.irfft(spectrum)[:, : x.shape[1]]


@case("state_space_model", group=GROUP)
def state_space_model() -> Any:
    return StateSpace(), torch.randn(3, 5)


class Equilibrium(nn.Module):
    """A fixed point found without a graph, its gradient solved for by a tensor hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(2, 3)
        with torch.no_grad():
            self.inner.weight.mul_(0.4)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.outer(x))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = x.new_zeros(len(x), 3)
            for _ in range(60):
                z = self.step(z, x)
        z = self.step(z, x)
        if not z.requires_grad:
            return z
        start = z.detach().requires_grad_()
        again = self.step(start, x)

        def solve(grad: Tensor) -> Tensor:
            total = grad
            for _ in range(60):
                total = grad + torch.autograd.grad(again, start, total, retain_graph=True)[0]
            return total

        z.register_hook(solve)
        return z


@case("deep_equilibrium_with_hook", group=GROUP)
def deep_equilibrium_with_hook() -> Any:
    return Equilibrium(), torch.randn(4, 2)


@case("very_deep_chain", group=GROUP)
def very_deep_chain() -> Any:
    """Deeper than Python can recurse; each step reads the one before it twice."""

    def f(x: Tensor) -> Tensor:
        y = x
        for _ in range(400):
            y = y - 0.001 * y.sin()
        return y

    return f, torch.randn(2, 1)


@case("hopfield_updates_until_settled", group=GROUP)
def hopfield_updates_until_settled() -> Any:
    """The number of steps depends on the data of the sample."""
    memories = nn.Parameter(torch.randn(4, 3))

    def f(x: Tensor) -> Tensor:
        rows = []
        for row in x:
            for _ in range(5):
                new = torch.softmax(memories @ row, 0) @ memories
                settled = bool((new - row).norm() < 0.1)
                row = new
                if settled:
                    break
            rows.append(row)
        return torch.stack(rows)

    return f, torch.randn(3, 3)
