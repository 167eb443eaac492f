"""Federated learning for fleets of unequal boards: the method, on numpy."""

from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.model.architecture import (
    Activation,
    Architecture,
    Axis,
    ChannelGroup,
    Layer,
    Segment,
    TensorKind,
    TensorSpec,
    widths_at,
)
from fedprune.model.selection import Selection, Tensors
from fedprune.training.features import Features
from fedprune.training.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Architecture",
    "Axis",
    "ChannelGroup",
    "ExitCode",
    "Features",
    "FedpruneError",
    "Layer",
    "Recipe",
    "Segment",
    "Selection",
    "TensorKind",
    "TensorSpec",
    "Tensors",
    "widths_at",
]
