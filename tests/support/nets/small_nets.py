"""Small torch networks that tests share: factories without arguments, as a user would name them.

Every module says its `input_shape` (one sample). Weights, batch-norm vectors and statistics are random,
but the same each time.
"""

from collections.abc import Callable

import torch
from torch import nn


class LeNet(nn.Module):
    """Two convolutions, flatten, three linear layers: the inner dimension of a flattened channel is 16."""

    input_shape = (1, 28, 28)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = torch.relu(self.fc1(x))
        return self.fc3(torch.relu(self.fc2(x)))


class VGG11(nn.Module):
    """VGG11 with batch normalisation for 32×32 images."""

    input_shape = (3, 32, 32)

    def __init__(self, classes: int = 10, width: float = 0.25) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                out = int(int(entry) * width)
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(
        self, before: int, after: int, stride: int, activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet20 for 32×32 images."""

    input_shape = (3, 32, 32)

    def __init__(self, classes: int = 10, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        before = width
        for stage in range(3):
            after = width * 2**stage
            for block in range(blocks):
                stages.append(BasicBlock(before, after, 2 if stage and not block else 1))
                before = after
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class ConcatNet(nn.Module):
    """A small DenseNet: concatenations, normalisation over the whole, flatten with an inner dimension."""

    input_shape = (3, 16, 16)

    def __init__(self, classes: int = 10, growth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + growth * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + growth * i, growth, 3, padding=1, bias=False) for i in range(3))
        self.last = nn.BatchNorm2d(8 + growth * 3)
        self.pool = nn.AvgPool2d(4)
        self.fc = nn.Linear((8 + growth * 3) * 16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return self.fc(torch.flatten(self.pool(torch.relu(self.last(x))), 1))


class Reader(nn.Module):
    """Attention over tokens, a linear layer of one row, and one that is tied to the embedding."""

    input_shape, input_dtype = (6,), "int64"

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.q, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.wide, self.out = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.words(x))
        looks = (self.q(hidden) @ hidden.transpose(1, 2) / 4).softmax(-1) @ self.v(hidden)
        return self.out(torch.relu(self.wide(looks.mean(1)))) + (hidden.mean(1) @ self.words.weight.T)[:, :5]


def randomise_norms(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with batch-norm vectors and statistics that are not just zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                if layer.affine:
                    layer.weight.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
                    layer.bias.copy_(torch.randn(layer.num_features, generator=generator) * 0.2)
                layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator) * 0.2)
                layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
    return module.eval()


def _make(kind: type[nn.Module], **arguments: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise_norms(kind(**arguments))


def lenet() -> nn.Module:
    return _make(LeNet)


def vgg11_bn() -> nn.Module:
    return _make(VGG11)


def resnet20_bn() -> nn.Module:
    return _make(ResNet20)


def concat_net() -> nn.Module:
    return _make(ConcatNet)


class UNet(nn.Module):
    """Two levels down and up again; one label per pixel, flattened. By default without batch norm."""

    def __init__(self, width: int = 16, size: int = 64, *, normalised: bool = False) -> None:
        super().__init__()
        self.input_shape = (3, size, size)

        def block(before: int, after: int) -> nn.Module:
            layers: list[nn.Module] = []
            for channels in (before, after):
                layers += [nn.Conv2d(channels, after, 3, padding=1), nn.ReLU()]
                if normalised:
                    layers.insert(-1, nn.BatchNorm2d(after))
            return nn.Sequential(*layers)

        self.outer, self.inner, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up_inner = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up_outer = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.back_inner, self.back_outer = block(4 * width, 2 * width), block(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outer = self.outer(x)
        inner = self.inner(torch.max_pool2d(outer, 2))
        inner = self.back_inner(torch.cat([self.up_inner(self.bottom(torch.max_pool2d(inner, 2))), inner], 1))
        outer = self.back_outer(torch.cat([self.up_outer(inner), outer], 1))
        return torch.flatten(self.head(outer), 1)


class GRUNet(nn.Module):
    """Two layers of GRU over a series, and a linear layer."""

    def __init__(self, hidden: int = 256, steps: int = 128, features: int = 9, classes: int = 6) -> None:
        super().__init__()
        self.input_shape = (steps, features)
        self.gru = nn.GRU(features, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(x)[0][:, -1])


def unet() -> nn.Module:
    return _make(UNet)


def unet_bn() -> nn.Module:
    return _make(UNet, normalised=True)


def gru_net() -> nn.Module:
    return _make(GRUNet)


class LSTMNet(nn.Module):
    """A layer of LSTM in both directions over a series, and a linear layer."""

    def __init__(self, hidden: int = 128, steps: int = 128, features: int = 9, classes: int = 6) -> None:
        super().__init__()
        self.input_shape = (steps, features)
        self.lstm = nn.LSTM(features, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0].mean(1))


def lstm_net() -> nn.Module:
    return _make(LSTMNet)
