"""Small convolutional networks, each a whole one of its kind: factories' classes for `whole_models`.

Every module says its `input_shape` (one sample).
"""

import torch
from torch import nn
from torch.nn import functional


def conv_bn(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(after)
    )


class GroupNormBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(4, after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.GroupNorm(4, after)
        self.shortcut = nn.Conv2d(before, after, 1, stride) if before != after or stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


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
        x = torch.relu(functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.b2(torch.relu(self.b1(x))))
        return self.fc(x.mean((2, 3)))


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
