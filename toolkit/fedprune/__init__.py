"""Federated learning for fleets of unequal boards: the method, on numpy."""

from typing import TYPE_CHECKING

from fedprune.core.lazy_attributes import lazy_attributes

if TYPE_CHECKING:  # a command that only parses its options doesn't load numpy
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

_MODULES = {
    "Activation": "fedprune.model.architecture",
    "Architecture": "fedprune.model.architecture",
    "Axis": "fedprune.model.architecture",
    "ChannelGroup": "fedprune.model.architecture",
    "ExitCode": "fedprune.core.errors",
    "Features": "fedprune.training.features",
    "FedpruneError": "fedprune.core.errors",
    "Layer": "fedprune.model.architecture",
    "Recipe": "fedprune.training.recipe",
    "Segment": "fedprune.model.architecture",
    "Selection": "fedprune.model.selection",
    "TensorKind": "fedprune.model.architecture",
    "TensorSpec": "fedprune.model.architecture",
    "Tensors": "fedprune.model.selection",
    "widths_at": "fedprune.model.architecture",
}

__getattr__ = lazy_attributes(__name__, _MODULES)
