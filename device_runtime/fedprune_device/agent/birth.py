"""The birth: the message in which a board describes itself on each connection."""

from __future__ import annotations

import platform
from collections.abc import Callable

from fedprune import __version__
from fedprune.core.text import one_line
from fedprune.planning.probe_report import ProbeReport
from fedprune.runtime.session import version as onnxruntime_version
from fedprune.updates import CODECS
from fedprune.wire.fleet_messages import LOG
from fedprune.wire.messages import TO, Birth, Offer, Update
from fedprune_device.data.dataset import SampleSource
from fedprune_device.launcher.slot_store import running
from fedprune_device.network.connection import Connection

AGAIN_S = 60.0
"""Seconds between two births on one connection."""

_SOFTWARE = 256
"""Characters of a birth's description of the software."""

_LONGEST = 150
"""Characters of the description of what answers predictions."""


class BirthBuilder:
    """Makes births, and compares the last one with the board's present state. `engine` describes what answers
    predictions.
    """

    def __init__(
        self,
        connection: Connection,
        data: SampleSource,
        profile_name: str = "",
        probe: ProbeReport | None = None,
        engine: Callable[[], str] = lambda: "",
    ) -> None:
        self._connection, self._data, self._engine = connection, data, engine
        self._profile_name, self._probe = profile_name, probe
        slot = running()
        self._slot = f", {slot}" if slot else ""
        self._said = 0, ""
        self._at = 0.0

    def birth(self, session: int, held: Offer | Update | None, now: float) -> Birth:
        """The birth of connection number `session`; `held` is the offer in progress or the update that waits to be
        sent.
        """
        samples, engine = self._said = self._data.samples, self._engine()
        self._at = now
        predicts = f", predicts with {one_line(engine, _LONGEST)}" if engine else ""
        return Birth(
            self._connection.device,
            session,
            self._profile_name,
            samples,
            f"fedprune {__version__}, onnxruntime {onnxruntime_version()}, Python {platform.python_version()}"
            f"{self._slot}{predicts}"[:_SOFTWARE],
            self._probe.to_dict() if self._probe is not None else None,
            None if held is None else {"job": held.job, "round": held.round, "attempt": held.attempt},
            CODECS,
            round(self._connection.answers.slowest, 3) or None,
            (TO, LOG),
        )

    def outdated(self, now: float) -> bool:
        """Whether the last birth no longer holds; checked once a minute."""
        return now >= self._at + AGAIN_S and (self._data.samples, self._engine()) != self._said
