"""The board's own count of updates with noise, written to the disk before noise is drawn.

A server counts, too, but it may be restored from an older backup, run other jobs, or be replaced. The board counts its
own updates with its own noise, as an observer of single updates sees them; a job with `shared` noise promises more to
those who see only sums. Every draw of noise counts, also for an offer that is done twice or an update that is never
sent.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.core import atomic_file, validation
from fedprune.core.errors import ConfigError, PrivacyError, StorageError
from fedprune.core.toml_file import read_toml
from fedprune.model.recipe import Recipe
from fedprune.updates.clipped_noise import GaussianNoise
from fedprune.updates.privacy_cost import epsilon_for
from fedprune.wire.messages import Offer

_MIN_MULTIPLIER = 1e-6  # in units of the clip; less noise counts as none: 1/z² of such an update could overflow

_OWNER_HINT = "The board's owner asks for it; the job's [job.privacy] allows less."


@dataclass(frozen=True)
class PrivacyPolicy:
    """The privacy that a board's owner requires of jobs: a file of its own, which the server can't change.

        [privacy]
        least_noise = 1.0     # standard deviation of this board's own noise, in units of the clip; 0 for any above 0
        most_clip = 1.0       # the most that an update may be long; 0 for any
        most_epsilon = 8.0    # for all private jobs together that this state directory has seen; 0 for any
        delta = 1e-5          # δ of that ε
        secure_aggregation = true  # this board's update is masked

    Settings that are left out require nothing, except that there is noise at all; a policy with nothing but
    `secure_aggregation` doesn't require noise.
    """

    least_noise: float = 0.0
    most_clip: float = 0.0
    most_epsilon: float = 0.0
    delta: float = 1e-5
    secure_aggregation: bool = False

    def __post_init__(self) -> None:
        validation.check_number(("privacy", "least_noise"), self.least_noise, 0, 1e4)
        validation.check_number(("privacy", "most_clip"), self.most_clip, 0, 1e6)
        validation.check_number(("privacy", "most_epsilon"), self.most_epsilon, 0, 1e6)
        validation.check_number(("privacy", "delta"), self.delta, 0, 1, above=True, below=True)
        validation.check_bool(("privacy", "secure_aggregation"), self.secure_aggregation)

    def check(self, recipe: Recipe, cost: float) -> None:
        if self.secure_aggregation and not recipe.secure_aggregation:
            raise PrivacyError(
                "this board takes part in jobs with secure aggregation alone",
                expected="secure_aggregation = true",
                got="an offer that asks for the update as it is",
                hint="The board's owner asks for it; set secure_aggregation = true in the job's [job].",
            )
        multiplier = multiplier_of(recipe)
        if not multiplier:
            if self.secure_aggregation and not (self.least_noise or self.most_clip or self.most_epsilon):
                return
            raise PrivacyError(
                "this board takes part in private jobs alone",
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
    validation.check_keys(("privacy",), body, str(path), "table")
    table = body.get("privacy")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: [privacy]", expected="a table of settings, such as most_epsilon", got="none")
    return PrivacyPolicy(**validation.check_table(PrivacyPolicy, table, f"{path}: privacy"))


BUDGET_FILE = "privacy.json"  # in the board's state directory

_MAX_DRAWS = 2**53  # the whole numbers that every JSON parser reads exactly


class BoardPrivacyBudget:
    """A board's count. `policy` is what the owner asks for, None for nothing; `cost` is Σ 1/z² over all `draws`."""

    def __init__(self, root: Path) -> None:
        self._path = root / BUDGET_FILE
        self._lock = threading.Lock()
        self._damage = ""
        self.policy: PrivacyPolicy | None = None
        self.cost, self.draws, self._is_marked = 0.0, 0, False
        try:
            self._restore(atomic_file.read_document(self._path))
        except StorageError as error:
            self._damage = str(error)

    @property
    def is_private(self) -> bool:
        """Whether the board has taken part in a private job, or must: then its reports to the server say less."""
        return self.policy is not None or self._is_marked or bool(self._damage)

    def check(self, recipe: Recipe) -> None:
        """Check an offer's recipe before anything is done for it, and mark the board as private if the recipe is.

        Raises `PrivacyError` if it is less private than the owner asks for, or what was spent is no longer known.
        """
        if self.policy is None and not recipe.update_clip:
            return
        self._check_readable()
        if self.policy is not None:
            self.policy.check(recipe, self.cost)
        if recipe.update_clip and not self._is_marked:
            with self._lock:
                self._write(self.cost, self.draws)

    def draw(self, offer: Offer) -> GaussianNoise:
        """Noise for an update, counted on the disk first; raises as `check`, and `StorageError` without a count."""
        recipe = Recipe.from_dict(offer.recipe)
        self.check(recipe)
        multiplier = multiplier_of(recipe)
        if multiplier:
            with self._lock:
                # Rounded up, so that a sum of many draws is never below the exact cost.
                self._write(math.nextafter(self.cost + multiplier**-2, math.inf), self.draws + 1)
        return GaussianNoise.from_system()

    def describe(self, delta: float | None = None) -> str:
        policy = self.policy or PrivacyPolicy()
        if self._damage:
            return f"what was spent is not known: {self._damage}"
        budget_delta = delta or policy.delta
        limit = f" of {policy.most_epsilon:g}" if policy.most_epsilon else ""
        updates = f"{self.draws} update{'' if self.draws == 1 else 's'} with noise"
        return f"ε {epsilon_for(self.cost, budget_delta):.4g}{limit} at δ {budget_delta:g}, for {updates}"

    def _check_readable(self) -> None:
        if self._damage:
            raise PrivacyError(
                f"what this board has spent of its privacy is not known: {self._damage}",
                hint=f"Restore {self._path.name}; without it the board would begin again at 0.",
            )

    def _restore(self, body: dict[str, Any] | None) -> None:
        if body is None:
            return
        cost, draws = body.get("cost"), body.get("draws")
        if type(cost) is not float or not 0 <= cost < math.inf or type(draws) is not int or not 0 <= draws < _MAX_DRAWS:
            raise StorageError(f"{self._path} is of another version")
        self.cost, self.draws, self._is_marked = cost, draws, True

    def _write(self, cost: float, draws: int) -> None:
        atomic_file.write_document(self._path, {"cost": float(cost), "draws": draws})
        self.cost, self.draws, self._is_marked = float(cost), draws, True
