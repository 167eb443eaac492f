"""One moment of a job as people see it: a row per device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceRow:
    """One device.

    Attributes:
        profile: Its hardware profile's name.
        density: Kept share of its channels; None before it is planned for.
        bytes_down: Payload bytes to it so far.
        bytes_up: Payload bytes from it so far.
        seconds: From its last offer to the arrival of its update, None before the first.
        metrics: Of the model that it serves, on its own test samples, as last reported.
    """

    device: str
    profile: str
    density: float | None
    parameters: int
    bytes_down: int
    bytes_up: int
    seconds: float | None
    metrics: Mapping[str, float]
    state: str


@dataclass(frozen=True)
class JobSnapshot:
    """A job at one moment: its round, the deadline's remaining seconds, the latest metrics, its devices."""

    job: str
    round: int
    rounds: int
    phase: str
    metrics: Mapping[str, float]
    remaining_s: float | None
    connected: bool
    rows: tuple[DeviceRow, ...]

    @property
    def bytes_down(self) -> int:
        return sum(r.bytes_down for r in self.rows)

    @property
    def bytes_up(self) -> int:
        return sum(r.bytes_up for r in self.rows)
