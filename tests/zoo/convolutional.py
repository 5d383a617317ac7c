"""Convolutions of every dimension and flavour, alone and in the shapes people build from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import case

GROUP = "convolutional"


@case("cnn_1d", group=GROUP)
def cnn_1d() -> Any:
    model = nn.Sequential(
        nn.Conv1d(1, 3, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return model, torch.randn(4, 1, 16)


@case("lenet", group=GROUP)
def lenet() -> Any:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Softmax(1),
    )  # fmt: skip
    return model, torch.randn(4, 1, 12, 12)


class CausalBlock(nn.Module):
    """A temporal convolution: padded on the left only, dilated, residual."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(F.pad(x, (self.dilation, 0))))


@case("temporal_convolution", group=GROUP)
def temporal_convolution() -> Any:
    return nn.Sequential(CausalBlock(2, 1), CausalBlock(2, 2), CausalBlock(2, 4)), torch.randn(
        3, 2, 9
    )


@case("conv_3d", group=GROUP)
def conv_3d() -> Any:
    model = nn.Sequential(
        nn.Conv3d(2, 3, (2, 3, 3), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 1, 2)),
        nn.Sigmoid(),
        nn.AvgPool3d(2),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    x = torch.randn(3, 2, 3, 6, 6)
    model(x)
    return model, x


@case("conv_strided_dilated_grouped", group=GROUP)
def conv_strided_dilated_grouped() -> Any:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), nn.ELU(),
        nn.Conv2d(6, 3, (1, 2), stride=2, groups=3, bias=False),
    )  # fmt: skip
    return model, torch.randn(3, 4, 5, 5)


class Separable(nn.Module):
    """MobileNet's inverted residual: expand, depthwise, project, add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 1), nn.Hardswish(),
            nn.Conv2d(6, 6, 3, padding="same", groups=6), nn.Hardswish(),
            nn.Conv2d(6, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@case("depthwise_separable", group=GROUP)
def depthwise_separable() -> Any:
    return nn.Sequential(Separable(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(
        3, 3, 6, 6
    )


@case("conv_transposed", group=GROUP)
def conv_transposed() -> Any:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1, groups=1), nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2, dilation=2, groups=2),
    )  # fmt: skip
    return model, torch.randn(2, 3, 2, 2)


@case("conv_transposed_1d_3d", group=GROUP)
def conv_transposed_1d_3d() -> Any:
    flat, solid = nn.ConvTranspose1d(2, 4, 3, stride=2), nn.ConvTranspose3d(1, 1, 2, bias=False)
    return lambda x: solid(flat(x).tanh().view(-1, 1, 2, 2, 7)), torch.randn(2, 2, 3)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.up1 = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.gelu(self.down1(x))
        narrow = F.gelu(self.down2(F.max_pool2d(wide, 2)))
        back = self.up2(F.gelu(self.middle(narrow)))
        return self.up1(torch.cat([wide, back], dim=1))


@case("unet_maps_out", group=GROUP)
def unet_maps_out() -> Any:
    return UNet(), torch.randn(2, 1, 6, 6)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 2, 1)
        self.three = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(2, 2, 1))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.one(x), self.three(x), self.pooled(x)], dim=1).relu()
        return self.head(x.mean(dim=(2, 3)))


@case("inception", group=GROUP)
def inception() -> Any:
    return Inception(), torch.randn(3, 2, 5, 5)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]


@case("squeeze_excite", group=GROUP)
def squeeze_excite() -> Any:
    return nn.Sequential(SqueezeExcite(3), nn.Flatten(), nn.Linear(48, 3)), torch.randn(3, 3, 4, 4)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


@case("resnet_eval", group=GROUP)
def resnet_eval() -> Any:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        BasicBlock(4, 4, 1), BasicBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip
    model(torch.randn(8, 3, 8, 8))  # running statistics that are not 0 and 1
    return model.eval(), torch.randn(3, 3, 8, 8)


@case("pixel_shuffle", group=GROUP)
def pixel_shuffle() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2), nn.PixelUnshuffle(2))
    return nn.Sequential(model, nn.ChannelShuffle(2), nn.Sigmoid()), torch.randn(2, 1, 3, 3)


@case("channels_last", group=GROUP)
def channels_last() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2))
    x = torch.randn(3, 3, 6, 6).to(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), x


@case("padding_modes_of_conv", group=GROUP)
def padding_modes_of_conv() -> Any:
    modes = ("reflect", "replicate", "circular")
    layers = [nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode=mode) for mode in modes]
    return nn.Sequential(*layers, nn.AvgPool2d(3)), torch.randn(2, 2, 4, 4)


@case("padding_layers", group=GROUP)
def padding_layers() -> Any:
    model = nn.Sequential(
        nn.ReflectionPad1d((1, 2)), nn.ReplicationPad1d((2, 0)), nn.CircularPad1d(1),
        nn.ZeroPad1d((0, 1)), nn.ConstantPad1d((1, -2), 0.5), nn.Conv1d(2, 3, 4, stride=3),
    )  # fmt: skip
    return model, torch.randn(3, 2, 5)


@case("interpolate_every_mode", group=GROUP)
def interpolate_every_mode() -> Any:
    def f(x: Tensor) -> Tensor:
        x = F.interpolate(x.tanh(), scale_factor=2, mode="bilinear", align_corners=False)
        x = F.interpolate(x.tanh(), size=(5, 4), mode="bicubic", align_corners=True)
        x = F.interpolate(x.tanh(), size=(4, 4), mode="bilinear", antialias=True)
        x = F.interpolate(x.tanh(), size=(3, 3), mode="area")
        return F.interpolate(x.tanh(), size=(2, 4), mode="nearest")

    return f, torch.randn(2, 2, 3, 3)


@case("interpolate_1d_3d", group=GROUP)
def interpolate_1d_3d() -> Any:
    def f(x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=1.5, mode="linear").sin().unflatten(2, (1, 2, 3))
        x = F.interpolate(x, size=(2, 2, 2), mode="trilinear", align_corners=True)
        return F.interpolate(x, size=(1, 3, 3), mode="nearest-exact").flatten(2)

    return f, torch.randn(2, 2, 4)


@case("unfold_and_fold", group=GROUP)
def unfold_and_fold() -> Any:
    """Patches by im2col, mixed linearly, put back where they overlap."""
    mix = nn.Linear(8, 8)

    def f(x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, padding=1, stride=2)
        patches = torch.tanh(mix(patches.mT)).mT
        return F.fold(patches, (4, 4), 2, padding=1, stride=2)

    return f, torch.randn(2, 2, 4, 4)


@case("kernel_per_sample_by_groups", group=GROUP)
def kernel_per_sample_by_groups() -> Any:
    """The batch is folded into the channels, so one grouped convolution serves every sample."""
    maker = nn.Linear(3, 18)

    def f(x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        kernels = maker(x.mean((2, 3))).view(n * 2, channels, 1, 3)
        out = F.conv2d(x.reshape(1, n * channels, height, width), kernels, groups=n)
        return out.view(n, 2, height, width - 2)

    return f, torch.randn(3, 3, 2, 4)


@case("coordinates_appended", group=GROUP)
def coordinates_appended() -> Any:
    conv = nn.Conv2d(3, 2, 2)

    def f(x: Tensor) -> Tensor:
        line = torch.linspace(-1, 1, 4, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)
        return conv(torch.cat([x, grid], 1)).amax((2, 3))

    return f, torch.randn(3, 1, 4, 4)


class LocallyConnected(nn.Module):
    """A kernel of its own at every place: windows by ``unfold``, products by ``einsum``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unfold(2, 3, 1)
        return torch.einsum("nclk,lock->nol", windows, self.weight)


@case("locally_connected", group=GROUP)
def locally_connected() -> Any:
    return nn.Sequential(LocallyConnected(), nn.Softsign()), torch.randn(3, 2, 6)
