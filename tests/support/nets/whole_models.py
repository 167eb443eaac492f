"""Whole networks that the compiler is held against: ours of every kind, and published ones of timm."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import fedprune_export as fx
from fedprune_export.importing import ImportChoices, export_torch, import_onnx
from fedprune_export.importing.packing import INPUTS_KEY, read_packing
from fedprune_export.pruning.model import Model
from support.nets import published_nets as zoo
from support.nets import small_nets as nets
from support.nets import task_cnns, task_sequences, whole_cnns, whole_sequences


@dataclass(frozen=True)
class Whole:
    """A network, and the least that the channel analysis must find in it.

    Attributes:
        make: Makes the module, the same each time.
        groups: So many channel groups at least.
        kept: Share of the parameters that are left at density .5 at most, if the analysis finds all that can be cut.
        vocabulary: Number of words, where the input is words.
        stays: What notes must name, because it can't be cut.
        places: Weights of layers that make places of a map, steps of a sequence, or outputs, not channels.
        values: Whether its outputs are values, of which there may be several kinds, not classes.
    """

    make: Callable[[], nn.Module]
    groups: int
    kept_share: float
    vocabulary: int = 0
    stays: tuple[str, ...] = ()
    position_weights: tuple[str, ...] = ()
    values: bool = False


def _ours(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return scatter_parameters(nets.randomise_norms(kind()))

    return make


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: settle_statistics(scatter_parameters(zoo.timm_model(name, **arguments)))


def scatter_parameters(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with random numbers in every parameter that is uniform.

    Fresh networks have scales of one, biases of nought and gains of 1e-6: with these, an error behind a scale would
    not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            first = parameter.reshape(-1)[0]
            if not parameter.is_floating_point() or not bool((parameter == first).all()):
                continue
            if abs(float(first)) < 1e-8:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif abs(float(first)) < 0.05:
                parameter.copy_(0.1 + 0.4 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(first * (0.5 + torch.rand(parameter.shape, generator=generator)))
    return module


def settle_statistics(module: nn.Module, seed: int = 2) -> nn.Module:
    """The module with batch-norm statistics that nearly fit its layers, as those of a trained network do.

    With statistics that don't fit, a deep network's values grow from layer to layer until float32 says nothing. The
    same happens where a variance is next to nothing, so none is.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    generator = torch.Generator().manual_seed(seed)
    module.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        module(torch.from_numpy(pictures(np.random.default_rng(seed), (16, *module.input_shape))))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            if norm.running_mean is not None and norm.running_var is not None:
                spread = norm.running_var.sqrt()
                norm.running_mean.add_(0.05 * spread * torch.randn(spread.shape, generator=generator))
                norm.running_var.mul_(1 + 0.2 * torch.rand(spread.shape, generator=generator)).add_(0.01)
    return module


def pictures(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Coarse coloured patches with grain, each picture with a brightness and contrast of its own."""
    n, c, h, w = shape
    coarse = rng.standard_normal((n, c, 4, 4)).repeat(-(-h // 4), 2).repeat(-(-w // 4), 3)[:, :, :h, :w]
    x = coarse * rng.uniform(0.5, 2, (n, 1, 1, 1)) + rng.standard_normal((n, c, 1, 1))
    return (x + 0.3 * rng.standard_normal(shape)).astype(np.float32)


OURS: dict[str, Whole] = {
    "lenet": Whole(nets.lenet, 4, 0.27),
    "vgg11_bn": Whole(nets.vgg11_bn, 8, 0.26),
    "resnet20_bn": Whole(nets.resnet20_bn, 12, 0.26),
    "concat_net": Whole(nets.concat_net, 4, 0.43),
    "unet": Whole(_ours(whole_cnns.UNet), 7, 0.28),
    "group_norm_resnet": Whole(_ours(whole_cnns.GroupNormResNet), 5, 0.27),
    "glu": Whole(_ours(whole_cnns.GatedLinearUnits), 3, 0.29),
    "gate": Whole(_ours(whole_cnns.GateOfOneChannel), 2, 0.31),
    "chunk_and_concat": Whole(_ours(whole_cnns.ChunkAndConcat), 6, 0.3),
    "squeeze_and_excite": Whole(_ours(whole_cnns.SqueezeAndExcite), 4, 0.41),
    "padded_shortcuts": Whole(_ours(whole_cnns.PaddedShortcuts), 3, 0.36),
    "normalizer_free": Whole(_ours(whole_cnns.NormalizerFree), 3, 0.29),
    "conv_mixer": Whole(_ours(whole_cnns.ConvMixer), 3, 0.43),
    "vision_transformer": Whole(_ours(whole_sequences.VisionTransformer), 5, 0.35),
    "encoder": Whole(_ours(whole_sequences.Encoder), 5, 0.29),
    "lstm": Whole(_ours(whole_sequences.LSTMClassifier), 1, 0.35),
    "tied_language_model": Whole(_ours(whole_sequences.TiedLanguageModel), 3, 0.32, vocabulary=40),
    "perceptron": Whole(_ours(whole_sequences.Perceptron), 2, 0.4),
}
TASKS: dict[str, Whole] = {
    "yolo": Whole(_ours(task_cnns.Yolo), 32, 0.29, values=True),
    "attention_unet": Whole(_ours(task_cnns.AttentionUNet), 9, 0.28),
    "deep_lab": Whole(_ours(task_cnns.DeepLab), 9, 0.29),
    "pooled_video": Whole(_ours(task_cnns.PooledVideo), 3, 0.3),
    "auto_encoder": Whole(_ours(task_cnns.AutoEncoder), 5, 0.28, values=True),
    "power_means": Whole(_ours(task_cnns.PowerMeans), 3, 0.31),
    "crnn": Whole(_ours(task_sequences.Crnn), 3, 0.29),
    "wave_net": Whole(_ours(task_sequences.WaveNet), 7, 0.29),
    "patch_transformer": Whole(_ours(task_sequences.PatchTransformer), 3, 0.36, values=True),
    "n_beats": Whole(
        _ours(task_sequences.NBeats), 8, 0.4, values=True, position_weights=("codes.0.weight", "codes.1.weight")
    ),
    "tcn": Whole(_ours(task_sequences.Tcn), 4, 0.3, values=True),
    "d_linear": Whole(_ours(task_sequences.DLinear), 0, 1, values=True, position_weights=("slow.weight",)),
    "llama": Whole(_ours(task_sequences.Llama), 5, 0.32, vocabulary=40),
    "alibi": Whole(_ours(task_sequences.Alibi), 4, 0.35, vocabulary=40),
    "lora_reader": Whole(
        _ours(task_sequences.LoraReader),
        4,
        0.89,
        vocabulary=40,
        position_weights=("q.lora_B.weight", "out.lora_B.weight", "fc1.lora_B.weight", "fc2.lora_B.weight"),
    ),
    "adapted_encoder": Whole(_ours(task_sequences.AdaptedEncoder), 4, 0.35),
    "two_towers": Whole(_ours(task_sequences.TwoTowers), 5, 0.38, vocabulary=20, values=True),
    "fusion": Whole(
        _ours(task_sequences.Fusion), 4, 0.4, vocabulary=20, values=True, position_weights=("what.weight",)
    ),
}
"""Small ones of tasks other than classifying images."""

PUBLISHED: dict[str, Whole] = {
    "resnet18": Whole(_timm("resnet18"), 12, 0.26),
    "mobilenetv3_small_100": Whole(_timm("mobilenetv3_small_100"), 27, 0.28),
    "convnext_atto": Whole(_timm("convnext_atto"), 16, 0.27),
    "vit_tiny_patch16_224": Whole(_timm("vit_tiny_patch16_224", img_size=64), 25, 0.3),
}
"""timm's, for images of 64 pixels."""

MODELS: dict[str, Whole] = {**OURS, **TASKS, **PUBLISHED}


@functools.cache
def onnx_bytes(name: str) -> bytes:
    """One of `MODELS` as ONNX; each only once."""
    entry = MODELS[name]
    module = entry.make()
    if entry.vocabulary and not hasattr(module, "input_dtype"):
        return export_torch((module, torch.zeros((2, *module.input_shape), dtype=torch.int64)), name=name)
    return export_torch(module, name=name)


def whole_model(name: str, prefer: Literal["coarse", "fine"] = "coarse") -> Model:
    """One of `MODELS`, imported; each only once."""
    return _import_once(name, prefer)


@functools.cache  # which takes a default that is given for another call
def _import_once(name: str, prefer: Literal["coarse", "fine"]) -> Model:
    if MODELS[name].values:
        return fx.load(MODELS[name].make(), name=name, prefer=prefer, loss=squared_error)
    return import_onnx(onnx_bytes(name), name, ImportChoices(prefer=prefer))


def squared_error(*tensors: torch.Tensor) -> torch.Tensor:
    """The loss of values: mean squares, over all outputs together."""
    *outputs, labels = tensors
    return (torch.cat([o.flatten(1) for o in outputs], 1) - labels.flatten(1)).square().mean(1)


def samples(name: str, batch: int, seed: int = 5) -> np.ndarray[Any, Any]:
    """Random samples for one of `MODELS`."""
    rng = np.random.default_rng(seed)
    entry, model = MODELS[name], whole_model(name)
    packing = read_packing(model.graph.metadata, INPUTS_KEY)
    if not packing:
        shape = (batch, *model.architecture.input_shape)
        return rng.integers(0, entry.vocabulary, shape) if entry.vocabulary else normal(rng, shape)
    kinds = getattr(entry.make(), "input_dtype", {})
    rows = [
        rng.integers(0, entry.vocabulary, (batch, packed_input.size))
        if packed_input.name in kinds
        else normal(rng, (batch, packed_input.size))
        for packed_input in packing
    ]
    return np.concatenate(rows, 1).astype(np.float32)


def labels(name: str, batch: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random labels for one of `MODELS`."""
    rng, outputs = np.random.default_rng(seed), whole_model(name).architecture.output_shape
    if MODELS[name].values:
        return normal(rng, (batch, *outputs))
    return rng.integers(0, outputs[0], (batch, *outputs[1:]))


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(np.float32)
