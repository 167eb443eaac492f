"""The agent's loop: it receives a message, dispatches it by its type, and takes the next step of all work in progress.

A worker thread trains. Every message may come twice, late or never: anything that must not be lost is on the disk
before it is announced to the server, and is sent again until the server has answered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fedprune.core.errors import FedpruneError
from fedprune.wire import messages
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import CrashStored, Reconnect, ReleaseOffer, ReleaseWithdrawn
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune_device.agent.births import BirthBuilder
from fedprune_device.agent.offer_handler import OfferHandler
from fedprune_device.network.board_status import BoardStatus
from fedprune_device.network.connection import BoardConnection, ReceivedMessage
from fedprune_device.network.update_sender import UpdateSender
from fedprune_device.network.uplink import Uplink
from fedprune_device.releases.release_agent import ReleaseAgent
from fedprune_device.releases.watchdog import Watchdog
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.telemetry.crash_reporter import CrashReporter

_LOG = logging.getLogger("fedprune.device")

# Seconds that a turn waits for a message. While a board downloads or trains, the next step may be due at once; an idle
# one saves its processor.
_BUSY_WAIT_S = 0.05
_IDLE_WAIT_S = 0.5

# Turns in a row that may end in an unexpected error before the agent itself ends: a new process may do better.
_MAX_FAILED_TURNS = 5


class Agent:
    """A device in a fleet (`fedprune_device.board.build_agent` makes one). `clock` is monotonic, in seconds; no server
    sends the board away for longer than `max_away_s`."""

    def __init__(
        self,
        connection: BoardConnection,
        store: DeviceStore,
        births: BirthBuilder,
        uplink: Uplink,
        sender: UpdateSender,
        offers: OfferHandler,
        *,
        releases: ReleaseAgent,
        crashes: CrashReporter,
        watchdog: Watchdog,
        stopping: threading.Event,
        max_away_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection, self._store, self._births = connection, store, births
        self._uplink, self._sender = uplink, sender
        self._offers, self._releases, self._crashes, self._watchdog = offers, releases, crashes, watchdog
        self._stopping, self._max_away_s, self._clock = stopping, max_away_s, clock
        self._job_finished = False

    def run(self, until_finished: bool = False) -> None:
        """Work until `stop` is called or, with `until_finished`, a job is finished.

        Raises the error if every turn fails: the service manager must see the process end.
        """
        failed_turns = 0
        self._offers.resume(self._clock())
        try:
            while not self._stopping.is_set() and not (until_finished and self._job_finished):
                self._watchdog.turn()
                item = self._connection.receive(_BUSY_WAIT_S if self._offers.is_working else _IDLE_WAIT_S)
                self._run_guarded(self._on_item, item)
                error = self._run_guarded(self._turn)
                failed_turns = 0 if error is None else failed_turns + 1
                if error is not None and failed_turns == _MAX_FAILED_TURNS:
                    raise error
        finally:
            self._watchdog.stop()
            self._offers.end(10)
            self._run_guarded(self._uplink.send, messages.Death(self._connection.device, self._store.session))

    @property
    def is_quiet(self) -> bool:
        """Whether a restart would cost nothing: no download, no training, and no update that waits."""
        return self._offers.is_quiet

    @property
    def status(self) -> BoardStatus:
        return self._uplink.status

    def stop(self) -> None:
        self._stopping.set()

    def _run_guarded(self, step: Callable[..., None], *arguments: object) -> Exception | None:
        """Run `step` and log its error; returns an unexpected one. A single error doesn't end a board's service."""
        try:
            step(*arguments)
        except FedpruneError as error:
            _LOG.warning("%s", error)
        except Exception as error:  # noqa: BLE001
            _LOG.exception("unexpected error; going on")
            return error
        return None

    def _on_item(self, item: ReceivedMessage | Chunk | ConnectionUp | ConnectionDown | None) -> None:
        if item is None:
            return
        now = self._clock()
        self._offers.note_contact(now)
        match item:
            case ReceivedMessage():
                self._dispatch(item, now)
            case Chunk():
                if not self._releases.on_chunk(item):
                    self._offers.on_chunk(item, now)
            case ConnectionUp():
                _LOG.info("connected to the broker")
                self.status.connected = True
                self._watchdog.on_connect()
                self._send_birth(now)
                self._offers.on_connect(now)
            case ConnectionDown(reason):
                _LOG.info("connection to the broker lost: %s", reason)
                self.status.connected = False
                self._watchdog.on_disconnect(reason)
                self._crashes.on_disconnect()
                self._sender.drop_chunks()

    def _dispatch(self, received: ReceivedMessage, now: float) -> None:
        match received.message:
            case messages.Hello():
                self._send_birth(now)
                self._offers.on_hello(now)
            case messages.Offer() as offer:
                self._offers.on_offer(offer, now)
            case messages.Accepted() as accepted:
                self._offers.on_accepted(accepted)
            case messages.Cancelled() as cancelled:
                self._offers.on_cancelled(cancelled)
            case messages.Finished() as finished:
                self._offers.on_finished(finished)
                self._job_finished = True
            case messages.SecureStep() as step:
                self._offers.on_secure_step(step, now)
            case messages.BlobRequest() as request:
                self._sender.on_blob_request(request, self._store.pending, now)
            case messages.UploadRequest() as request:
                self._sender.start_upload(request, self._store.pending)
            case messages.BlobNotFound(sha256):
                if not (received.private and self._releases.on_blob_not_found(sha256)):
                    self._offers.on_blob_not_found(sha256, now)
            case ReleaseOffer() | ReleaseWithdrawn() as release if received.private:
                self._releases.on_message(release)
            case CrashStored() as stored if received.private:
                self._crashes.on_stored(stored)
            case Reconnect() as advice if received.private:
                self._connection.link.spread_s = advice.spread_s
                if advice.away_s is not None:
                    self._leave(advice.away_s, now)

    def _leave(self, seconds: float, now: float) -> None:
        """Disconnect for a time. A board with work in progress announces itself instead, and stays."""
        seconds = min(seconds, self._max_away_s)
        if self.is_quiet and self._releases.is_idle and not self._sender.is_uploading:
            _LOG.info("the server asks this board to come back in %.0f s", seconds)
            self._connection.link.leave(seconds)
        else:
            self._send_birth(now)

    def _send_birth(self, now: float) -> None:
        self._uplink.send(self._births.build(self._store.session, self._offers.current_work, now))
        self._crashes.on_birth()
        self._sender.announce_soon(now)
        self._releases.on_birth()

    def _turn(self) -> None:
        now = self._clock()
        self._crashes.turn()
        if self._releases.turn(quiet=self.is_quiet):
            self.stop()
        self._sender.send_chunks()
        self._offers.turn(now, connected=self.status.connected)
        is_idle = self._offers.report_progress(now)
        if self.status.connected:
            if self._connection.channel.is_birth_due or (is_idle and self._births.is_outdated(now)):
                self._send_birth(now)
            self._uplink.send_alive(self._store.session, now)
