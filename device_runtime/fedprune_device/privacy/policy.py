"""The privacy that a board's owner requires of jobs, in a file that the server can't change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedprune.core import validation
from fedprune.core.errors import ConfigError, PrivacyError
from fedprune.core.settings import bounded, check_fields
from fedprune.core.toml_file import read_toml
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy_cost import epsilon_for

_MIN_MULTIPLIER = 1e-6  # in units of the clip; less noise counts as none: 1/z² of such an update could overflow

_OWNER_HINT = "The board's owner asks for it; the job's [job.privacy] allows less."


@dataclass(frozen=True)
class PrivacyPolicy:
    """The owner's limits; a job that exceeds one is refused.

        [privacy]
        least_noise = 1.0     # standard deviation of this board's own noise, in units of the clip; 0 for any above 0
        most_clip = 1.0       # the most that an update may be long; 0 for any
        most_epsilon = 8.0    # for all private jobs together that this state directory has seen; 0 for any
        delta = 1e-5          # δ of that ε
        secure_aggregation = true  # this board's update is masked

    Settings that are left out require nothing, except that there is noise at all; a policy with nothing but
    `secure_aggregation` doesn't require noise.
    """

    least_noise: float = bounded(0.0, 0, 1e4)
    most_clip: float = bounded(0.0, 0, 1e6)
    most_epsilon: float = bounded(0.0, 0, 1e6)
    delta: float = bounded(1e-5, 0, 1, above=True, below=True)
    secure_aggregation: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ("privacy",))

    def check(self, recipe: Recipe, cost: float) -> None:
        if self.secure_aggregation and not recipe.secure_aggregation:
            raise PrivacyError(
                "this board takes part only in jobs with secure aggregation",
                expected="secure_aggregation = true",
                got="an offer that asks for the update as it is",
                hint="The board's owner asks for it; set secure_aggregation = true in the job's [job].",
            )
        multiplier = multiplier_of(recipe)
        if not multiplier:
            if self.secure_aggregation and not (self.least_noise or self.most_clip or self.most_epsilon):
                return
            raise PrivacyError(
                "this board takes part only in private jobs",
                expected="updates with clip and noise",
                got="a clip without noise, or with next to none" if recipe.update_clip else "neither clip nor noise",
                hint=_OWNER_HINT,
            )
        if multiplier < self.least_noise:
            raise PrivacyError(
                "noise of this board's update, in units of the clip",
                expected=f"at least {self.least_noise:g}",
                got=f"{multiplier:g}",
                hint=_OWNER_HINT,
            )
        if self.most_clip and recipe.update_clip > self.most_clip:
            raise PrivacyError(
                "clip of this board's update",
                expected=f"at most {self.most_clip:g}",
                got=recipe.update_clip,
                hint=_OWNER_HINT,
            )
        spent = epsilon_for(cost + multiplier**-2, self.delta)
        if self.most_epsilon and spent > self.most_epsilon:
            raise PrivacyError(
                "this board's budget of privacy is spent: ε after one more update",
                expected=f"at most {self.most_epsilon:g} at δ {self.delta:g}",
                got=f"{spent:.4g}",
                hint="The board counts all private jobs that it has taken part in.",
            )


def multiplier_of(recipe: Recipe) -> float:
    """The noise multiplier of one board's own update; 0 where nothing is promised."""
    multiplier = recipe.update_noise / recipe.update_clip if recipe.update_clip else 0.0
    return multiplier if multiplier >= _MIN_MULTIPLIER else 0.0


def read_policy(path: Path | None) -> PrivacyPolicy | None:
    """The owner's policy, from its file; None without one. Raises `ConfigError` if it is invalid."""
    if path is None:
        return None
    body = read_toml(path, ConfigError)
    validation.check_keys(("privacy",), body, str(path))
    table = body.get("privacy")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: [privacy]", expected="a table of settings, such as most_epsilon", got="none")
    return PrivacyPolicy(**validation.check_table(PrivacyPolicy, table, f"{path}: privacy"))
