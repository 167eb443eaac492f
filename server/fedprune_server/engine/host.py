"""Several jobs on one fleet: one connection, one word on who is there, and every device at one job at a time.

Every job is a `JobDesk` with a coordinator, a database and blobs of its own, saves what happens to it before anything
follows, and is replayed alone. The host hears for all of them: it knows which devices are there, says which job has
which of them (`fedprune.coordination.device_scheduler`), and passes on what concerns a job. To a job, a device that it
doesn't have is one that isn't there. The host itself remembers nothing: after a crash, devices announce themselves,
whoever has a part under way goes on with it, and the others are free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.wire.connection_events import ConnectionDown, ConnectionUp
from fedprune.wire.messages import Alive, Birth, BlobNotFound, BlobRequest, Death, Hello, Message, parse
from fedprune.wire.topics import NO_JOB, Topics
from fedprune_server.devices.presence import Presence
from fedprune_server.devices.quarantine import Quarantine, Quarantined, Released
from fedprune_server.devices.shutdown import FLUSH_S, GracefulShutdown
from fedprune_server.engine.device_scheduler import Loans
from fedprune_server.engine.job_runner import JobDesk
from fedprune_server.messaging.embedded_broker import Supervised, Supervisor
from fedprune_server.messaging.intake import Intake
from fedprune_server.messaging.transport import Doubled, Item, ShutOut, Wire

log = logging.getLogger("fedprune.server")

_TICK_S = 0.5
_GREETING_S = 24 * 3600.0
_ASKED_AGAIN_S = 10.0


class Host:
    """Runs several jobs over one connection.

    Args:
        desks: The jobs, by different names; the first gives boards their releases, and sees to what concerns no job.
        link: The connection, subscribed to `subscriptions`, not necessarily up yet.
        quarantine: Says whom `link` hears.
        site: The site whose devices take part.
        broker: The embedded broker, if there is one.
        clock: Seconds since 1970, as devices are told.
        monotonic: Seconds of a clock that nobody sets.

    Raises:
        ConfigError: Two jobs have one name.
    """

    def __init__(
        self,
        desks: Sequence[JobDesk],
        link: Wire,
        quarantine: Quarantine,
        *,
        site: str = "default",
        broker: Supervised | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.desks: Mapping[str, JobDesk] = {d.job.name: d for d in desks}
        if len(self.desks) != len(desks):
            names = [d.job.name for d in desks]
            raise ConfigError("jobs of one server", expected="names that differ", got=", ".join(names))
        self._first = desks[0]
        self._link, self._quarantine, self._topics, self._supervisor = (
            link,
            quarantine,
            Topics(site),
            Supervisor(broker),
        )
        self._clock, self._monotonic = clock, monotonic
        self._here: dict[str, Birth] = {}
        self._loans = Loans(self.desks, self._here)
        self._watch = Presence(lambda name: birth.session if (birth := self._here.get(name)) else None)
        self._greet_at = self._charged_at = self._ticked = 0.0
        self._intake = Intake(link, monotonic)
        self._asked: dict[str, float] = {}
        self._moved = True
        self._shutdown: GracefulShutdown | None = None
        self._stopping = False

    @property
    def first(self) -> JobDesk:
        """The first job."""
        return self._first

    @property
    def subscriptions(self) -> list[str]:
        """What the link must listen to, before it is started."""
        return self._topics.server_subscriptions()

    @property
    def finished(self) -> bool:
        """Whether all jobs are done; one that is paused is not."""
        return all(d.finished for d in self.desks.values())

    @property
    def busy(self) -> bool:
        """Whether something is under way that doesn't wait for devices or time."""
        return not all(d.quiet for d in self.desks.values())

    @property
    def lent(self) -> dict[str, str]:
        """Which job has which device; free ones are left out."""
        return dict(self._loans.lent)

    def holder(self, device: str) -> str | None:
        """Which job has a device; None for one that is free, or isn't there."""
        return self._loans.lent.get(device)

    @property
    def connected(self) -> int:
        """Number of connected devices."""
        return len(self._here)

    def present(self, device: str) -> bool:
        """Whether a device is there."""
        return device in self._here

    def stop(self) -> None:
        """End the loop soon; may be called from a signal handler or another thread."""
        self._stopping = True

    def run(self, *, until_finished: bool = False) -> None:
        """Run until `stop` is called, or until all jobs are done.

        Args:
            until_finished: End when all jobs are done, instead of telling devices that come later.

        Raises:
            FedpruneError: A command of a job failed for another reason than a device's update, or the disk fails. Every
                job's state on the disk is that of the last event that was taken in completely.
        """
        try:
            for desk in self.desks.values():
                desk.open()
            self._charged_at = self._ticked = self._monotonic()
            while not self._stopping:
                self._turn(min(d.pause_s for d in self.desks.values()))
                if until_finished and self.finished and not self.busy:
                    self._linger()
                    break
        finally:
            self._supervisor.close()
            for desk in self.desks.values():
                desk.close()

    def _turn(self, pause_s: float) -> None:
        for item in self._intake.turn(pause_s):
            self._take(item)
            if self._stopping:
                break
        for desk in self.desks.values():
            desk.turn()
        now = self._monotonic()
        if now - self._ticked >= _TICK_S:
            self._ticked = now
            self._tick(now)
        if self._moved or any(d.moved for d in self.desks.values()):
            self._moved = False
            self._share(now)
            for desk in self.desks.values():
                desk.moved = False

    def _linger(self) -> None:
        """Let the last messages out, and tell devices that come back just now that it is over."""
        shutdown = self._shutdown or self._part()
        while not self._stopping and not shutdown.over(self._monotonic()):
            self._turn(0.05)
        self._link.flush(FLUSH_S)

    # What comes in.

    def _take(self, item: Item) -> None:
        if isinstance(item, tuple):
            self._pass_on(*item)
            return
        if isinstance(item, ConnectionUp):
            log.info("connected to the broker")
            self._greet(self._monotonic())
            self._watch.connected(self._monotonic(), self._here)
        elif isinstance(item, ConnectionDown):
            log.warning("connection to the broker lost: %s", item.reason)
            self._watch.lost()
        elif isinstance(item, (ShutOut, Quarantined)):
            self._gone(item.device)
        elif isinstance(item, Released):
            self._ask(item.device)
            return
        for desk in [self._first] if isinstance(item, Doubled) else self.desks.values():
            desk.hear(item)

    def _pass_on(self, topic: str, payload: bytes) -> None:
        """Give a message to whom it concerns; what makes no sense goes to the first job, which complains of it."""
        try:
            device, job, channel = self._topics.parse(topic)
            message = parse(payload) if channel == "up" else None
        except ProtocolError:
            self._first.hear((topic, payload))
            return
        if isinstance(message, (Birth, Death)) and message.device == device:
            self._presence(message, len(payload), (topic, payload))
            return
        if device in self._here:
            self._watch.heard(device, self._monotonic())
        elif isinstance(message, Alive) or any(device in d.state.devices for d in self.desks.values()):
            self._ask(device)
        if isinstance(message, Alive):
            return
        for desk in self._concerned(message, device, job):
            desk.hear((topic, payload))

    def _concerned(self, message: Message | None, device: str, job: str) -> list[JobDesk]:
        """The jobs that a message or chunk may be for."""
        named = self.desks.get(getattr(message, "job", job))
        if named is not None:
            return [named]
        if message is None or isinstance(message, BlobNotFound):
            return list(self.desks.values())  # each knows what it waits for
        if isinstance(message, BlobRequest) and job == NO_JOB:
            return [d for d in self.desks.values() if d.offers(device, message.sha256)][:1] or [self._first]
        return [self._first]

    # Who is there.

    def _presence(self, message: Birth | Death, size: int, item: tuple[str, bytes]) -> None:
        device, known = message.device, self._here.get(message.device)
        if isinstance(message, Death):
            if known is not None and known.session == message.session:
                self._gone(device)
                self._ask(device)  # a will tells of one connection, and another may stand
            return
        if known is not None and message.session < known.session:
            return
        try:
            self._first.welcome(message, size)
        except ProtocolError:
            self._first.hear(item)
            return
        self._here[device] = message
        self._loans.came(device, anew=known is None or known.session != message.session)
        self._watch.heard(device, self._monotonic())
        self._moved = True
        held = message.held
        if held and held["job"] in self.desks:
            self.desks[held["job"]].void(device, held)
        elif held:
            self._first.void(device, held)
        if self._shutdown is not None:
            for desk in self.desks.values():
                desk.dismiss([device])
        else:
            self._loans.renew(device)

    def _gone(self, device: str) -> None:
        self._watch.left(device)
        birth = self._here.pop(device, None)
        self._moved = True
        self._loans.left(device, None if birth is None else birth.session)

    def _ask(self, device: str) -> None:
        """Let a device announce itself, if it is there."""
        now = self._monotonic()
        if now >= self._asked.get(device, now):
            self._asked[device] = now + _ASKED_AGAIN_S
            self._link.publish(self._topics.down(device), Hello(int(self._clock())).to_bytes())
            self._quarantine.sends(device)

    def _greet(self, now: float) -> None:
        self._greet_at = now + _GREETING_S
        self._link.publish(self._topics.broadcast(), Hello(int(self._clock())).to_bytes())

    def _tick(self, now: float) -> None:
        self._supervisor.tick()
        for device in self._watch.silent(now):
            self._ask(device)
        for device in self._watch.gone(self._intake.caught_up):
            self._gone(device)
        if self._link.connected and now >= self._greet_at:
            self._greet(now)

    # Who has which device.

    def _share(self, now: float) -> None:
        self._loans.charge(max(0.0, now - self._charged_at))
        self._charged_at = now
        if self.finished:
            self._loans.end()
            self._dismiss()
        else:
            self._loans.share()

    def _dismiss(self) -> None:
        """All jobs are finished: every device hears of it, once."""
        if self._shutdown is not None:
            return
        self._shutdown = self._part()
        for desk in self.desks.values():
            desk.dismiss(self._here)

    def _part(self) -> GracefulShutdown:
        """Whom to wait for: devices that take part in a job, as far as is known, or have announced themselves."""
        known = self._first.traffic.keys() | {n for d in self.desks.values() for n in d.state.devices}
        away = (n for n in known - self._here.keys() if not all(d.bars(n) for d in self.desks.values()))
        return GracefulShutdown(self._here, away, self._here.__contains__, self._monotonic())
