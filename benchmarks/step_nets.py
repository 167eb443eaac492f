"""The networks of the step's benchmark, in torch, and their submodels."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional

NETS = ("lenet", "vgg11_bn", "resnet20_bn", "resnet18_gn", "mobilenet_v2")
NORM_GROUPS = 4


class Block(nn.Module):
    """A residual block of two convolutions with batch or group normalisation."""

    def __init__(self, before: int, after: int, stride: int, *, groups: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = norm(after, groups), norm(after, groups)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after, groups))

    def forward(self, x: Any) -> Any:
        """[N, before, ...] to [N, after, ...]."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class Inverted(nn.Module):
    """MobileNetV2's block: wide in the middle, one filter per channel there."""

    def __init__(self, before: int, after: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = before * factor
        self.adds = stride == 1 and before == after
        layers: list[nn.Module] = []
        if factor > 1:
            layers += [nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Any) -> Any:
        """[N, before, ...] to [N, after, ...]."""
        y = self.layers(x)
        return x + y if self.adds else y


class Submodels(nn.Sequential):
    """Layers, whose depthwise convolutions take their number of groups from their weights."""

    input_shape: tuple[int, ...] = ()

    def take(self, tensors: dict[str, Any]) -> None:
        """Take the tensors of a submodel."""
        for name, value in tensors.items():
            owner, _, field = name.rpartition(".")
            part = self.get_submodule(owner)
            setattr(part, field, nn.Parameter(value) if field in part._parameters else value)
        for part in self.modules():
            if isinstance(part, nn.Conv2d) and part.groups > 1:
                part.groups = part.in_channels = part.out_channels = len(part.weight)
            if isinstance(part, nn.GroupNorm):  # whole groups are cut
                part.num_groups = max(1, part.num_groups * len(part.weight) // part.num_channels)
                part.num_channels = len(part.weight)


def norm(channels: int, groups: int = 0) -> nn.Module:
    """A batch normalisation, or a group normalisation of so many groups."""
    return nn.GroupNorm(groups, channels) if groups else nn.BatchNorm2d(channels)


def network(name: str) -> Submodels:
    """A network for ten classes.

    LeNet with 1.7 M weights, VGG11-BN with 2.3 M, ResNet20-BN with 0.27 M, ResNet18-GN with 2.8 M (half of the usual
    width), MobileNetV2 with 2.2 M, its strides those that are usual for images of 32 pixels.
    """
    layers: list[nn.Module] = []
    shape, before = (3, 32, 32), 3
    if name == "lenet":
        shape = (1, 28, 28)
        layers = [
            *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 49, 512), nn.ReLU(), nn.Linear(512, 10)),
        ]
    elif name == "vgg11_bn":
        for after in (32, 0, 64, 0, 128, 128, 0, 256, 256, 0, 256, 256, 0):
            if after:
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
            else:
                layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Linear(before, 10)]
    elif name == "resnet20_bn":
        layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        for before, after in ((16, 16), (16, 32), (32, 64)):
            layers += [Block(before, after, after // before), Block(after, after, 1), Block(after, after, 1)]
        layers += [nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10)]
    elif name == "resnet18_gn":
        groups = NORM_GROUPS
        layers = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), norm(32, groups), nn.ReLU()]
        for before, after in ((32, 32), (32, 64), (64, 128), (128, 256)):
            layers += [Block(before, after, after // before, groups=groups), Block(after, after, 1, groups=groups)]
        layers += [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)]
    else:
        layers = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        before = 32
        plan = (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for factor, after, times, stride in plan:
            for i in range(times):
                layers.append(Inverted(before, after, stride if i == 0 else 1, factor))
                before = after
        layers += [nn.Conv2d(before, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        layers += [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1280, 10)]
    net = Submodels(*layers)
    net.input_shape = shape
    return net


def loss(net: nn.Module, images: Any, labels: Any) -> Any:
    """The cross-entropy of a batch."""
    return functional.cross_entropy(net(images), labels)
