"""Whole networks that the compiler is held against: ours of every kind, and published ones of timm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import whole_cnns
import whole_sequences
import zoo
from torch import nn

import nets
from fedprune_export.imported import Model
from fedprune_export.importing import export_torch, import_onnx


@dataclass(frozen=True)
class Whole:
    """A network, and the least that the channel analysis must find in it.

    Attributes:
        make: Makes the module, the same each time.
        groups: So many channel groups at least.
        kept: Share of the parameters that are left at density .5 at most, if the analysis finds all that can be cut.
        vocabulary: Number of words, where the input is words.
        stays: What notes must name, because it can't be cut.
    """

    make: Callable[[], nn.Module]
    groups: int
    kept: float
    vocabulary: int = 0
    stays: tuple[str, ...] = ()


def _ours(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return scattered(nets.seeded(kind()))

    return make


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: scattered(zoo.timm_model(name, **arguments))


def scattered(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with random numbers in every parameter that is uniform.

    Fresh networks have scales of one, biases of nought and gains of 1e-6: with these, an error behind a scale would
    not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.parameters():
            first = part.reshape(-1)[0]
            if not part.is_floating_point() or not bool((part == first).all()):
                continue
            if abs(float(first)) < 1e-8:
                part.copy_(0.1 * torch.randn(part.shape, generator=generator))
            elif abs(float(first)) < 0.05:
                part.copy_(0.1 + 0.4 * torch.rand(part.shape, generator=generator))
            else:
                part.copy_(first * (0.5 + torch.rand(part.shape, generator=generator)))
    return module


OURS: dict[str, Whole] = {
    "lenet": Whole(nets.lenet, 4, 0.3),
    "vgg11_bn": Whole(nets.vgg11_bn, 8, 0.3),
    "resnet20_bn": Whole(nets.resnet20_bn, 12, 0.3),
    "concat_net": Whole(nets.concat_net, 4, 0.5),
    "unet": Whole(_ours(whole_cnns.UNet), 1, 0.9),
    "sensor_net": Whole(_ours(whole_cnns.SensorNet), 1, 0.9),
    "group_norm_resnet": Whole(_ours(whole_cnns.GroupNormResNet), 1, 0.9),
    "shufflenet_v2": Whole(_ours(whole_cnns.ShuffleNetV2), 1, 0.9),
    "glu": Whole(_ours(whole_cnns.GatedLinearUnits), 1, 0.9),
    "gate": Whole(_ours(whole_cnns.GateOfOneChannel), 1, 0.9),
    "chunk_and_concat": Whole(_ours(whole_cnns.ChunkAndConcat), 1, 0.9),
    "squeeze_and_excite": Whole(_ours(whole_cnns.SqueezeAndExcite), 1, 0.9),
    "padded_shortcuts": Whole(_ours(whole_cnns.PaddedShortcuts), 1, 0.9),
    "inception": Whole(_ours(whole_cnns.Inception), 1, 0.9),
    "grouped": Whole(_ours(whole_cnns.Grouped), 1, 0.9),
    "ghost": Whole(_ours(whole_cnns.Ghost), 1, 0.9),
    "feature_pyramid": Whole(_ours(whole_cnns.FeaturePyramid), 1, 0.9),
    "conv_mixer": Whole(_ours(whole_cnns.ConvMixer), 1, 0.9),
    "video": Whole(_ours(whole_cnns.Video), 1, 0.9),
    "vision_transformer": Whole(_ours(whole_sequences.VisionTransformer), 1, 0.9),
    "encoder": Whole(_ours(whole_sequences.Encoder), 1, 0.9),
    "swin": Whole(_ours(whole_sequences.Swin), 1, 0.9),
    "mlp_mixer": Whole(_ours(whole_sequences.MLPMixer), 1, 0.9),
    "lstm": Whole(_ours(whole_sequences.LSTMClassifier), 1, 0.9),
    "gru": Whole(_ours(whole_sequences.GRUClassifier), 1, 0.9),
    "embedded": Whole(_ours(whole_sequences.Embedded), 1, 0.9, vocabulary=50),
    "tied_language_model": Whole(_ours(whole_sequences.TiedLanguageModel), 1, 0.9, vocabulary=40),
    "perceptron": Whole(_ours(whole_sequences.Perceptron), 1, 0.9),
}
"""Small ones: all of them are tested each time."""

PUBLISHED: dict[str, Whole] = {
    "resnet18": Whole(_timm("resnet18"), 1, 0.9),
    "resnet50": Whole(_timm("resnet50"), 1, 0.9),
    "mobilenetv2_100": Whole(_timm("mobilenetv2_100"), 1, 0.9),
    "mobilenetv3_small_100": Whole(_timm("mobilenetv3_small_100"), 1, 0.9),
    "efficientnet_b0": Whole(_timm("efficientnet_b0"), 1, 0.9),
    "convnext_atto": Whole(_timm("convnext_atto"), 1, 0.9),
    "regnetx_002": Whole(_timm("regnetx_002"), 1, 0.9),
    "densenet121": Whole(_timm("densenet121"), 1, 0.9),
    "vit_tiny_patch16_224": Whole(_timm("vit_tiny_patch16_224", img_size=64), 1, 0.9),
    "ghostnet_050": Whole(_timm("ghostnet_050"), 1, 0.9),
    "repvgg_a0": Whole(_timm("repvgg_a0"), 1, 0.9),
    "mobilevit_xxs": Whole(_timm("mobilevit_xxs"), 1, 0.9),
}
"""timm's, for images of 64 pixels."""

MODELS: dict[str, Whole] = {**OURS, **PUBLISHED}


def exported(name: str) -> bytes:
    """One of `MODELS` as ONNX."""
    whole = MODELS[name]
    module = whole.make()
    if whole.vocabulary:
        return export_torch((module, torch.zeros((2, *module.input_shape), dtype=torch.int64)), name=name)
    return export_torch(module, name=name)


@functools.cache
def imported(name: str) -> Model:
    """One of `MODELS`, imported; each only once."""
    return import_onnx(exported(name), name)


def samples(name: str, batch: int, seed: int = 5) -> np.ndarray[Any, Any]:
    """Random samples for one of `MODELS`."""
    rng = np.random.default_rng(seed)
    shape = (batch, *imported(name).architecture.input_shape)
    if MODELS[name].vocabulary:
        return rng.integers(0, MODELS[name].vocabulary, shape)
    return rng.standard_normal(shape).astype(np.float32)
