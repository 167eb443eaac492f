"""The board's own count of updates with noise, written to the disk before noise is drawn.

A server counts, too, but it may be restored from an older backup, run other jobs, or be replaced. The board counts its
own updates with its own noise, as an observer of single updates sees them; a job with `shared` noise promises more to
those who see only sums. Every draw of noise counts, also for an offer that is done twice or an update that is never
sent.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

from fedprune.core import atomic_file
from fedprune.core.errors import PrivacyError, StorageError
from fedprune.model.recipe import Recipe
from fedprune.updates.clipped_noise import GaussianNoise
from fedprune.updates.privacy_cost import epsilon_for
from fedprune.wire.messages import Offer
from fedprune_device.privacy.policy import PrivacyPolicy, multiplier_of

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
        Raises `PrivacyError` if it is less private than the owner asks for, or what was spent is no longer known."""
        if self.policy is None and not recipe.update_clip:
            return
        if self._damage:
            raise PrivacyError(
                f"what this board has spent of its privacy is not known: {self._damage}",
                hint=f"Restore {self._path.name}; without it the board would begin again at 0.",
            )
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
