"""Allocators decide how much of the model each device gets; the coordinator asks them.

An allocator has no state of its own: what it remembers of a device is in `Device.allocation`, what it remembers of the
fleet in `State.allocation`, as plain JSON that is saved with every event. A density becomes widths, the same share of
every channel group, or, where masks are made of elements, stays a density over a model of full width.

No allocator gives a device more than its plan allows (`Ceiling`), unless the job says so (`ignores_plans`). Without an
allocator devices get the job's `density`, or all that their boards can hold and do within the job's deadline
(`fedprune.coordination.width_planner`).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedprune.core import validation
from fedprune.core.errors import ConfigError, Subject, value_text
from fedprune.core.settings import check_fields
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, JobDevice, State
from fedprune.model.architecture import Architecture, widths_at, widths_at_least
from fedprune.planning.width_plan import AskedShare

_SortKey = list[tuple[int, int, str]]

# What a board can hold of the model at most, and the negative seconds of its training step: more is more capable.
Capacity = tuple[float, float]

# Entries of `Device.allocation`: seconds from offer to update, of the last few rounds at the present density; and the
# density that the device was to get last, of which its plan may allow less.
TIMES, GRANTED = "times", "granted"


class Ceiling(Protocol):
    """The most that devices may get, by the memory, time, bytes, energy and disk space of their boards."""

    def grant(self, name: str, device: JobDevice, share: AskedShare) -> None:
        """Give a device a share or, where its board can't hold that, the most that it can; or the reason for none."""

    def capacity(self, name: str, device: JobDevice, *, masks_elements: bool) -> Capacity:
        """What a device can hold, whatever it is given."""


@dataclass(frozen=True, eq=False)
class Fleet:
    """The input of an allocator. An allocator replaces `density`, `widths` and `allocation` of the state's devices, and
    the state's own `allocation`, never in place; it only reads the rest. Without a `ceiling` no grant is lowered."""

    job: Job
    architecture: Architecture
    state: State
    min_channels: int = 1
    ceiling: Ceiling | None = None
    _order: list[tuple[Capacity, _SortKey, str]] = field(default_factory=list, init=False, repr=False)
    _entries: dict[str, tuple[Capacity, _SortKey, str]] = field(default_factory=dict, init=False, repr=False)

    def position(self, name: str, *, masks_elements: bool = False) -> int:
        """The position of a device among all: the most capable first, equal ones in the order of their names, in which
        numbers count as numbers. The order is stored: thousands of devices may announce themselves one by one."""
        entry, former = self._entry(name, masks_elements), self._entries.get(name)
        if entry != former:
            if former is not None:
                del self._order[bisect_left(self._order, former)]
            insort(self._order, entry)
            self._entries[name] = entry
        # Devices come or go without `position`, too, as at a restart.
        if len(self._order) != len(self.state.devices):
            self._entries.clear()
            self._entries.update((n, self._entry(n, masks_elements)) for n in self.state.devices)
            self._order[:] = sorted(self._entries.values())
        return bisect_left(self._order, entry)

    def _entry(self, name: str, masks_elements: bool) -> tuple[Capacity, _SortKey, str]:
        if self.ceiling is None:
            return (0.0, 0.0), natural_sort_key(name), name
        share, speed = self.ceiling.capacity(name, self.state.devices[name], masks_elements=masks_elements)
        return (-share, -speed), natural_sort_key(name), name

    def grant(self, name: str, density: float, *, masks_elements: bool, whole: bool = False) -> bool:
        """Give a device a share of the model, above 0 and at most 1; returns whether it had another one. Times at
        another share are forgotten. If masks are made of elements, the device keeps all channels. A device whose plan
        allows less gets less; or, if the method needs the share `whole`, takes no part."""
        device = self.state.devices[name]
        before = device.density, device.widths
        # An element mask keeps the shape of every tensor, so the board holds the whole model.
        widths = self.architecture.sizes if masks_elements else widths_at(self.architecture, density)
        share = AskedShare(
            density, widths_at_least(self.architecture, widths, self.min_channels), masks_elements, whole
        )
        if self.ceiling is not None:
            self.ceiling.grant(name, device, share)
        else:
            device.density, device.widths = density, share.widths
        if (device.density, device.widths) == before:
            return False
        # Times at another density say nothing about this one.
        if TIMES in device.allocation:
            device.allocation = {**device.allocation, TIMES: []}
        return True


class Allocator(ABC):
    """Decides on densities; by default they don't change with time. Asked twice, it gives the same answer."""

    @property
    def masks_elements(self) -> bool:
        """Whether densities are those of element masks over all channels."""
        return False

    @abstractmethod
    def admit(self, fleet: Fleet, name: str, previous: JobDevice | None) -> None:
        """Give a device that announced itself density and widths, or the reason why it takes no part (`excluded`).

        What is remembered of the device has been taken over. `previous` is the device before, if it was there; None
        also when settings may have changed.
        """

    def open(self, fleet: Fleet) -> bool:
        """A round is about to begin, of number `fleet.state.round`; returns whether densities have changed."""
        return False

    def learn(self, fleet: Fleet, name: str, task: DeviceTask, seconds: float | None) -> None:  # noqa: B027 - may stay empty
        """An update of a device counts. `seconds` are from the offer until the update was here; None if unknown, as
        after a restart."""

    def review(self, fleet: Fleet, metrics: Mapping[str, float]) -> bool:
        """A round has ended, of number `fleet.state.round`; returns whether densities have changed. `metrics` are what
        the server measured of the new model; empty where it didn't."""
        return False

    def done(self, fleet: Fleet) -> bool:
        """Whether nothing more is to be gained, and the job may end before its last round."""
        return False


@dataclass(frozen=True)
class Fixed(Allocator):
    """The same density for everybody, above 0 and at most 1; whether the method needs it `whole` on every board."""

    density: float = 1.0
    masks_elements: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        check_density(("allocator", "density"), self.density)

    def admit(self, fleet: Fleet, name: str, previous: JobDevice | None) -> None:
        fleet.grant(name, self.density, masks_elements=self.masks_elements, whole=self.whole)

    def density_of(self, fleet: Fleet, name: str) -> float:
        """The density that a device is dealt, of which its plan may allow less."""
        return self.density


@dataclass(frozen=True)
class Tiers(Allocator):
    """Densities by tier (HeteroFL, Diao et al. 2021, Sec. 4).

    Tiers are dealt from the widest by what boards can hold and how fast they are, to equal ones in the order of their
    names (numbers in them count as numbers), among all that are known when a round begins.

    Attributes:
        densities: One per tier. Where nothing is known of boards, they are dealt in this order.
        shares: Share of the fleet in each tier; empty for equal ones.
        masks_elements: Whether masks are made of elements.
    """

    densities: tuple[float, ...]
    shares: tuple[float, ...] = ()
    masks_elements: bool = False

    def __post_init__(self) -> None:
        if not self.densities:
            raise ConfigError(("allocator", "densities"), expected="one or more", got="none")
        for value in self.densities:
            check_density(("allocator", "densities"), value)
        are_valid = len(self.shares) == len(self.densities) and all(validation.is_number(s, 0) for s in self.shares)
        if self.shares and not (are_valid and 0 < sum(self.shares) < math.inf):
            raise ConfigError(
                ("allocator", "shares"), expected="one per density, of 0 or more", got=value_text(self.shares)
            )
        check_fields(self, ("allocator",))

    def admit(self, fleet: Fleet, name: str, previous: JobDevice | None) -> None:
        fleet.grant(name, self.density_of(fleet, name), masks_elements=self.masks_elements)

    def open(self, fleet: Fleet) -> bool:
        """Deal again: devices may have come since the last round."""
        changed = False
        for name, device in sorted(fleet.state.devices.items()):
            if not device.excluded:
                changed |= fleet.grant(name, self.density_of(fleet, name), masks_elements=self.masks_elements)
        return changed

    def density_of(self, fleet: Fleet, name: str) -> float:
        """The density that a device is dealt, of which its plan may allow less."""
        # The middle of the device's share of the fleet, so that no device lies on the border of two tiers.
        position = (fleet.position(name, masks_elements=self.masks_elements) + 0.5) / len(fleet.state.devices)
        shares = self.shares or (1.0,) * len(self.densities)
        tiers, cumulative_share = list(zip(self.densities, shares, strict=True)), 0.0
        for density, share in tiers if fleet.ceiling is None else sorted(tiers, reverse=True):
            cumulative_share += share / math.fsum(shares)
            if position < cumulative_share:
                return density
        # Rounding may leave the sum of the shares just below the last position.
        return density


def natural_sort_key(name: str) -> _SortKey:
    """A key that sorts `device-2` before `device-10`."""
    return [(1, 0, run) if not run.isdigit() else (0, int(run), run) for run in re.split(r"(\d+)", name) if run]


def check_density(what: Subject, value: object) -> None:
    """Check a density. Raises `ConfigError` if it is not a number above 0 and at most 1."""
    validation.check_number(what, value, 0, 1, above=True)


def density_allocator(job: Job, densities: Sequence[float], *, default: Sequence[float] = ()) -> Allocator | None:
    """The allocator of a strategy's option `densities` (one per tier), else of the job's `density`, else of a preset's
    default; None, for the planner, if all are empty."""
    if densities:
        return Tiers(tuple(densities))
    if job.density:
        return Fixed(job.density)
    if len(default) == 1:
        return Fixed(default[0], whole=default[0] == 1)
    return Tiers(tuple(default)) if default else None
