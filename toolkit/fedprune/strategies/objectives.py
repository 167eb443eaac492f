"""Objectives: the recipe that a board trains by, made of the job's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedprune.model.recipe import Recipe
from fedprune.strategies.roles import Objective, Turn


@dataclass(frozen=True)
class AsJob(Objective):
    """The job's recipe, with some settings of the strategy's own.

    Attributes:
        settings: What is set, by the recipe's names.
        lr_decay: The learning rate of round t is lr · lr_decay^(t − 1).
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    lr_decay: float = 1.0

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        """The device's recipe.

        Raises:
            ConfigError: A setting doesn't fit the others.
        """
        lr = recipe.lr if self.lr_decay == 1.0 else recipe.lr * self.lr_decay ** (turn.round - 1)
        return replace(recipe, lr=lr, **self.settings)
