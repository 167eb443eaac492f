"""The tasks: what is learnt from what, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from examples.own_losses import infonce

import fedprune_export as fx
from benchmarks.tasks import adapters, data, losses, nets
from fedprune.model.features import CUSTOM_LOSS
from fedprune.model.recipe import Recipe
from fedprune_export.pruning.model import Model

DENSITIES = (1.0, 0.7, 0.5, 0.3)
"""Widths that boards can hold, a quarter of the fleet each; their submodels weigh half of the model's on average."""


@dataclass(frozen=True)
class Task:
    """A task: `deal` deals its data out to boards, by the seed; `densities` are the widths that boards can hold, by
    quarters of the fleet, the strongest first; `own` says how the network is imported."""

    title: str
    deal: Callable[[int], data.Dealt]
    net: Callable[[], torch.nn.Module]
    recipe: Recipe
    rounds: int
    densities: tuple[float, ...] = DENSITIES
    own: dict[str, Any] = field(default_factory=dict)


SGD = Recipe(epochs=1, batch_size=32, lr=0.05, momentum=0.9)
ADAM = Recipe(epochs=1, batch_size=32, lr=1e-3, optimizer="adam", momentum=0.0)

TASKS = {
    "speech": Task(
        "Keyword spotting from raw audio: spoken digits, a board per speaker",
        data.speech, nets.Crnn, replace(ADAM, epochs=2, lr=2e-3), 10,
    ),
    "segmentation": Task(
        "Segmentation: CamVid, eight boards with streets of their own",
        data.streets, nets.UNet, replace(SGD, ignore_label=11, metric="miou", batch_size=8, epochs=2), 15,
    ),
    "detection": Task(
        "Detection: digits of MNIST on canvases, ten boards",
        data.objects, nets.Detector, replace(ADAM, loss=CUSTOM_LOSS, metric=CUSTOM_LOSS, epochs=3, lr=2e-3), 12,
        own={"loss": losses.detection, "metric": losses.AveragePrecision},
    ),
    "forecasting": Task(
        "Forecasting: ETTh1, horizon 96, a patch transformer",
        data.transformer, nets.Patches, replace(ADAM, loss="mse", metric="mae", epochs=2, lr=5e-4), 8,
    ),
    "forecasting-lstm": Task(
        "Forecasting: ETTh1, horizon 96, an LSTM",
        data.transformer, nets.Lstm, replace(ADAM, loss="mse", metric="mae", epochs=2, lr=2e-3), 8,
    ),
    "anomalies": Task(
        "Anomalies: an autoencoder on HAR without walking upstairs, seven boards",
        data.motion, nets.AutoEncoder, replace(ADAM, loss="mse", metric="rmse", epochs=2, lr=2e-3), 10,
    ),
    "fusion": Task(
        "Sensor fusion: HAR, accelerometer and gyroscope as two inputs, seven boards",
        data.sensors, nets.Fusion, replace(ADAM, lr=2e-3), 10,
    ),
    "embedding": Task(
        "Embeddings: Fashion-MNIST with InfoNCE, ten boards",
        data.clothes, nets.Embedder,
        replace(ADAM, loss=CUSTOM_LOSS, metric=CUSTOM_LOSS, batch_size=64, epochs=2, lr=2e-3), 10,
        own={"loss": infonce, "metric": losses.retrieval},
    ),
    "language": Task(
        "Language model: Shakespeare by characters, a board per role",
        data.plays, nets.Characters, replace(ADAM, metric="perplexity", lr=2e-3), 10,
    ),
    "adapters": Task(
        "Adapters: a frozen language model of plays learns Python's manual, a board per chapter, ranks 16, 8, 4 and 2",
        data.chapters, adapters.Speaker, replace(ADAM, metric="perplexity", lr=1e-2), 8,
        densities=(1.0, 0.5, 0.25, 0.125),
        own={"base": "float16"},
    ),
}  # fmt: skip


def imported(task: Task, seed: int) -> tuple[Model, torch.nn.Module]:
    torch.manual_seed(seed)
    module = task.net()
    return fx.load(module, **task.own), module
