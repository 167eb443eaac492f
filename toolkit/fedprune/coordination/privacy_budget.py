"""How often each device's samples went into what others see, and under how much noise.

The count of releases at each noise multiplier is stored with the devices in a job's state. A release at
multiplier z costs 1/z², the square of a Gaussian mechanism's sensitivity over its noise, and these add up, whatever was
released before (Dong et al. 2019, Corollary 3.3): a device's sum s is what one release at multiplier 1/√s would cost.
How much ε that is, the server works out (`fedprune_server.executor.accountant`).

With local noise a release counts as soon as it is offered: what a board sent may have been seen, whatever becomes of
it. With shared noise the sums are what is released, with the noise of those who delivered. A coordinate has the noise
of the devices that hold it alone, and one of these may be curious and know its own. So a device counts at the
multiplier that its worst coordinate can have had: that of the devices whose submodels hold all of its own, less one.
With secure aggregation the server sees the sum of each cohort by itself, so only the devices of its cohort count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedprune.core.errors import ConfigError
from fedprune.jobs.state import DeviceTask, State
from fedprune.updates.privacy import Privacy
from fedprune.updates.privacy_cost import max_cost


class JobPrivacyBudget:
    """The ledger of a job's releases, by device.

    Raises `ConfigError` if the job has begun with noise and would continue without, or the other way round.
    """

    def __init__(self, state: State, privacy: Privacy) -> None:
        self._state = state
        self._privacy = privacy
        # Clipping without noise promises nothing, so that there is nothing to count.
        self._is_counted = privacy.is_on and privacy.noise_multiplier > 0
        has_limit = self._is_counted and privacy.epsilon_budget
        self._max_cost = max_cost(privacy.epsilon_budget, privacy.delta) if has_limit else None
        # A job without a round or release may still choose; afterwards a change would void what was promised.
        if state.round == 0 and not any(d.releases for d in state.devices.values()):
            state.private = self._is_counted
        elif self._is_counted != state.private:
            raise ConfigError(
                ("job", "privacy", "noise_multiplier"),
                expected="above 0 from a job's first round to its last, or 0 in all of them",
                got="0 in a job that has begun with noise"
                if state.private
                else "noise in a job that has begun without",
                hint="Start again in another folder.",
            )

    def count_offer(self, device: str) -> None:
        """Count an offer to a device as a release, where noise is local."""
        if self._is_counted and self._privacy.is_local:
            self._add_release(device, self._privacy.noise_multiplier)

    def may_be_offered(self, device: str) -> bool:
        """Whether a device may be offered one more part: with local noise, whether that is within the budget.

        What shared noise costs is known when a round ends, not before: see `release`.
        """
        if self._max_cost is None or not self._privacy.is_local:
            return True
        return release_cost(self._state.devices[device].releases) + self._privacy.noise_multiplier**-2 <= self._max_cost

    def no_device_may_be_offered(self) -> bool:
        """Whether no device at all may be offered one more part."""
        return bool(self._state.devices) and not any(self.may_be_offered(name) for name in self._state.devices)

    def release(self, tasks: Mapping[str, DeviceTask], cohorts: Sequence[Sequence[str]] = ()) -> bool:
        """Count a round's sums as released, unless that overdraws a budget of shared noise; returns whether they may be
        released. `cohorts` are, with secure aggregation, the devices of each sum that the server has seen."""
        if not self._is_counted or self._privacy.is_local:
            return True
        # The multiplier at which a round's sums tell of each device.
        noise, boards = self._privacy.noise_multiplier, self._privacy.boards
        holders_of_device = {name: len(cohort) for cohort in cohorts for name in cohort} or count_holders(tasks)
        effective_multipliers = {
            name: noise * math.sqrt(max(1, holders - 1) / boards) for name, holders in holders_of_device.items()
        }
        devices = self._state.devices
        # All or nothing: a sum can't be published for some of its devices.
        if self._max_cost is not None and any(
            release_cost(devices[n].releases) + z**-2 > self._max_cost for n, z in effective_multipliers.items()
        ):
            return False
        for name, multiplier in effective_multipliers.items():
            self._add_release(name, multiplier)
        return True

    def largest_cost(self) -> float | None:
        """The largest sum of 1/z² of any device; None where nothing is promised."""
        if not self._is_counted:
            return None
        return max((release_cost(d.releases) for d in self._state.devices.values()), default=0.0)

    def largest_cost_after_next(self) -> float | None:
        """`largest_cost` after one more release, as costly as the costliest so far; None where nothing is promised."""
        if not self._is_counted:
            return None
        smallest = min((float(z) for d in self._state.devices.values() for z in d.releases), default=None)
        return (self.largest_cost() or 0.0) + float(smallest or self._privacy.noise_multiplier) ** -2

    def _add_release(self, device: str, multiplier: float) -> None:
        device_state, key = self._state.devices[device], repr(multiplier)
        device_state.releases = device_state.releases | {key: device_state.releases.get(key, 0) + 1}


def release_cost(row: Mapping[str, int]) -> float:
    """Σ 1/z² of a device's releases."""
    return math.fsum(count * float(multiplier) ** -2 for multiplier, count in row.items())


def count_holders(tasks: Mapping[str, DeviceTask]) -> dict[str, int]:
    """By device, the number of devices whose submodels hold all channels of its own, itself among them.

    Submodels of one ranking hold one another where no width is larger; of those of different rankings nothing is said.
    """
    rows: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, task in tasks.items():
        offer = task.offer or {}
        rows.setdefault(str(offer.get("ranking")), []).append((name, tuple(offer.get("widths", task.widths))))
    holders_of_device: dict[str, int] = {}
    for members in rows.values():
        widths, inverse, counts = np.unique([w for _, w in members], axis=0, return_inverse=True, return_counts=True)
        holds = (widths[None, :, :] <= widths[:, None, :]).all(axis=2)  # [holder, held]
        holders = counts @ holds
        holders_of_device |= {
            name: int(holders[row]) for (name, _), row in zip(members, np.ravel(inverse), strict=True)
        }
    return holders_of_device
