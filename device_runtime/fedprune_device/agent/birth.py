"""What a board says of itself when it is there."""

from __future__ import annotations

import platform
from collections.abc import Callable

from fedprune import __version__
from fedprune.codec import CODECS
from fedprune.core.text import one_line
from fedprune.hardware.probe_report import ProbeReport
from fedprune.runtime import session
from fedprune.wire.log_messages import LOG
from fedprune.wire.messages import TO, Birth, Update
from fedprune.wire.offer import Offer
from fedprune_device.data.sample_source import SampleSource
from fedprune_device.launcher.slot_store import running

AGAIN_S = 60.0
"""How soon a board greets again because something else is true than it said."""

_SOFTWARE = 256
"""Characters that a birth has room for of what runs there."""

_LONGEST = 150
"""Characters of what is said of who answers predictions."""


class BirthBuilder:
    """Makes births.

    Args:
        device: The device's name.
        profile_name: What the server is told the board is.
        probe: What it measured of itself.
        answers: Says what answers predictions, and why; empty where that is nothing special.
    """

    def __init__(
        self, device: str, profile_name: str, probe: ProbeReport | None, answers: Callable[[], str] = lambda: ""
    ) -> None:
        self._device, self._profile_name, self._probe, self._answers = device, profile_name, probe, answers
        place = running()
        self._place = f", {place}" if place else ""
        self._samples, self._served = 0, ""
        self._at = 0.0

    def birth(self, number: int, samples: int, held: Offer | Update | None, now: float, answer_s: float = 0.0) -> Birth:
        """A birth.

        Args:
            number: The connection's.
            samples: Training samples.
            held: What the board works on, or still has to deliver.
            now: The time.
            answer_s: Seconds that answers take on the way here, as far as is known.
        """
        self._samples, self._served, self._at = samples, self._answers(), now
        served = f", predicts with {one_line(self._served, _LONGEST)}" if self._served else ""
        return Birth(
            self._device,
            number,
            self._profile_name,
            samples,
            f"fedprune {__version__}, onnxruntime {session.version()}, Python {platform.python_version()}"
            f"{self._place}{served}"[:_SOFTWARE],
            self._probe.to_dict() if self._probe is not None else None,
            None if held is None else {"job": held.job, "round": held.round, "attempt": held.attempt},
            CODECS,
            round(answer_s, 3) or None,
            (TO, LOG),
        )

    def outdated(self, source: SampleSource, now: float) -> bool:
        """Whether the server should hear of other samples, or of what else predicts; looked at now and then."""
        return now >= self._at + AGAIN_S and (source.samples != self._samples or self._answers() != self._served)
