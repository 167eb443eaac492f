"""Small nets of pictures, in torch and written from the papers: random weights, 8 to 32 channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (as torch's own pages name it)


def conv(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> nn.Module:
    """Convolution, norm and activation."""
    layers = [nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Sum(nn.Module):
    """Adds what its branches compute."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum((b(x) for b in self.branches[1:]), self.branches[0](x))


class Cat(Sum):
    """Concatenates what its branches compute, along channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([b(x) for b in self.branches], 1)


def classifier(*layers: nn.Module, width: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def resnet() -> nn.Module:
    def block(before: int, after: int, stride: int) -> nn.Module:
        skip = nn.Identity() if stride == 1 else conv(before, after, 1, stride, act=None)
        inner = nn.Sequential(conv(before, after, 3, stride), conv(after, after, act=None))
        return nn.Sequential(Sum(inner, skip), nn.ReLU())

    return classifier(conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1), block(8, 8, 1), block(8, 16, 2), width=16)


def googlenet() -> nn.Module:
    def inception(before: int) -> nn.Module:
        pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(before, 4, 1))
        return Cat(conv(before, 8, 1), nn.Sequential(conv(before, 4, 1), conv(4, 8)), pool)

    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return classifier(conv(3, 16, 7, 2), pool, inception(16), inception(20), nn.Dropout(0.4), width=20)


def squeezenet() -> nn.Module:
    def fire(before: int, squeezed: int, after: int) -> nn.Module:
        first = nn.Sequential(nn.Conv2d(before, squeezed, 1), nn.ReLU())
        branches = [nn.Sequential(nn.Conv2d(squeezed, after, k, padding=k // 2), nn.ReLU()) for k in (1, 3)]
        return nn.Sequential(first, Cat(*branches))

    body = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), fire(16, 4, 8), fire(16, 8, 16)]
    return nn.Sequential(*body, nn.Conv2d(32, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ChannelAttention(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        return x * self.gate(x.mean((2, 3))).view(n, c, 1, 1)


class Cbam(nn.Module):
    """Channel and spatial attention (Woo et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1))
        self.places = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(pooled)
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * torch.sigmoid(self.places(maps))


class Ghost(nn.Module):
    """Half of the channels from cheap filters of the other half (Han et al. 2020), cut to an odd width."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        half = -(-after // 2)
        self.first, self.cheap, self.after = conv(before, half, 1), conv(half, half, 3, groups=half), after

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return torch.cat([first, self.cheap(first)], 1)[:, : self.after]


class UNet(nn.Module):
    """An encoder and a decoder with a skip connection (Ronneberger et al. 2015)."""

    def __init__(self, *, transposed: bool = True) -> None:
        super().__init__()
        self.down, self.middle = nn.Sequential(conv(3, 8), conv(8, 8)), nn.Sequential(nn.MaxPool2d(2), conv(8, 16))
        wider = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2) if transposed else nn.Sequential(wider, nn.Conv2d(16, 8, 1))
        self.end = nn.Sequential(conv(16, 8), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        return self.end(torch.cat([fine, self.up(self.middle(fine))], 1))


class DeepLab(nn.Module):
    """Dilated convolutions beside an average over the image, enlarged to the input (Chen et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8, 3, 2), conv(8, 16, 3, 2))
        self.branches = nn.ModuleList([nn.Conv2d(16, 8, 3, padding=d, dilation=d) for d in (1, 2, 4)])
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.end = nn.Sequential(conv(32, 16, 1), nn.Conv2d(16, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body(x)
        image = F.interpolate(self.image(maps), size=maps.shape[-2:], mode="bilinear", align_corners=False)
        maps = self.end(torch.cat([*(torch.relu(b(maps)) for b in self.branches), image], 1))
        return F.interpolate(maps, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Detector(nn.Module):
    """YOLO's layout: a CSP body, two scales, and a head in the form of `version` 5 or 8, decoded to boxes or raw."""

    def __init__(self, version: int, *, decoded: bool = True) -> None:
        super().__init__()
        self.version, self.decoded, self.classes, self.bins = version, decoded, 3, 4
        self.stem = nn.Sequential(conv(3, 8, 3, 2, act=nn.SiLU), conv(8, 16, 3, 2, act=nn.SiLU))
        self.left, self.right = conv(16, 8, 1, act=nn.SiLU), conv(16, 8, 1, act=nn.SiLU)
        self.deep = nn.Sequential(conv(16, 16, 3, 2, act=nn.SiLU))
        self.fuse = conv(32, 16, 1, act=nn.SiLU)
        sizes = 3 * (5 + self.classes) if version == 5 else 4 * self.bins + self.classes
        self.heads = nn.ModuleList([nn.Conv2d(16, sizes, 1) for _ in range(2)])
        self.register_buffer("anchors", torch.tensor([[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]]).float())

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = torch.cat([self.left(x), self.right(x)], 1)
        low = F.max_pool2d(self.deep(x), 5, 1, 2)
        high = self.fuse(torch.cat([x, F.interpolate(low, scale_factor=2.0, mode="nearest")], 1))
        maps = [head(m) for head, m in zip(self.heads, (high, low), strict=True)]
        if not self.decoded:
            return tuple(maps)
        return self.boxes5(maps) if self.version == 5 else self.boxes8(maps)

    def boxes5(self, maps: Sequence[Tensor]) -> Tensor:
        rows = []
        for i, m in enumerate(maps):
            n, _, h, w = m.shape
            m = m.view(n, 3, 5 + self.classes, h, w).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            y, x = torch.meshgrid(torch.arange(h).to(m), torch.arange(w).to(m), indexing="ij")
            grid = torch.stack([x, y], 2).view(1, 1, h, w, 2)
            xy, wh, conf = m.split((2, 2, 1 + self.classes), 4)
            xy = (xy * 2 - 0.5 + grid) * (4 * 2**i)
            wh = (wh * 2) ** 2 * self.anchors[i].to(m).view(1, 3, 1, 1, 2)
            rows.append(torch.cat([xy, wh, conf], 4).view(n, -1, 5 + self.classes))
        return torch.cat(rows, 1)

    def boxes8(self, maps: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([m.view(m.shape[0], m.shape[1], -1) for m in maps], 2)
        box, scores = flat.split((4 * self.bins, self.classes), 1)
        n, _, places = box.shape
        box = box.view(n, 4, self.bins, places).transpose(2, 1).softmax(1)
        box = F.conv2d(box, torch.arange(self.bins).to(box).view(1, self.bins, 1, 1)).view(n, 4, places)
        grids, strides = [], []
        for i, m in enumerate(maps):
            h, w = m.shape[-2:]
            y, x = torch.meshgrid(torch.arange(h).to(m) + 0.5, torch.arange(w).to(m) + 0.5, indexing="ij")
            grids.append(torch.stack([x, y], -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), 4.0 * 2**i).to(m))
        anchors, stride = torch.cat(grids).t()[None], torch.cat(strides).t()[None]
        first, last = box.chunk(2, 1)
        first, last = anchors - first, anchors + last
        return torch.cat([torch.cat([(first + last) / 2, last - first], 1) * stride, scores.sigmoid()], 1)


class Ssd(nn.Module):
    """Boxes and scores of two scales, each concatenated over its places (Liu et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 16, 3, 4), conv(16, 16, 3, 2)
        self.boxes = nn.ModuleList([nn.Conv2d(16, 2 * 4, 3, padding=1) for _ in range(2)])
        self.scores = nn.ModuleList([nn.Conv2d(16, 2 * 3, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        maps = (first, self.second(first))

        def rows(heads: nn.ModuleList, size: int) -> Tensor:
            flat = [h(m).permute(0, 2, 3, 1).reshape(m.size(0), -1, size) for h, m in zip(heads, maps, strict=True)]
            return torch.cat(flat, 1)

        return rows(self.boxes, 4), rows(self.scores, 3)


class VisionTransformer(nn.Module):
    """Patches, a class token (with `distilled` a second one, as DeiT), position embeddings, an encoder."""

    def __init__(self, *, distilled: bool = False) -> None:
        super().__init__()
        self.patches, tokens = nn.Conv2d(3, 16, 8, 8), 2 if distilled else 1
        self.tokens = nn.ParameterList([nn.Parameter(torch.randn(1, 1, 16)) for _ in range(tokens)])
        self.places = nn.Parameter(torch.randn(1, 16 + tokens, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body, self.norm = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.LayerNorm(16)
        self.heads = nn.ModuleList([nn.Linear(16, 10) for _ in range(tokens)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([*(t.expand(x.shape[0], -1, -1) for t in self.tokens), x], 1) + self.places
        x = self.norm(self.body(x))
        return sum((h(x[:, i]) for i, h in enumerate(self.heads[1:], 1)), self.heads[0](x[:, 0])) / len(self.heads)


class Mixer(nn.Module):
    """MLPs over patches and channels (Tolstikhin et al. 2021), or gates over patches (gMLP, Liu et al. 2021)."""

    def __init__(self, *, gated: bool = False) -> None:
        super().__init__()
        self.patches, self.gated, self.norm = nn.Conv2d(3, 16, 8, 8), gated, nn.LayerNorm(16)
        self.over_patches, self.gate_norm = nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.LayerNorm(16)
        self.over_channels = nn.Sequential(nn.Linear(16, 32), nn.GELU())
        self.back, self.end = nn.Linear(16 if gated else 32, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if not self.gated:
            x = x + self.over_patches(self.norm(x).transpose(1, 2)).transpose(1, 2)
            return self.end((x + self.back(self.over_channels(x))).mean(1))
        u, v = self.over_channels(self.norm(x)).chunk(2, -1)
        v = self.over_patches[0](self.gate_norm(v).transpose(1, 2)).transpose(1, 2)
        return self.end((x + self.back(u * v)).mean(1))


class Siamese(nn.Module):
    """Two pictures through one body; the distance's logit."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 8, 3, 2), conv(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.end = nn.Linear(16, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.end(torch.abs(self.body(left) - self.body(right)))


class Srgan(nn.Module):
    """Super resolution: residual blocks with PReLU, and a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16))
        self.body = Sum(nn.Sequential(conv(16, 16, act=nn.PReLU), conv(16, 16, act=None)), nn.Identity())
        self.end = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.end(self.body(self.first(x))))


class DepthMap(nn.Module):
    """Depth from a picture: nearest and bicubic enlargements, reflected borders, ELU (Godard et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 16, 3, 2), nn.ELU())
        self.up, self.end = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(16, 8, 3), nn.ELU()), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.interpolate(self.down(x), scale_factor=2, mode="nearest"))
        return F.interpolate(torch.sigmoid(self.end(x)), size=(24, 24), mode="bicubic", align_corners=False)


class Qat(nn.Module):
    """A net after quantisation-aware training: fake quantisation of weights per channel, and of values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.end = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = torch.fake_quantize_per_tensor_affine(x, 0.03, 128, 0, 255)
            with torch.no_grad():
                scale = torch.full((16,), 0.003)
                weight = torch.fake_quantize_per_channel_affine(
                    layer.weight, scale, torch.zeros(16).int(), 0, -128, 127
                )
            x = F.relu(F.conv2d(x, weight, layer.bias, layer.stride, layer.padding))
        return self.end(torch.fake_quantize_per_tensor_affine(x, 0.02, 0, 0, 255).mean((2, 3)))
