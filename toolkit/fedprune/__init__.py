"""Federated learning for fleets of unequal boards: the method, on numpy."""

from fedprune.architecture import (
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
from fedprune.errors import ExitCode, FedpruneError
from fedprune.features import Features
from fedprune.recipe import Recipe
from fedprune.selection import Selection, Tensors

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
