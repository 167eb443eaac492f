"""Torch-Pruning as an oracle: the groups it finds, and networks that it has physically pruned."""

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.model.architecture import Architecture, TensorKind
from fedprune.model.selection import Selection

Side = tuple[str, str]  # a layer's name, and which of its sides ("in" or "out")

LayerGroup = tuple[frozenset[Side], int]
"""The sides of layers that can only be cut together, and how many channels that are."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)


def our_groups(architecture: Architecture, module: nn.Module) -> Counter[LayerGroup]:
    """Per channel group the sides of convolutions and dense layers that it touches, and its size."""
    layers = {n: submodule for n, submodule in module.named_modules() if isinstance(submodule, LAYERS)}
    groups: Counter[LayerGroup] = Counter()
    for i, group in enumerate(architecture.groups):
        sides = set()
        for tensor in architecture.tensors:
            layer = tensor.name.rpartition(".")[0]
            if tensor.kind is not TensorKind.WEIGHT or layer not in layers or not tensor.name.endswith(".weight"):
                continue
            out = 1 if isinstance(layers[layer], TRANSPOSED) else 0
            sides |= {(layer, "out" if axis == out else "in") for axis in (0, 1) if i in tensor.axes[axis].groups}
        groups[frozenset(sides), group.size] += 1
    return groups


def dependency_graph(module: nn.Module, **options: Any) -> tuple[Any, Any]:
    """The package and its dependency graph of a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp = pytest.importorskip("torch_pruning")
        graph = tp.DependencyGraph().build_dependency(module, torch.zeros((2, *module.input_shape)), **options)
    return tp, graph


def their_groups(module: nn.Module) -> Counter[LayerGroup]:
    """The same of Torch-Pruning, without the classes, which we never cut."""
    return Counter(group for group, _ in _groups(module))


def _groups(module: nn.Module) -> Iterator[tuple[LayerGroup, Any]]:
    _, graph = dependency_graph(module)
    names = {layer: name for name, layer in module.named_modules()}
    last = [n for n, layer in module.named_modules() if isinstance(layer, LAYERS)][-1]
    for group in graph.get_all_groups(root_module_types=LAYERS):
        sides = set()
        for item in group:
            layer = item.dep.target.module
            if isinstance(layer, LAYERS):
                sides.add((names[layer], "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"))
        if frozenset(sides) != frozenset({(last, "out")}):
            yield (frozenset(sides), len(group[0].idxs)), group


def prune(module: nn.Module, selection: Selection) -> nn.Module:
    """The module, cut by Torch-Pruning to the channels of a selection, which stay in their own order."""
    tp, graph = dependency_graph(module)
    modules = dict(module.named_modules())
    architecture = selection.architecture
    gone: dict[str, list[int]] = {}
    for i in range(len(architecture.groups)):
        layer, tensor, out = maker(architecture, modules, i)
        widths = [w if g == i else n for g, (w, n) in enumerate(zip(selection.widths, architecture.sizes, strict=True))]
        only = selection.with_widths(widths)
        axis = architecture.by_name[tensor].axes[out]
        lost = set(range(axis.length)) - set(only.indices(axis).tolist())
        before = gone.setdefault(layer, [])
        rows = sorted(row - sum(b < row for b in before) for row in lost)
        before += lost
        target = modules[layer]
        if isinstance(target, nn.Linear):
            function = tp.prune_linear_out_channels
        elif getattr(target, "groups", 1) > 1:
            function = tp.prune_depthwise_conv_out_channels
        else:
            function = tp.prune_conv_out_channels
        if rows:
            graph.get_pruning_group(target, function, idxs=rows).prune()
    return module


def maker(architecture: Architecture, modules: dict[str, Any], group: int) -> tuple[str, str, int]:
    """A layer that makes a group's channels (alone, if there is one), its weight, and the axis of its outputs."""
    groups = []
    for tensor in architecture.tensors:
        layer = tensor.name.rpartition(".")[0]
        if tensor.kind is TensorKind.WEIGHT and isinstance(modules.get(layer), LAYERS):
            out = 1 if isinstance(modules[layer], TRANSPOSED) else 0
            if group in tensor.axes[out].groups:
                groups.append((len(tensor.axes[out].groups), layer, tensor.name, out))
    assert groups, f"no layer makes group {group}"
    return min(groups, key=lambda f: f[0])[1:]


def lines(groups: Counter[LayerGroup]) -> list[str]:
    """Groups as text, in an order that no hash seed changes."""
    return sorted(
        f"{size}: {', '.join(f'{layer}.{side}' for layer, side in sorted(sides))}"
        for (sides, size), n in groups.items()
        for _ in range(n)
    )


def outputs_of(module: nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A module's logits."""
    with torch.no_grad():
        out: np.ndarray[Any, Any] = module.eval()(torch.from_numpy(x)).numpy()
    return out
