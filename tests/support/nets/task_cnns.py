"""Small networks that detect, segment, reconstruct, embed, or look at volumes: classes for `whole_models`.

Every module says its `input_shape` (one sample).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.nets.whole_cnns import conv_bn


def block(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, a batch normalisation, and SiLU."""
    return nn.Sequential(*conv_bn(before, after, kernel, stride, groups), nn.SiLU())


class Csp(nn.Module):
    """A stage of recent YOLOs: one half passes by, and every block's output is joined, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.enter, self.one, self.two = block(width, width, 1), block(half, half), block(half, half)
        self.leave = block(width + half, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        passed, value = self.enter(x).chunk(2, 1)
        return self.leave(torch.cat([passed, value, value + self.two(self.one(value))], 1))


class Yolo(nn.Module):
    """Stages with halves that pass by, pooling at growing sizes, paths up and down, anchors at three scales."""

    input_shape, kinds = (3, 32, 32), 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = block(3, 8, 3, 2), nn.Sequential(block(8, 12, 3, 2), Csp(12))
        self.b, self.c = nn.Sequential(block(12, 16, 3, 2), Csp(16)), nn.Sequential(block(16, 24, 3, 2), Csp(24))
        self.narrow, self.pooled = block(24, 12, 1), block(48, 24, 1)
        self.up_b, self.up_a = block(40, 16, 1), block(28, 12, 1)
        self.down_b, self.down_c = block(12, 12, 3, 2), block(16, 16, 3, 2)
        self.out_b, self.out_c = nn.Sequential(block(28, 16, 1), Csp(16)), nn.Sequential(block(40, 20, 1), Csp(20))
        self.heads = nn.ModuleList(nn.Conv2d(n, 3 * (5 + self.kinds), 1) for n in (12, 16, 20))
        self.register_buffer("anchors", torch.tensor([[1.0, 2], [2, 1], [2, 2]]).view(1, 3, 1, 1, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(self.stem(x))
        b = self.b(a)
        c = [self.narrow(self.c(b))]
        for _ in range(3):
            c.append(functional.max_pool2d(c[-1], 5, 1, 2))
        far = self.pooled(torch.cat(c, 1))
        b = self.up_b(torch.cat([functional.interpolate(far, scale_factor=2.0), b], 1))
        a = self.up_a(torch.cat([functional.interpolate(b, scale_factor=2.0), a], 1))
        b = self.out_b(torch.cat([self.down_b(a), b], 1))
        far = self.out_c(torch.cat([self.down_c(b), far], 1))
        return torch.cat([self.boxes(i, value) for i, value in enumerate((a, b, far))], 1)

    def boxes(self, scale: int, x: Tensor) -> Tensor:
        """Centres, sizes, objectness and classes of a scale's anchors [n, places, 5 + classes]."""
        n, _, height, width = x.shape
        x = self.heads[scale](x).view(n, 3, 5 + self.kinds, height, width).permute(0, 1, 3, 4, 2)
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        at, size, rest = torch.sigmoid(x).split((2, 2, 1 + self.kinds), 4)
        at = (at * 2 - 0.5 + torch.stack([xs, ys], 2)) / width
        return torch.cat([at, (size * 2) ** 2 * self.anchors * 2**scale, rest], 4).reshape(n, -1, 5 + self.kinds)


class AttentionUNet(nn.Module):
    """A U-Net whose shortcuts pass gates: of one channel each, from the shortcut and what is below."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 8), block(8, 12), block(12, 20)
        self.up_b, self.up_a = nn.ConvTranspose2d(20, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.below = nn.ModuleList(conv_bn(n, n // 2, 1) for n in (12, 8))
        self.beside = nn.ModuleList(conv_bn(n, n // 2, 1) for n in (12, 8))
        self.gate = nn.ModuleList(conv_bn(n // 2, 1, 1) for n in (12, 8))
        self.back_b, self.back_a, self.head = block(24, 12), block(16, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(functional.max_pool2d(a, 2))
        below = self.up_b(self.c(functional.max_pool2d(b, 2)))
        below = self.up_a(self.back_b(torch.cat([self.gate_skip(0, b, below), below], 1)))
        return self.head(self.back_a(torch.cat([self.gate_skip(1, a, below), below], 1)))

    def gate_skip(self, i: int, beside: Tensor, below: Tensor) -> Tensor:
        return beside * torch.sigmoid(self.gate[i](torch.relu(self.below[i](below) + self.beside[i](beside))))


class DeepLab(nn.Module):
    """Dilated convolutions side by side, one of them separable, with the mean of the picture; then early features."""

    input_shape = (3, 24, 24)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_bn(3, 12, 3, 2), conv_bn(12, 24, 3, 2)
        self.near = conv_bn(24, 12, 1)
        self.wide = nn.Sequential(nn.Conv2d(24, 12, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(12))
        self.wider = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=3, dilation=3, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            *conv_bn(24, 12, 1),
        )  # fmt: skip
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 12, 1), nn.ReLU())
        self.joint, self.early = conv_bn(48, 16, 1), conv_bn(12, 6, 1)
        self.last, self.head = conv_bn(22, 16), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        early = torch.relu(self.stem(x))
        far = torch.relu(self.body(early))
        mean = functional.interpolate(self.mean(far), size=far.shape[2:], mode="bilinear", align_corners=False)
        branches = [torch.relu(f(far)) for f in (self.near, self.wide, self.wider)]
        far = torch.relu(self.joint(torch.cat([*branches, mean], 1)))
        far = functional.interpolate(far, size=early.shape[2:], mode="bilinear", align_corners=False)
        out = self.head(torch.relu(self.last(torch.cat([far, torch.relu(self.early(early))], 1))))
        return functional.interpolate(out, scale_factor=2.0, mode="bilinear", align_corners=True)


class PooledVideo(nn.Module):
    """Convolutions over space and then time, with overlapping windows of maxima and means in three dimensions."""

    input_shape = (3, 6, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = (
            nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.norm, self.depth = nn.BatchNorm3d(12), nn.Conv3d(12, 12, 3, padding=1, groups=12)
        self.point, self.last = nn.Conv3d(12, 12, 1), nn.Conv3d(12, 16, 3, 2, 1)
        self.fc = nn.Linear(16 * 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.time(torch.relu(self.space(x)))))
        x = x + functional.adaptive_avg_pool3d(x, (6, 1, 1))
        x = functional.max_pool3d(x, 3, (1, 2, 2), 1)
        x = x + self.point(torch.relu(self.depth(x)))
        x = torch.relu(self.last(functional.avg_pool3d(x, (2, 3, 3), (1, 1, 1), (0, 1, 1))))
        return self.fc(functional.adaptive_avg_pool3d(x, (1, 2, 2)).flatten(1))


class AutoEncoder(nn.Module):
    """Pictures through a dense bottleneck and back by deconvolutions, one of which pads its output."""

    input_shape = (1, 14, 14)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.code, self.back = nn.Linear(12 * 16, 10), nn.Linear(10, 12 * 16)
        self.up_b = nn.ConvTranspose2d(12, 8, 3, 2, 1)
        self.norm, self.up_a = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 1, 3, 2, 1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.elu(self.b(functional.elu(self.a(x))))
        x = functional.elu(self.back(torch.tanh(self.code(x.flatten(1)))))
        x = functional.elu(self.norm(self.up_b(x.unflatten(1, (12, 4, 4)))))
        return torch.sigmoid(self.up_a(x))


class PowerMeans(nn.Module):
    """An embedding by means of a learnt power over places (GeM), and its cosines with learnt directions."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 12, 3, 2), conv_bn(12, 20, 3, 2)
        self.power, self.code, self.neck = nn.Parameter(torch.tensor(3.0)), nn.Linear(20, 10), nn.BatchNorm1d(10)
        self.kinds = nn.Parameter(torch.randn(5, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x)))).clamp(min=1e-2)
        x = functional.avg_pool2d(x.pow(self.power), x.shape[2:]).pow(1 / self.power).flatten(1)
        x = self.neck(self.code(x))
        return 8 * functional.linear(functional.normalize(x), functional.normalize(self.kinds))
