"""The privacy loss of a device's samples through a job's releases: ε at a δ, by Google's dp-accounting.

Everything released is the output of a Gaussian mechanism, or computed from such outputs (post-processing). Several, of
any noise multipliers z and each chosen in the light of those before, cost as much as a single one at multiplier
1/√Σ 1/z² (Dong et al. 2019, "Gaussian differential privacy", Corollary 3.3), whose ε at a δ is known exactly (Balle and
Wang 2018, Theorem 8). There is no amplification by subsampling: which devices a round asks follows from the job's seed,
which boards know.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination.job_end import EPSILON_NEXT
from fedprune.coordination.privacy_budget import release_cost
from fedprune.core.errors import ConfigError, MissingExtraError
from fedprune.jobs.state import State
from fedprune.updates.privacy import Privacy

EPSILON = "epsilon"


class Accountant:
    """Works out a job's ε. Raises `ConfigError` if not even the first round is within the budget, and
    `MissingExtraError` if dp-accounting is not installed."""

    def __init__(self, privacy: Privacy) -> None:
        try:
            from dp_accounting import get_epsilon_gaussian
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "dp-accounting, which computes what a private job costs, is not installed", extra="privacy"
            ) from error
        self._privacy, self._epsilon = privacy, get_epsilon_gaussian
        # Now, not after boards have spent the first round's privacy.
        first = self.epsilon(privacy.noise_multiplier**-2)
        if privacy.epsilon_budget and first > privacy.epsilon_budget:
            raise ConfigError(
                ("job", "privacy", "epsilon_budget"),
                expected=f"at least {first:.3g}, what the first round costs with noise_multiplier "
                f"{privacy.noise_multiplier:g} and delta {privacy.delta:g}",
                got=privacy.epsilon_budget,
            )

    def epsilon(self, cost: float) -> float:
        """ε at the job's δ, given the `cost`: Σ 1/z² over a device's releases."""
        return 0.0 if cost <= 0 else float(self._epsilon(1 / math.sqrt(cost), self._privacy.delta))

    def metrics(self, command: do.Evaluate) -> dict[str, float]:
        """Privacy metrics of a round: the largest ε of any device, now and after another round."""
        if command.spent is None or command.foreseen is None:
            return {}
        return {EPSILON: self.epsilon(command.spent), EPSILON_NEXT: self.epsilon(command.foreseen)}


def privacy_spending(privacy: Privacy, state: State | None) -> dict[str, Any]:
    """The privacy that a job has spent, as JSON; empty if the job promises none.

    That is `epsilon` by device, at `delta`, with the job's `noise`, `clip`, `noise_multiplier` and `epsilon_budget`.
    Every ε is None where dp-accounting is not installed.
    """
    if state is None or not state.private or not privacy.is_on:
        return {}
    epsilons: dict[str, float | None] = {}
    try:
        # Without its budget, since figures are wanted also of a job that has spent it all.
        accountant = Accountant(replace(privacy, epsilon_budget=0.0))
    except MissingExtraError:
        epsilons = dict.fromkeys(sorted(state.devices))
    else:
        epsilons = {n: accountant.epsilon(release_cost(d.releases)) for n, d in sorted(state.devices.items())}
    return privacy.to_dict() | {"epsilon": epsilons}
