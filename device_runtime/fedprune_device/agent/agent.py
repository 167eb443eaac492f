"""The agent's loop: it receives a message, dispatches it by its type, and takes the next step of all work in progress.

A worker thread trains. Every message may come twice, late or never: anything that must not be lost is on the disk
before it is announced to the server, and is sent again until the server has answered.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable

from fedprune import __version__
from fedprune.core.errors import FedpruneError
from fedprune.core.text import one_line
from fedprune.planning.probe_report import ProbeReport
from fedprune.runtime.session import version as onnxruntime_version
from fedprune.updates import CODECS
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import RECONNECT, CrashStored, Reconnect, ReleaseOffer, ReleaseWithdrawn
from fedprune.wire.messages import (
    PUT,
    Accepted,
    Birth,
    BlobNotFound,
    BlobRequest,
    Cancelled,
    Death,
    Finished,
    Hello,
    Offer,
    SecureStep,
    Update,
    UploadRequest,
)
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune_device.agent.offer_handler import OfferHandler
from fedprune_device.data.dataset import SampleSource
from fedprune_device.launcher.slot_store import running
from fedprune_device.network.connection import Connection, Received
from fedprune_device.network.uplink import BoardStatus, Uplink
from fedprune_device.releases.release_agent import ReleaseAgent
from fedprune_device.releases.release_trial import Watchdog
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.telemetry.crash_reporter import CrashReporter

# Births are for what changes rarely: a source whose samples grow by the second must not send one for each.
AGAIN_S = 60.0
# The protocol takes so many characters for the description of the software.
_SOFTWARE = 256
# Characters of the predicting engine's description, so that the versions before it always fit.
_LONGEST = 150


class BirthBuilder:
    """Builds births, and notices when the last one is outdated. `engine` describes the engine that predicts.

    `may_leave`: whether the server may send the board away for a time. `private`: whether births must leave out
    whatever is measured on samples.
    """

    def __init__(
        self,
        connection: Connection,
        data: SampleSource,
        profile_name: str = "",
        probe: ProbeReport | None = None,
        engine: Callable[[], str] = lambda: "",
        *,
        may_leave: bool = True,
        private: Callable[[], bool] = lambda: False,
    ) -> None:
        self._connection, self._data, self._engine, self._private = connection, data, engine, private
        self._abilities = (PUT, RECONNECT) if may_leave else (PUT,)
        self._profile_name, self._probe = profile_name, probe
        slot = running()
        self._slot = f", {slot}" if slot else ""
        self._said = 0, ""
        self._at = 0.0

    def birth(self, session: int, held: Offer | Update | None, now: float) -> Birth:
        """The birth of connection `session`; `held` is the offer in progress or the update that waits to be sent.

        With it the server need not offer the work again that the board is at.
        """
        samples, engine = self._said = self._data.samples, self._engine()
        self._at = now
        engine_text = f", predicts with {one_line(engine, _LONGEST)}" if engine else ""
        return Birth(
            device=self._connection.device,
            session=session,
            profile=self._profile_name,
            samples=samples,
            software=f"fedprune {__version__}, onnxruntime {onnxruntime_version()}, Python {platform.python_version()}"
            f"{self._slot}{engine_text}"[:_SOFTWARE],
            probe=self._probe.to_dict() if self._probe is not None else None,
            held=None if held is None else {"job": held.job, "round": held.round, "attempt": held.attempt},
            codecs=CODECS,
            answer_s=round(self._connection.answers.slowest, 3) or None,
            abilities=self._abilities,
            effective_classes=None if self._private() else self._data.effective_classes,
        )

    def outdated(self, now: float) -> bool:
        """Whether the last birth no longer holds; checked once a minute."""
        return now >= self._at + AGAIN_S and (self._data.samples, self._engine()) != self._said


_LOG = logging.getLogger("fedprune.device")

# Seconds that a turn waits for a message. While a board downloads or trains, the next step may be due at once; an idle
# one saves its processor.
_BUSY_WAIT = 0.05
_IDLE_WAIT = 0.5

# Turns in a row that may end in an unexpected error before the agent itself ends: a new process may do better.
_FAILED_TURNS = 5


class Agent:
    """A device in a fleet (`fedprune_device.board.build_agent` makes one). `clock` is monotonic, in seconds; no server
    sends the board away for longer than `most_away_s`."""

    def __init__(
        self,
        connection: Connection,
        store: DeviceStore,
        births: BirthBuilder,
        uplink: Uplink,
        offers: OfferHandler,
        *,
        releases: ReleaseAgent,
        crashes: CrashReporter,
        watchdog: Watchdog,
        stopping: threading.Event,
        most_away_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection, self._store, self._births, self._uplink = connection, store, births, uplink
        self._offers, self._releases, self._crashes, self._watchdog = offers, releases, crashes, watchdog
        self._stopping, self._most_away_s, self._clock = stopping, most_away_s, clock
        self._finished = False

    def run(self, until_finished: bool = False) -> None:
        """Work until `stop` is called or, with `until_finished`, a job is finished.

        Raises the error if every turn fails: the service manager must see the process end.
        """
        failed_turns = 0
        self._offers.resume(self._clock())
        try:
            while not self._stopping.is_set() and not (until_finished and self._finished):
                self._watchdog.turn()
                item = self._connection.receive(_BUSY_WAIT if self._offers.under_way else _IDLE_WAIT)
                self._guarded(self._take, item)
                error = self._guarded(self._turn)
                failed_turns = 0 if error is None else failed_turns + 1
                if error is not None and failed_turns == _FAILED_TURNS:
                    raise error
        finally:
            self._watchdog.stop()
            self._offers.end(10)
            self._guarded(self._uplink.send, Death(self._connection.device, self._store.session))

    @property
    def quiet(self) -> bool:
        """Whether a restart would cost nothing: no download, no training, and no update that waits."""
        return self._offers.quiet

    @property
    def status(self) -> BoardStatus:
        return self._uplink.status

    def stop(self) -> None:
        self._stopping.set()

    def _guarded(self, step: Callable[..., None], *arguments: object) -> Exception | None:
        """Run `step` and log its error; returns an unexpected one. A single error doesn't end a board's service."""
        try:
            step(*arguments)
        except FedpruneError as error:
            _LOG.warning("%s", error)
        except Exception as error:  # noqa: BLE001
            _LOG.exception("unexpected error; going on")
            return error
        return None

    def _take(self, item: Received | Chunk | ConnectionUp | ConnectionDown | None) -> None:
        if item is None:
            return
        now = self._clock()
        self._offers.heard(now)
        match item:
            case Received():
                self._dispatch(item, now)
            case Chunk():
                if not self._releases.chunk(item):
                    self._offers.chunk(item, now)
            case ConnectionUp():
                _LOG.info("connected to the broker")
                self.status.connected = True
                self._watchdog.connected()
                self._greet(now)
                self._offers.connected(now)
            case ConnectionDown(reason):
                _LOG.info("connection to the broker lost: %s", reason)
                self.status.connected = False
                self._watchdog.lost(reason)
                self._crashes.lost()
                self._uplink.drop_chunks()

    def _dispatch(self, received: Received, now: float) -> None:
        match received.message:
            case Hello():
                self._greet(now)
                self._offers.hello(now)
            case Offer() as offer:
                self._offers.offered(offer, now)
            case Accepted() as accepted:
                self._offers.accepted(accepted)
            case Cancelled() as cancelled:
                self._offers.cancelled(cancelled)
            case Finished() as finished:
                self._offers.finished(finished)
                self._finished = True
            case SecureStep() as step:
                self._offers.secure_step(step, now)
            case BlobRequest() as request:
                self._offers.wanted(request, now)
            case UploadRequest() as request:
                self._offers.upload_wanted(request)
            case BlobNotFound(sha256):
                if not (received.private and self._releases.gone(sha256)):
                    self._offers.gone(sha256, now)
            case ReleaseOffer() | ReleaseWithdrawn() as release if received.private:
                self._releases.on_message(release)
            case CrashStored() as stored if received.private:
                self._crashes.on_stored(stored)
            case Reconnect() as advice if received.private:
                self._connection.spread(advice.spread_s)
                if advice.away_s is not None:
                    self._leave(advice.away_s, now)

    def _leave(self, seconds: float, now: float) -> None:
        """Disconnect for a time. A board with work in progress announces itself instead, and stays."""
        seconds = min(seconds, self._most_away_s)
        if self.quiet and self._releases.idle and not self._uplink.uploading:
            _LOG.info("the server asks this board to come back in %.0f s", seconds)
            self._connection.leave(seconds)
        else:
            self._greet(now)

    def _greet(self, now: float) -> None:
        self._uplink.send(self._births.birth(self._store.session, self._offers.held, now))
        self._crashes.born()
        self._uplink.hurry(now)
        self._releases.born()

    def _turn(self) -> None:
        now = self._clock()
        self._crashes.turn()
        if self._releases.turn(quiet=self.quiet):
            self.stop()
        self._uplink.send_chunks()
        self._offers.turn(now, connected=self.status.connected)
        is_idle = self._offers.report(now)
        if self.status.connected:
            if self._connection.birth_due or (is_idle and self._births.outdated(now)):
                self._greet(now)
            self._uplink.stay(self._store.session, now)
