"""A board's births: its announcements of itself, which it sends after it has connected and when their content changes.

A birth names the board's profile, software and number of samples, so that the server can plan for it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

from fedprune import __version__
from fedprune.core.text import one_line
from fedprune.planning.probe_report import ProbeReport
from fedprune.updates import CODECS
from fedprune.wire.fleet_messages import RECONNECT_ABILITY
from fedprune.wire.messages import PUT_ABILITY, Birth, BoardWarning, Offer, UpdateAnnouncement
from fedprune_device.data.dataset import SampleSource
from fedprune_device.launcher.slot_store import running_slot_text
from fedprune_device.network.connection import BoardConnection

# Births are for what changes rarely: a source whose samples grow by the second must not send one for each.
# New warnings wait for longer: what a whole fleet warns of must not make its server slower still.
BIRTH_INTERVAL_S, WARNINGS_INTERVAL_S = 60.0, 600.0
_MAX_SOFTWARE_LENGTH = 256  # characters that the protocol takes for the description of the software
_MAX_ENGINE_LENGTH = 150  # characters of the predicting engine's description, so that the versions before it always fit


class BirthBuilder:
    """Builds births, and notices when the last one is outdated. `engine` describes the engine that predicts.

    `runtime` is onnxruntime's version, given because an idle board saves the memory of loading it. `may_leave`: whether
    the server may send the board away for a time.
    """

    def __init__(
        self,
        connection: BoardConnection,
        data: SampleSource,
        profile_name: str = "",
        probe: ProbeReport | None = None,
        engine: Callable[[], str] = lambda: "",
        *,
        runtime: str = "",
        may_leave: bool = True,
        warnings: Callable[[], tuple[BoardWarning, ...]] = tuple,
    ) -> None:
        self._connection, self._data, self._engine = connection, data, engine
        self._warnings, self._sent_texts = warnings, frozenset[str]()
        self._abilities = (PUT_ABILITY, RECONNECT_ABILITY) if may_leave else (PUT_ABILITY,)
        self._profile_name, self._probe, self._runtime = profile_name, probe, runtime
        slot = running_slot_text()
        self._slot = f", {slot}" if slot else ""
        self._last_content = 0, ""
        self._last_birth_at = 0.0

    def build(self, session: int, work: Offer | UpdateAnnouncement | None, now: float) -> Birth:
        """The birth of connection `session`. `work` is the offer in progress, or the update that is still to be sent:
        the server need not offer it again."""
        samples, engine = self._last_content = self._data.samples, self._engine()
        self._last_birth_at, warnings = now, self._warnings()
        self._sent_texts = _texts_of(warnings)
        engine_text = f", predicts with {one_line(engine, _MAX_ENGINE_LENGTH)}" if engine else ""
        versions = f"onnxruntime {self._runtime}, Python {platform.python_version()}"
        software = f"fedprune {__version__}, {versions}{self._slot}{engine_text}"
        return Birth(
            device=self._connection.device,
            session=session,
            profile=self._profile_name,
            samples=samples,
            software=software[:_MAX_SOFTWARE_LENGTH],
            probe=self._probe.to_dict() if self._probe is not None else None,
            held=None if work is None else {"job": work.job, "round": work.round, "attempt": work.attempt},
            codecs=CODECS,
            answer_s=round(self._connection.response_time.slowest_s, 3) or None,
            abilities=self._abilities,
            warnings=warnings,
        )

    def is_outdated(self, now: float) -> bool:
        """Whether the last birth no longer holds; checked once a minute."""
        content, age_s = (self._data.samples, self._engine()), now - self._last_birth_at
        if age_s >= WARNINGS_INTERVAL_S and not _texts_of(self._warnings()) <= self._sent_texts:
            return True
        return age_s >= BIRTH_INTERVAL_S and content != self._last_content


def _texts_of(warnings: tuple[BoardWarning, ...]) -> frozenset[str]:
    return frozenset(warning["text"] for warning in warnings)
