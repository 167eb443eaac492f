"""Small convolutional networks, each a whole one of its kind: factories' classes for `whole_models`.

Every module says its `input_shape` (one sample).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def conv_bn(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(after)
    )


class UNet(nn.Module):
    """Two levels down and up with transposed convolutions, concatenated skips, then pooled to classes."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.mix2, self.mix1 = conv_bn(24, 12), conv_bn(16, 8)
        self.head = nn.Conv2d(8, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = torch.relu(self.down1(x))
        two = torch.relu(self.down2(torch.max_pool2d(one, 2)))
        x = torch.relu(self.bottom(torch.max_pool2d(two, 2)))
        x = torch.relu(self.mix2(torch.cat([self.up2(x), two], 1)))
        x = torch.relu(self.mix1(torch.cat([self.up1(x), one], 1)))
        return self.head(x).mean((2, 3))


class SensorNet(nn.Module):
    """A 1-D network for windows of a motion sensor: strided, depthwise and dilated convolutions."""

    input_shape = (9, 64)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv1d(9, 16, 7, 2, 3), nn.BatchNorm1d(16)
        self.depth, self.point = nn.Conv1d(16, 16, 5, 1, 2, groups=16), nn.Conv1d(16, 24, 1)
        self.norm2 = nn.BatchNorm1d(24)
        self.wide = nn.Conv1d(24, 24, 3, 1, 4, dilation=4)
        self.fc1, self.fc2 = nn.Linear(24 * 4, 32), nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool1d(torch.relu(self.norm1(self.stem(x))), 2)
        x = functional.silu(self.norm2(self.point(self.depth(x))))
        x = functional.avg_pool1d(x + self.wide(x), 4)
        return self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))


class GroupNormBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(4, after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.GroupNorm(4, after)
        self.shortcut = nn.Conv2d(before, after, 1, stride) if before != after or stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class GroupNormResNet(nn.Module):
    """A ResNet with group normalisation."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(4, 16)
        self.blocks = nn.Sequential(GroupNormBlock(16, 16, 1), GroupNormBlock(16, 32, 2), GroupNormBlock(32, 32, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass, the other half is convolved, then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), nn.ReLU(), conv_bn(half, half, 3, groups=half), conv_bn(half, half, 1), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNetV2(nn.Module):
    """A stem, three units that shuffle channels, a last convolution."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.units = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16), ShuffleUnit(16))
        self.last, self.fc = conv_bn(16, 32, 1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.last(self.units(torch.relu(self.stem(x))))).mean((2, 3)))


class GatedLinearUnits(nn.Module):
    """Convolutions whose halves gate each other."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(16, 48, 3, 2, 1)
        self.fc1, self.fc2 = nn.Linear(24, 40), nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.glu(self.b(functional.glu(self.a(x), 1)), 1).mean((2, 3))
        return self.fc2(functional.glu(self.fc1(x), 1))


class GateOfOneChannel(nn.Module):
    """A map of one channel weighs all places of a feature map."""

    input_shape = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 1, 1), nn.Conv2d(32, 16, 3, 2, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        return self.fc(torch.relu(self.b(x * torch.sigmoid(self.gate(x)))).mean((2, 3)))


class ChunkAndConcat(nn.Module):
    """Channels are taken apart, treated in different ways and put together in another order."""

    input_shape = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 24, 3, 1, 1)
        self.b, self.c = nn.Conv2d(8, 12, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.last, self.fc = nn.Conv2d(28, 16, 3, 2, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two, three = torch.relu(self.a(x)).chunk(3, 1)
        x = torch.cat([three, torch.relu(self.b(one)), self.c(two)], 1)
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class SqueezeAndExcite(nn.Module):
    """Inverted residuals with squeeze-and-excitation."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2)
        self.expand, self.depth, self.project = conv_bn(8, 32, 1), conv_bn(32, 32, 5, groups=32), conv_bn(32, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(32, 6, 1), nn.Conv2d(6, 32, 1)
        self.last, self.fc = conv_bn(8, 24, 1), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.hardswish(self.stem(x))
        y = functional.relu6(self.depth(functional.relu6(self.expand(x))))
        scale = self.excite(torch.relu(self.squeeze(functional.adaptive_avg_pool2d(y, 1))))
        x = x + self.project(y * functional.hardsigmoid(scale))
        return self.fc(functional.adaptive_avg_pool2d(functional.hardswish(self.last(x)), 1).flatten(1))


class PaddedShortcuts(nn.Module):
    """Residual blocks whose shortcut has more channels by padding: ResNet's option A."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a1, self.a2 = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8)
        self.b1, self.b2 = conv_bn(8, 16, 3, 2), conv_bn(16, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a2(torch.relu(self.a1(x))))
        short = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = torch.relu(short + self.b2(torch.relu(self.b1(x))))
        return self.fc(x.mean((2, 3)))


class Inception(nn.Module):
    """Branches of several kernel sizes and a pooled one, concatenated, with a dense layer after a flatten."""

    input_shape = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.one, self.three, self.five = conv_bn(12, 6, 1), conv_bn(12, 10, 3), conv_bn(12, 4, 5)
        self.pooled = conv_bn(12, 5, 1)
        self.norm, self.fc = nn.BatchNorm2d(25), nn.Linear(25 * 9, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        around = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(around)], 1)
        x = functional.max_pool2d(torch.relu(self.norm(x)), 3, 3, ceil_mode=True)[:, :, :3, :3]
        return self.fc(x.flatten(1))


class Grouped(nn.Module):
    """A ResNeXt: grouped convolutions of several channels each, between 1×1 ones, with shortcuts."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.reduce, self.grouped, self.expand = conv_bn(16, 24, 1), conv_bn(24, 24, 3, groups=4), conv_bn(24, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.expand(torch.relu(self.grouped(torch.relu(self.reduce(x))))))
        return self.fc(functional.adaptive_max_pool2d(x, 1).flatten(1))


class StandardisedConv(nn.Conv2d):
    """A convolution whose kernels are normalised, as a batch normalisation does it, in every forward pass."""

    def __init__(self, before: int, after: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, 3, stride, 1, groups=groups)
        self.gain = nn.Parameter(torch.full((after, 1, 1, 1), 1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(kernels, None, None, self.gain.reshape(-1), training=True, eps=1e-6)
        weight = weight.reshape_as(self.weight) * (9 * self.in_channels / self.groups) ** -0.5
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormalizerFree(nn.Module):
    """No normalisation but that of kernels; a residual block with a gain."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = StandardisedConv(3, 12, 2), StandardisedConv(12, 16), StandardisedConv(16, 12)
        self.gain, self.last, self.fc = nn.Parameter(torch.zeros(())), StandardisedConv(12, 24, 2), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.silu(self.stem(x)) * 1.7881
        x = x + 0.2 * self.gain * self.b(functional.silu(self.a(x)) * 1.7881)
        return self.fc(functional.silu(self.last(x)).mean((2, 3)))


class Ghost(nn.Module):
    """GhostNet's module: half of the channels are a depthwise convolution of the other half."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.primary, self.cheap = conv_bn(12, 10, 1), conv_bn(10, 10, 3, groups=10)
        self.last, self.fc = conv_bn(20, 16, 3, 2), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.primary(torch.relu(self.stem(x))))
        x = torch.cat([x, torch.relu(self.cheap(x))], 1)
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class FeaturePyramid(nn.Module):
    """Three scales that are resized and added, then pixel-shuffled, with leaky units and PReLU."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 8), conv_bn(8, 12, 3, 2), conv_bn(12, 16, 3, 2)
        self.side_a, self.side_b, self.side_c = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 1), nn.Conv2d(16, 12, 1)
        self.smooth, self.slope = conv_bn(12, 16), nn.PReLU(16)
        self.last = nn.Conv2d(4, 10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = functional.leaky_relu(self.a(x))
        b = functional.elu(self.b(a))
        c = functional.gelu(self.c(b))
        x = self.side_b(b) + functional.interpolate(self.side_c(c), scale_factor=2)
        x = self.side_a(a) + functional.interpolate(x, scale_factor=2, mode="bilinear")
        x = functional.pixel_shuffle(self.slope(self.smooth(x)), 2)
        return self.last(x).mean((2, 3))


class ConvMixer(nn.Module):
    """Patches, then depthwise convolutions with shortcuts and 1×1 ones."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 4, 4), nn.BatchNorm2d(24)
        self.depth = nn.ModuleList(conv_bn(24, 24, 3, groups=24) for _ in range(2))
        self.point = nn.ModuleList(conv_bn(24, 24, 1) for _ in range(2))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(functional.gelu(self.stem(x)))
        for depth, point in zip(self.depth, self.point, strict=True):
            x = functional.gelu(point(x + functional.gelu(depth(x))))
        return self.fc(x.mean((2, 3)))


class Video(nn.Module):
    """3-D convolutions over a few frames."""

    input_shape = (3, 4, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv3d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm3d(8)
        self.b, self.fc = nn.Conv3d(8, 12, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool3d(torch.relu(self.norm(self.a(x))), (2, 1, 1))
        return self.fc(torch.relu(self.b(x)).mean((2, 3, 4)))
