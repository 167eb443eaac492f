"""Personal models: boards keep some tensors (`fedper`, Arivazhagan et al. 2019) or all of them (`local`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedprune.core.errors import ConfigError, value_text
from fedprune.core.settings import bounded, choice_of
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.model.trainable import HEAD_PATTERN, matching_tensors
from fedprune.strategies.aggregators import WEIGHTINGS, Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Inputs, Strategy
from fedprune.strategies.values import Turn


@dataclass(frozen=True)
class FedPerOptions:
    """Options of `fedper`, which `docs/strategies/fedper.md` explains."""

    personal: tuple[Any, ...] = (HEAD_PATTERN,)
    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    weighting: str = choice_of("samples", WEIGHTINGS)


@dataclass(frozen=True)
class LocalOptions:
    """Options of `local`, which `docs/strategies/fedper.md` explains."""

    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)


@dataclass(frozen=True)
class FedPer(Strategy):
    """Tensors with names of the patterns `personal` stay on the device; the others are averaged as in FedAvg."""

    personal: tuple[str, ...] = (HEAD_PATTERN,)

    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        # Raises now, before a board is asked, if a pattern matches no tensor: that tensor would be shared by mistake.
        matching_tensors(architecture, self.personal, ("job", "options", "personal"))
        return model

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        return replace(recipe, personal=self.personal)


def fedper(job: Job) -> Strategy:
    """Some tensors are never shared; the others are FedAvg's. Raises `ConfigError`."""
    options = read_options(job, FedPerOptions)
    if not options.personal or not all(isinstance(p, str) and p for p in options.personal):
        raise ConfigError(
            ("job", "options", "personal"), expected="patterns of tensors", got=value_text(options.personal)
        )
    return _personal_strategy(job, options.personal, options.densities, options.weighting, "sum")


def local(job: Job) -> Strategy:
    """Every board trains alone, from the job's first model on, and shares nothing. Raises `ConfigError`."""
    return _personal_strategy(job, ("*",), read_options(job, LocalOptions).densities, "samples", "updates")


def _personal_strategy(
    job: Job, personal: tuple[str, ...], densities: tuple[float, ...], weighting: str, inputs: Inputs
) -> Strategy:
    return FedPer(
        job.strategy,
        personal=personal,
        aggregator=Mean(weighting=weighting, excluded=personal),
        inputs=inputs,
        allocator=density_allocator(job, densities, default=(1.0,)),
    )
