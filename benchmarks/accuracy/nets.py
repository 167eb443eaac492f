"""Networks of the experiments, made as torch modules and imported as a user's would be."""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.accuracy import sets
from benchmarks.accuracy.strategy_code import code_of
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.datasets.data_plan import DataPlan

FOLDER = Path("build/accuracy/nets")


def model(name: str, shape: tuple[int, ...], classes: int, seed: int) -> Model:
    """A network for samples of a shape, with weights drawn by a seed. The file is kept: exporting takes seconds."""
    size = "x".join(map(str, shape))
    path = FOLDER / f"{name}-{definition(name)[:8]}-{size}-{classes}-{seed}.onnx"
    if not path.exists():
        import torch

        torch.manual_seed(seed)
        raw = export_torch(NETS[name](shape, classes), input_shape=shape, name=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{seed}.part")
        part.write_bytes(raw)
        part.rename(path)
    return import_onnx(path.read_bytes(), name)


@cache
def definition(name: str) -> str:
    """Digest of the code that makes a network, without comments and docstrings: what is edited is another network."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    parts: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            parts[node.name] = node
        elif isinstance(node, ast.Assign):
            parts |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            made = zip(node.value.keys, node.value.values, strict=True)
            parts |= {f"NETS {ast.literal_eval(k)}": v for k, v in made if k is not None}
    left = [f"NETS {name}"]
    used = set(left)
    while left:
        for node in ast.walk(parts[left.pop()]):
            if isinstance(node, ast.Name) and node.id in parts and node.id not in used:
                used.add(node.id)
                left.append(node.id)
    text = "\n".join(f"{n} {code_of(parts[n])}" for n in sorted(used))
    return hashlib.sha256(text.encode()).hexdigest()


def small_cnn(shape: tuple[int, ...], classes: int) -> Any:
    """conv 32-64-128-128 with batch norm, 242 k parameters for 3 colours: the small trials' net."""
    from torch import nn

    layers, before = [], shape[0]
    for place, after in enumerate((32, 64, 128, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if place < 3:
            layers.append(nn.MaxPool2d(2))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def trained(make: Callable[[tuple[int, ...], int], Any], shape: tuple[int, ...], classes: int) -> Any:
    """A net after five epochs on 20,000 images of CIFAR-100, pooled to the shape, with a new last layer (its last
    module is a linear one): where fine-tuning begins."""
    import torch
    from torch import nn
    from torch.nn import functional

    plan = DataPlan(
        source="cifar100", partition="iid", devices=1, most=21_000, test=0.04, pool=32 // shape[-1], standardise=True
    )
    federation = plan.deal(sets.samples("cifar100"))
    data = federation.load(*federation.names)
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    net, epochs, batch = make(shape, 100), 5, 64
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(y) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(y))[: len(y) // batch * batch].split(batch):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            decay.step()
    net[-1] = nn.Linear(net[-1].in_features, classes)
    return net


def resnet8(shape: tuple[int, ...], classes: int) -> Any:
    """Three stages of one residual block (16, 32, 64 channels), 1×1 shortcuts where the width changes; 78 k."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(_block()(before, after, after // before) for before, after in ((16, 16), (16, 32), (32, 64))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def resnet32(shape: tuple[int, ...], classes: int) -> Any:
    """CA-HFP's ResNet-32: three stages of five residual blocks, 466 k parameters."""
    from torch import nn

    layers, before = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 16
    for after in (16, 32, 64):
        for place in range(5):
            layers.append(_block()(before, after, 2 if place == 0 and after > 16 else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def motion_net(shape: tuple[int, ...], classes: int) -> Any:
    """Three one-dimensional convolutions with batch norm over time, for HAR's nine signals; 83 k."""
    from torch import nn

    layers, before = [], shape[0]
    for after, kernel in ((48, 9), (96, 7), (96, 5)):
        layers += [nn.Conv1d(before, after, kernel, padding=kernel // 2, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        layers.append(nn.MaxPool1d(2))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(before, classes))


def vgg(plan: tuple[int, ...], head: tuple[int, ...], norm: bool, shape: tuple[int, ...], classes: int) -> Any:
    """VGG for 32×32 images: widths of 3×3 convolutions (0: pool), then of hidden linear layers."""
    from torch import nn

    layers: list[Any] = []
    before, side = shape[0], shape[1]
    for after in plan:
        if not after:
            layers.append(nn.MaxPool2d(2))
            side //= 2
            continue
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=not norm)]
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers.append(nn.ReLU())
        before = after
    layers.append(nn.Flatten())
    before *= side * side
    for after in head:
        layers += [nn.Linear(before, after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.Linear(before, classes))


def two_convs(
    kernel: int, widths: tuple[int, int], hidden: int, shape: tuple[int, ...], classes: int, *, pad: int = 0
) -> Any:
    """Two convolutions with pooling and one hidden linear layer, without norm (FedOBP, AutoFLIP)."""
    from torch import nn

    layers: list[Any] = []
    before, side = shape[0], shape[1]
    for after in widths:
        layers += [nn.Conv2d(before, after, kernel, padding=pad), nn.ReLU(), nn.MaxPool2d(2)]
        before, side = after, (side + 2 * pad - kernel + 1) // 2
    layers += [nn.Flatten(), nn.Linear(before * side * side, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers)


def mlp(shape: tuple[int, ...], classes: int) -> Any:
    """Two hidden layers, without norm."""
    from torch import nn

    first, second = nn.Linear(math.prod(shape), 128), nn.Linear(128, 64)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(64, classes))


def mean_cnn(shape: tuple[int, ...], classes: int) -> Any:
    """Two convolutions without norm, and the mean over places."""
    from torch import nn

    first, second = nn.Conv2d(shape[0], 24, 3, padding=1), nn.Conv2d(24, 48, 3, padding=1)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, classes))
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), *head)


def modern(shape: tuple[int, ...], classes: int) -> Any:
    """A small ConvNeXt (Liu et al. 2022) with group norm: patches of 2×2, two blocks of 32 channels, two of 64."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
            self.mlp = nn.Sequential(
                nn.GroupNorm(1, width), nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1)
            )

        def forward(self, x: Any) -> Any:
            return x + self.mlp(self.depthwise(x))

    layers, before = [], shape[0]
    for after in (32, 64):
        layers += [nn.Conv2d(before, after, 2, 2), Block(after), Block(after)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def recurrent(shape: tuple[int, ...], classes: int) -> Any:
    """A strided convolution over time, a GRU, and the mean of its outputs."""
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.rnn, self.head = nn.Conv1d(shape[0], 32, 8, 4), nn.GRU(32, 64), nn.Linear(64, classes)

        def forward(self, x: Any) -> Any:
            return self.head(self.rnn(self.steps(x).relu().permute(2, 0, 1))[0].mean(0))

    return Recurrent()


def attention(shape: tuple[int, ...], classes: int) -> Any:
    """A transformer of two blocks over pieces of time, or over an image's pairs of columns, and a mean over them."""
    import torch
    from torch import nn

    from benchmarks.tasks.nets import Block

    size = shape[-1] // (16 if shape[-1] % 16 == 0 else 14)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(size * math.prod(shape[:-1]), 48)
            self.place = nn.Parameter(0.02 * torch.randn(shape[-1] // size, 48))
            self.blocks = nn.Sequential(*(Block(48, 4, causal=False) for _ in range(2)))
            self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, classes)

        def forward(self, x: Any) -> Any:
            pieces = x.flatten(1, -2).transpose(1, 2).unflatten(1, (-1, size)).flatten(2)
            return self.head(self.norm(self.blocks(self.embed(pieces) + self.place)).mean(1))

    return Attention()


_VGG11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)

NETS: dict[str, Callable[[tuple[int, ...], int], Any]] = {
    "small_cnn": small_cnn,
    "small_cnn_trained": lambda shape, classes: trained(small_cnn, shape, classes),
    "resnet8": resnet8,
    "resnet32": resnet32,
    "motion_net": motion_net,
    "mlp": mlp,
    "mean_cnn": mean_cnn,
    "modern": modern,
    "recurrent": recurrent,
    "attention": attention,
    "vgg11": lambda shape, classes: vgg(_VGG11, (), True, shape, classes),
    "vgg11_plain": lambda shape, classes: vgg(_VGG11, (512, 512), False, shape, classes),
    "vgg16": lambda shape, classes: vgg(_VGG16, (512,), True, shape, classes),
    "avgcnn": lambda shape, classes: two_convs(5, (32, 64), 512, shape, classes),
    "two_cnn": lambda shape, classes: two_convs(5, (32, 64), 512, shape, classes, pad=2),
    # The last pool of VGG has nothing left to pool at 16×16: one less, and narrow enough for a processor.
    "small_vgg": lambda shape, classes: vgg((32, 0, 64, 0, 128, 128, 0), (128, 128), False, shape, classes),
}


@cache
def _block() -> Any:
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
            self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.shortcut = nn.Sequential()
            if before != after:
                self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + self.shortcut(x)).relu()

    return Block
