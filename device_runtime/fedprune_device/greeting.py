"""What a board says of itself when it is there."""

from __future__ import annotations

import platform

from fedprune import __version__, session
from fedprune.probe_report import ProbeReport
from fedprune.wire.messages import Birth, Offer, Update
from fedprune_device.source import Samples

AGAIN_S = 60.0
"""How soon a board greets again because it has other samples than it said."""


class Greeting:
    """Makes births.

    Args:
        device: The device's name.
        profile_name: What the server is told the board is.
        probe: What it measured of itself.
    """

    def __init__(self, device: str, profile_name: str, probe: ProbeReport | None) -> None:
        self._device, self._profile_name, self._probe = device, profile_name, probe
        self._samples = 0
        self._at = 0.0

    def birth(self, number: int, samples: int, held: Offer | Update | None, now: float) -> Birth:
        """A birth.

        Args:
            number: The connection's.
            samples: Training samples.
            held: What the board works on, or still has to deliver.
            now: The time.
        """
        self._samples, self._at = samples, now
        return Birth(
            self._device,
            number,
            self._profile_name,
            samples,
            f"fedprune {__version__}, onnxruntime {session.version()}, Python {platform.python_version()}",
            self._probe.to_dict() if self._probe is not None else None,
            None if held is None else {"job": held.job, "round": held.round, "attempt": held.attempt},
        )

    def outdated(self, source: Samples, now: float) -> bool:
        """Whether the server should hear of another number of samples now; counted no more often than it may."""
        return now >= self._at + AGAIN_S and source.samples != self._samples
