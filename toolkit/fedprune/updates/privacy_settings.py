"""Differential privacy of what boards learn: a job's settings, and what they make of a board's recipe.

Neighbouring are two fleets of which one board has its samples in the one, and in the other none, so that it would hand
back what it was sent: the board takes part in either. `docs/privacy.md` derives what is promised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.model.recipe import Recipe

LOCAL = "local"
SHARED = "shared"
NOISES = (LOCAL, SHARED)

WRITTEN = ("update_clip", "update_noise")
"""Settings of a recipe that are written from these, never by people."""

LEAST_NOISE = 0.01
"""The least noise, in units of the clip: at that, one release costs an ε of thousands."""


@dataclass(frozen=True)
class Privacy:
    """Settings of a job's privacy, `[job.privacy]`.

    Attributes:
        clip: The most that a board's whole update may be long (L2 norm over all trained tensors that it shares); 0
            turns privacy off.
        noise_multiplier: σ, in units of `clip`.
        noise: `local`: every board adds all of the noise, so that its own update is private, to the server as well.
            `shared`: every board adds a part of it, so that the sum has the noise; the server is trusted.
        boards: With `shared`, among how many boards the noise is shared out.
        delta: δ of the promise.
        epsilon_budget: The job ends before the round that would take a board beyond this ε; 0 for no end.
    """

    clip: float = 0.0
    noise_multiplier: float = 0.0
    noise: str = LOCAL
    boards: int = 0
    delta: float = 1e-5
    epsilon_budget: float = 0.0

    def __post_init__(self) -> None:
        where = "job: privacy: "
        validation.number(f"{where}clip", self.clip, 0, 1e6)
        validation.number(f"{where}noise_multiplier", self.noise_multiplier, 0, 1e4)
        if 0 < self.noise_multiplier < LEAST_NOISE:
            expected = f"0, or {LEAST_NOISE} or more: less noise hides nothing"
            raise ConfigError(f"{where}noise_multiplier", expected=expected, got=self.noise_multiplier)
        validation.word(f"{where}noise", self.noise, NOISES)
        validation.whole(f"{where}boards", self.boards, 0, 10**6)
        validation.number(f"{where}delta", self.delta, 0, 1, above=True, below=True)
        validation.number(f"{where}epsilon_budget", self.epsilon_budget, 0, 1e6)
        if not self.clip and (self.noise_multiplier or self.epsilon_budget or self.boards):
            raise ConfigError(f"{where}clip", expected="above 0 beside other settings of privacy", got=self.clip)
        if self.epsilon_budget and not self.noise_multiplier:
            raise ConfigError(
                f"{where}epsilon_budget without noise_multiplier",
                expected="noise_multiplier above 0",
                got=self.noise_multiplier,
                hint="Clipping alone promises nothing.",
            )
        if self.clip and (self.noise == SHARED) != (self.boards > 0):
            raise ConfigError(
                f"{where}boards with noise {self.noise!r}",
                expected="1 or more, the boards that share the noise out" if self.noise == SHARED else "0",
                got=self.boards,
            )

    @property
    def on(self) -> bool:
        """Whether boards clip at all."""
        return self.clip > 0

    @property
    def local(self) -> bool:
        """Whether every board adds all of the noise."""
        return self.noise == LOCAL

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise that a board adds to every element of its update."""
        whole = self.noise_multiplier * self.clip
        return whole if self.local else whole / math.sqrt(self.boards)

    @property
    def account(self) -> dict[str, Any]:
        """The settings by which the account of what is spent goes, and the budget, as plain JSON types."""
        return {k: getattr(self, k) for k in ("noise_multiplier", "noise", "boards", "delta", "epsilon_budget")}

    def asked_of(self, recipe: Recipe) -> Recipe:
        """The recipe of a board under these settings. Raises `ConfigError` if it has settings by which a board would
        tell more than its update."""
        return replace(recipe, update_clip=self.clip, update_noise=self.noise_std) if self.on else recipe

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; empty where privacy is off."""
        return asdict(self) if self.on else {}

    @classmethod
    def from_dict(cls, body: object) -> Privacy:
        """Read and check. Raises `ConfigError`, which names the key, for an unknown key, a wrong type or a number out
        of range."""
        if not isinstance(body, Mapping):
            raise ConfigError("job: privacy", expected="a table of settings, such as clip", got=repr(body))
        return cls(**validation.known(cls, body, "job: privacy"))
