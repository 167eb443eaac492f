"""The agent: listens for offers, pulls what they need, trains, hands in the update, and serves on meanwhile.

One loop does everything that is quick; a worker thread trains. Every message may come twice, late or never: what must
not be lost is on the disk before anything is said about it, and is said again until the server has answered.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from fedprune.core.errors import FedpruneError, StorageError
from fedprune.hardware.probe_report import ProbeReport
from fedprune.hardware.profile import HardwareProfile
from fedprune.runtime.precision import FLOAT32
from fedprune.wire.broker_url import tls_context
from fedprune.wire.chunk import MAX_PACKET, Chunk
from fedprune.wire.connection_events import ConnectionDown, ConnectionUp
from fedprune.wire.messages import Accepted, Cancelled, Death, Finished, Gone, Hello, Message, Want, parse
from fedprune.wire.offer import Offer
from fedprune.wire.rtt import AnswerTime
from fedprune.wire.topics import EVERYONE, Topics
from fedprune.wire.transfer import Serve
from fedprune_device.agent.birth import BirthBuilder
from fedprune_device.agent.offer_handler import OfferHandler
from fedprune_device.data.sample_source import SampleSource
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.network.downloader import Downloader
from fedprune_device.network.status import BoardStatus
from fedprune_device.network.uplink import Uplink, Wire
from fedprune_device.serving.reduced_precision import ReducedPrecision
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.graph_choice import GraphChoice
from fedprune_device.training.offline_training import OfflineTraining
from fedprune_device.training.round_runner import RoundRunner, TrainerCache

_LOG = logging.getLogger("fedprune.device")

_BUSY_WAIT = 0.05
_IDLE_WAIT = 0.5

_FAILED_TURNS = 5
"""Turns in a row that may end in an unexpected error before the agent itself ends: a new process may mend it."""


class Agent:
    """A device in a fleet.

    Args:
        device: Its name.
        site: The fleet's site.
        store: Its state directory.
        link: The connection; it must be subscribed to `Topics(site).device_subscriptions(device)`.
        data: Its samples.
        profile: What the board is; without it only the disk limits what is accepted.
        profile_name: What the server is told the board is; the profile's name by default.
        threads: Threads for training.
        cuda: Whether to train on an NVIDIA GPU, if that works.
        probe: What the board measured of itself.
        care: Lets training wait while the board is too hot.
        alone: Seconds after which it trains without its server; 0 for never (`OfflineTraining`).
        answers: Says what answers predictions, for the server; empty where that is nothing special.
        precision: What its model serves at (`serving.reduced_precision.SERVE`).
        serves: The job whose models may serve; empty for those of any job.
        max_packet: Bytes of an MQTT packet that the broker lets through, as far as is known.
        web: Gives TLS with the web servers that offers name.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        device: str,
        site: str,
        store: DeviceStore,
        link: Wire,
        data: SampleSource,
        *,
        profile: HardwareProfile | None = None,
        profile_name: str = "",
        threads: int = 1,
        cuda: bool = False,
        probe: ProbeReport | None = None,
        care: ThermalGuard | None = None,
        alone: float = 0.0,
        answers: Callable[[], str] = lambda: "",
        precision: str = FLOAT32,
        serves: str = "",
        max_packet: int = MAX_PACKET,
        web: Callable[[], ssl.SSLContext] = tls_context,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._topics = device, Topics(site)
        self._store, self._link = store, link
        self._outbox = Uplink(device, self._topics, link, Serve(store.blobs), max_packet)
        self._answers = AnswerTime()
        self._supply = Downloader(store, link, self._topics, self._outbox, self._answers, max_packet, web)
        self._data, self._clock = data, clock
        known = profile_name or (profile.name if profile is not None else "")
        self._greeting = BirthBuilder(device, known, probe, answers)
        lowering = ReducedPrecision(precision, threads)
        store.slots.job = serves
        trainer = TrainerCache(threads, cuda=cuda)
        bench = RoundRunner(device, store.blobs, store.slots, data, trainer, store.own, lowering, store.privacy.draw)
        self._alone = OfflineTraining(device, store, data, threads, alone, care, cuda=cuda, lowering=lowering)
        self._duty = OfferHandler(
            store,
            self._supply,
            self._outbox,
            bench,
            self._alone,
            choice=GraphChoice(standard=cuda),
            lowering=lowering,
            profile=profile,
            care=care,
        )
        self._finished = False
        self._stopping = threading.Event()

    def run(self, until_finished: bool = False) -> None:
        """Work until `stop` is called.

        Args:
            until_finished: Return when the server says that a job is finished, too.

        Raises:
            Exception: Every turn fails with an unexpected error. The service manager must see that it ends.
        """
        failed = 0
        self._duty.resume(self._clock())
        try:
            while not self._stopping.is_set() and not (until_finished and self._finished):
                item = self._link.get(_BUSY_WAIT if self._duty.under_way else _IDLE_WAIT)
                self._guarded(self._take, item)
                unexpected = self._guarded(self._turn, None)
                failed = 0 if unexpected is None else failed + 1
                if unexpected is not None and failed == _FAILED_TURNS:
                    raise unexpected
        finally:
            self._duty.end(10)
            self._outbox.say(Death(self._device, self._store.session))

    @property
    def quiet(self) -> bool:
        """Whether a restart would cost nothing: nothing is pulled or trained, and no update waits to be handed in."""
        return self._duty.quiet

    def stop(self) -> None:
        """Let `run` return soon; may be called from a signal handler or another thread."""
        self._stopping.set()

    @property
    def standing(self) -> BoardStatus:
        """What it is at; may be read from any thread."""
        return self._outbox.standing

    def will(self) -> tuple[str, bytes]:
        """Topic and payload that the broker shall publish when the next connection is lost; numbers that connection."""
        try:
            self._store.next_session()
        except StorageError as error:
            _LOG.warning("can't keep the session number: %s", error)
            self._store.session += 1
        return self._outbox.will(self._store.session)

    def _guarded(self, step: Callable[[Any], None], argument: Any) -> Exception | None:
        """Log an error of `step` and return it if it is unexpected: a single one doesn't end a board's service."""
        try:
            step(argument)
        except FedpruneError as error:
            _LOG.warning("%s", error)
        except Exception as error:  # noqa: BLE001
            _LOG.exception("unexpected error; going on")
            return error
        return None

    # What comes in

    def _take(self, item: tuple[str, bytes] | ConnectionUp | ConnectionDown | None) -> None:
        now = self._clock()
        if isinstance(item, ConnectionUp):
            _LOG.info("connected to the broker")
            self.standing.connected = True
            self._alone.heard(now)
            self._answers.connected(item.took)
            self._duty.forget_offers()
            self._greet(now)
            self._supply.connected(now)
        elif isinstance(item, ConnectionDown):
            _LOG.info("connection to the broker lost: %s", item.reason)
            self.standing.connected = False
            self._outbox.drop_chunks()
            self._alone.heard(now)
        elif item is not None:
            self._alone.heard(now)
            topic, payload = item
            address = self._topics.parse(topic)
            if address.channel == "down/blob":
                self._duty.chunk(Chunk.parse(payload), now, shared=address.device == EVERYONE)
            elif address.channel == "down":
                self._on_message(parse(payload), now)

    def _on_message(self, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            self._duty.forget_offers()
            self._greet(now)
            self._supply.remind(now)
        elif isinstance(message, Offer):
            self._duty.offered(message, now)
        elif isinstance(message, Accepted):
            self._duty.accepted(message)
        elif isinstance(message, Cancelled):
            self._duty.cancelled(message)
        elif isinstance(message, Finished):
            self._duty.finished(message)
            self._finished = True
        elif isinstance(message, Want):
            self._outbox.answer(message, self._store.pending, now)
        elif isinstance(message, Gone):
            self._duty.gone(message.sha256, now)

    def _greet(self, now: float) -> None:
        birth = self._greeting.birth(
            self._store.session, self._data.samples, self._duty.held, now, self._answers.slowest
        )
        self._outbox.say(birth)
        self._outbox.hurry(now)

    def _turn(self, _: None) -> None:
        now = self._clock()
        self._outbox.send_chunks()
        self._duty.turn(now, connected=self.standing.connected)
        idle = self._duty.report(now)
        if idle and self.standing.connected and self._greeting.outdated(self._data, now):
            self._greet(now)
        if self.standing.connected:
            self._outbox.stay(self._store.session, now)
