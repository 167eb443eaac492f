"""The settings `[job.privacy]`: how boards make their updates differentially private.

Two fleets are neighbouring if they differ in one board, which has its samples in one of them and none in the other,
where it would return what it received. The board takes part in both. `docs/privacy.md` derives what is promised,
`fedprune.updates.clipped_noise` adds the noise, and `fedprune.updates.privacy_cost` adds up ε and δ.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded, check_fields, choice_of
from fedprune.model.recipe import Recipe

LOCAL = "local"
SHARED = "shared"
NOISES = (LOCAL, SHARED)

# Settings of a recipe that are written from these. People can't set them: noise without an account promises nothing.
WRITTEN_SETTINGS = ("update_clip", "update_noise")

# The least noise, in units of the clip: with so little, one release costs an ε of thousands.
MIN_NOISE = 0.01


@dataclass(frozen=True)
class Privacy:
    """Settings of a job's privacy, `[job.privacy]`.

    Attributes:
        clip: The maximum L2 norm of a board's update, over all trained tensors that it shares; 0 turns privacy off.
        noise_multiplier: σ, in units of `clip`.
        noise: `local`: every board adds all of the noise, so that its own update is private, to the server as well.
            `shared`: every board adds a part of it, so that the sum has the noise; the server is trusted.
        boards: With `shared`, the number of boards among which the noise is divided.
        delta: δ of the promise.
        epsilon_budget: The job ends before the round that would take a board beyond this ε; 0 for no end.
    """

    clip: float = bounded(0.0, 0, 1e6)
    noise_multiplier: float = bounded(0.0, MIN_NOISE, 1e4, or_zero=True)
    noise: str = choice_of(LOCAL, NOISES)
    boards: int = bounded(0, 0, 10**6)
    delta: float = bounded(1e-5, 0, 1, above=True, below=True)
    epsilon_budget: float = bounded(0.0, 0, 1e6)

    def __post_init__(self) -> None:
        setting = ("job", "privacy")
        check_fields(self, setting)
        if not self.clip and (self.noise_multiplier or self.epsilon_budget or self.boards):
            raise ConfigError((*setting, "clip"), expected="above 0 with other settings of privacy", got=self.clip)
        if self.epsilon_budget and not self.noise_multiplier:
            raise ConfigError(
                "without noise_multiplier",
                path=(*setting, "epsilon_budget"),
                expected="noise_multiplier above 0",
                got=self.noise_multiplier,
                hint="Clipping alone promises nothing.",
            )
        if self.clip and (self.noise == SHARED) != (self.boards > 0):
            raise ConfigError(
                f"with noise {self.noise!r}",
                path=(*setting, "boards"),
                expected="1 or more, the boards that share the noise out" if self.noise == SHARED else "0",
                got=self.boards,
            )

    @property
    def is_on(self) -> bool:
        """Whether boards clip at all."""
        return self.clip > 0

    @property
    def is_local(self) -> bool:
        """Whether every board adds all of the noise."""
        return self.noise == LOCAL

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise that a board adds to every element of its update."""
        total_noise = self.noise_multiplier * self.clip
        return total_noise if self.is_local else total_noise / math.sqrt(self.boards)

    @property
    def account_settings(self) -> dict[str, Any]:
        """The settings that determine what a release costs, and the budget, as plain JSON types."""
        return {k: getattr(self, k) for k in ("noise_multiplier", "noise", "boards", "delta", "epsilon_budget")}

    def private_recipe(self, recipe: Recipe) -> Recipe:
        """A board's recipe under these settings. Raises `ConfigError`, by the recipe's own rules, if a setting of the
        recipe would let a board reveal more than its update."""
        return replace(recipe, update_clip=self.clip, update_noise=self.noise_std) if self.is_on else recipe

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; empty if privacy is off."""
        return asdict(self) if self.is_on else {}

    @classmethod
    def from_dict(cls, body: object) -> Privacy:
        """Read and check. Raises `ConfigError`, which names the key, for an unknown key, a wrong type or a number out
        of range."""
        return cls(**validation.check_table(cls, body, ("job", "privacy")))
