"""The privacy that a board's owner requires of jobs: a file of its own, `[privacy]`.

    [privacy]
    least_noise = 1.0     # standard deviation of this board's own noise, in units of the clip
    most_clip = 1.0       # the most that an update may be long
    most_epsilon = 8.0    # for all private jobs together that this state directory has seen
    delta = 1e-5          # at which that is reckoned

Settings that are left out require nothing, except that there is noise at all. The server can't change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedprune.core import validation
from fedprune.core.errors import ConfigError, PrivacyError
from fedprune.core.toml_file import read_toml
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy import epsilon

_LEAST = 1e-6  # less noise than this, in units of the clip, is none: what one such update costs could be no number

_HINT = "The board's owner asks for it; the job's [job.privacy] allows less."


@dataclass(frozen=True)
class PrivacyPolicy:
    """The least privacy of a job: noise in units of the clip (0 for any above 0), the largest clip and ε (0 for any),
    and δ.
    """

    least_noise: float = 0.0
    most_clip: float = 0.0
    most_epsilon: float = 0.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        validation.number("privacy: least_noise", self.least_noise, 0, 1e4)
        validation.number("privacy: most_clip", self.most_clip, 0, 1e6)
        validation.number("privacy: most_epsilon", self.most_epsilon, 0, 1e6)
        validation.number("privacy: delta", self.delta, 0, 1, above=True, below=True)

    def check(self, recipe: Recipe, cost: float) -> None:
        multiplier = multiplier_of(recipe)
        if not multiplier:
            raise PrivacyError(
                "this board takes part in private jobs alone",
                expected="updates with clip and noise",
                got="a clip without noise, or with next to none" if recipe.update_clip else "neither clip nor noise",
                hint=_HINT,
            )
        if multiplier < self.least_noise:
            raise PrivacyError(
                "noise of this board's update, in units of the clip",
                expected=f"at least {self.least_noise:g}",
                got=f"{multiplier:g}",
                hint=_HINT,
            )
        if self.most_clip and recipe.update_clip > self.most_clip:
            raise PrivacyError(
                "clip of this board's update",
                expected=f"at most {self.most_clip:g}",
                got=recipe.update_clip,
                hint=_HINT,
            )
        spent = epsilon(cost + multiplier**-2, self.delta)
        if self.most_epsilon and spent > self.most_epsilon:
            raise PrivacyError(
                "this board's budget of privacy is spent: ε after one more update",
                expected=f"at most {self.most_epsilon:g} at δ {self.delta:g}",
                got=f"{spent:.4g}",
                hint="The board counts all private jobs that it has taken part in.",
            )


def multiplier_of(recipe: Recipe) -> float:
    """The noise multiplier of one board's own update; 0 where nothing is promised."""
    found = recipe.update_noise / recipe.update_clip if recipe.update_clip else 0.0
    return found if found >= _LEAST else 0.0


def read_policy(path: Path | None) -> PrivacyPolicy | None:
    """The owner's policy, from its file; None without one. Raises `ConfigError` if it is invalid."""
    if path is None:
        return None
    body = read_toml(path, ConfigError)
    validation.only(("privacy",), body, str(path), "table")
    table = body.get("privacy")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: [privacy]", expected="a table of settings, such as most_epsilon", got="none")
    return PrivacyPolicy(**validation.known(PrivacyPolicy, table, f"{path}: privacy"))
