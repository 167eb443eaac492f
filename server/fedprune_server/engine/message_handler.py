"""The daemon's way in: what devices say, checked, and turned into events of the job."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.coordination.stragglers import news, share_of
from fedprune.core.errors import ProfileError, ProtocolError, UnknownMessageError
from fedprune.core.metrics import believable, served
from fedprune.core.text import one_line
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress as Part
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import NAME
from fedprune.planning.profile_store import find
from fedprune.wire.chunk import Chunk
from fedprune.wire.log_messages import LOG, CrashReport, LogReport
from fedprune.wire.messages import (
    Alive,
    Birth,
    BlobNotFound,
    BlobRequest,
    Cancelled,
    Death,
    Hello,
    Progress,
    Refusal,
    Update,
    parse,
)
from fedprune.wire.rejected_messages import RejectedMessageLog
from fedprune.wire.release_messages import ReleaseReport
from fedprune.wire.topics import Topics
from fedprune_server.devices.board_logs import BoardLogs
from fedprune_server.devices.quarantine import Quarantine, Quarantined, Released
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.messaging.outbox import Post
from fedprune_server.messaging.transport import Noticed, ShutOut
from fedprune_server.ota.coordinator import RolloutCoordinator
from fedprune_server.transfer.uploads import Uploads

log = logging.getLogger("fedprune.server")

_AGAIN_S = 10.0
"""At most so often a device that counts as offline, and speaks, is asked to announce itself."""

_SHOWN = 10

_PROFILE_S = 10.0
"""A hardware profile that was read is good for so long."""


class Reception:
    """Takes in messages and chunks. What needs no decision (bytes asked for, bytes that came) it sees to itself.

    Args:
        job: The job.
        state: The coordinator's state; read, never changed.
        topics: The site's topics.
        registry: The devices.
        uploads: Updates on their way here.
        post: The way out.
        profiles: Folders of hardware profiles beside the shipped ones.
        monotonic: Seconds of a clock that nobody sets.
        desk: Runs rollouts of releases, if there is one.
        clock: Seconds since 1970, as devices are told.
        quarantine: Is told who sends what can't be used.
        logs: Keeps what boards tell of their logs; None to ask for nothing of that.

    Attributes:
        out: Devices that were shut out and have not been born again.
        asks: Whether devices that count as offline and speak are asked to announce themselves; not where somebody else
            says who is there.
    """

    def __init__(
        self,
        job: Job,
        state: State,
        topics: Topics,
        registry: DeviceRegistry,
        uploads: Uploads,
        post: Post,
        profiles: Sequence[Path],
        monotonic: Callable[[], float],
        desk: RolloutCoordinator | None = None,
        clock: Callable[[], float] = time.time,
        quarantine: Quarantine | None = None,
        logs: BoardLogs | None = None,
    ) -> None:
        self._quarantine = quarantine or Quarantine(monotonic)
        self._job = job
        self._state = state
        self._topics = topics
        self._registry = registry
        self._uploads = uploads
        self._post = post
        self._profiles = tuple(profiles)
        self._monotonic = monotonic
        self._clock = clock
        self._desk = desk
        self._logs = logs
        self._complaints = RejectedMessageLog(log, monotonic)
        self._asked: dict[str, float] = {}
        self._known_profiles: dict[str, tuple[float, dict[str, Any] | None]] = {}
        self.out: set[str] = set()
        self.asks = True

    def receive(self, topic: str, payload: bytes) -> on.Event | None:
        """Take in what came over the wire; what is wrong is logged, the first few times, and dropped.

        Returns:
            What happened to the job, if anything did.

        Raises:
            StorageError: The disk fails.
        """
        device = ""
        try:
            device, _, channel = self._topics.parse(topic)
            self._registry.received(device, len(payload))
            if channel == "up/blob":
                self._post.ask(self._uploads.chunk(device, Chunk.parse(payload), self._monotonic()))
                return None
            if channel != "up":
                raise ProtocolError("channel", expected="up or up/blob", got=channel)
            return self._message(device, payload)
        except ProtocolError as error:
            self._complaints.about(topic, error)
            if not isinstance(error, UnknownMessageError):
                self._quarantine.bad(device)
            return None

    def gather(self) -> None:
        """Take in what receivers say, and charge devices for what those took in.

        Raises:
            StorageError: The disk fails.
        """
        self._post.ask(self._uploads.collect(self._monotonic()))
        for device, size in self._uploads.taken():
            self._registry.received(device, size)
            self._quarantine.hears(device, size, chunk=True)

    def judged(self, event: on.Event) -> None:
        """Note what became of a device's update."""
        if isinstance(event, on.UpdateRejected):
            self._quarantine.refused(event.device, event.reason)
        elif isinstance(event, on.Folded):
            self._quarantine.counted(event.device)

    def noticed(self, item: Noticed) -> list[on.Event]:
        """Take in what the connection noticed about a device, and nobody said."""
        if isinstance(item, ShutOut):
            return self._shut_out(item.device)
        if isinstance(item, Quarantined):
            return self._left(item.device, f"it is in quarantine: {item.reason}", again=False)
        if isinstance(item, Released):
            self._ask(item.device)
        else:
            self._registry.doubled(item.device, self._monotonic())
        return []

    def missed(self, caught_up: float) -> list[on.Event]:
        """Devices that were asked whether they are there, and haven't answered.

        Args:
            caught_up: When no message waited, lastly.
        """
        gone = self._registry.presence.gone(caught_up)
        if gone:
            names = ", ".join(sorted(gone)[:_SHOWN]) + (" ..." if len(gone) > _SHOWN else "")
            log.info("%d devices don't answer and are taken for gone: %s", len(gone), names)
        for device in gone:
            self._uploads.drop(device)
            self._post.forget(device)
        return [on.DeviceDied(device, session) for device, session in gone.items()]

    def _shut_out(self, device: str) -> list[on.Event]:
        """A device is no member any more: what it wanted or was handing in is void, and nobody waits for it."""
        if self._desk is not None:
            self._desk.without([device])
        log.warning("%sdevice %s was shut out", self._registry.prefix, device)
        self._registry.clones.forget(device)
        self.out.add(device)
        return self._left(device, "it was shut out", again=False)

    def _left(self, device: str, reason: str, *, again: bool) -> list[on.Event]:
        """A device isn't there for the job any more: its part in the round is void."""
        known, task = self._state.devices.get(device), self._state.tasks.get(device)
        if known is None:
            return []
        events: list[on.Event] = [self.ended(device, known.session, again=again)]
        if task is not None:
            part = device, self._state.round_of(task), task.attempt, reason
            if task.progress is Part.OFFERED:
                events.append(on.OfferRefused(*part))
            if task.progress is Part.PULLING:
                events.append(on.UpdateRejected(*part))
        return events

    def ended(self, device: str, session: int, *, again: bool = True) -> on.Event:
        """A device's connection has ended.

        Args:
            device: The device.
            session: The connection.
            again: Whether it may announce itself anew.
        """
        known = self._state.devices.get(device)
        if known is not None and known.session == session:
            self._uploads.drop(device)
            self._post.forget(device)
            if again and device not in self.out:
                self._ask(device)  # a will tells of one connection, and another may stand
        self._registry.gone(device)
        return on.DeviceDied(device, session)

    def _message(self, device: str, payload: bytes) -> on.Event | None:
        message = parse(payload)
        said = getattr(message, "device", device)
        if said != device:
            raise ProtocolError("device of a message", expected=device, got=said)
        if not isinstance(message, Death):
            self._registry.presence.heard(device, self._monotonic())
        known = self._state.devices.get(device)
        # A birth that got lost between two brokers is not said again by itself.
        missed = isinstance(message, Alive) if known is None else not known.online
        if missed and not isinstance(message, (Birth, Death)):
            self._ask(device)
        match message:
            case Birth():
                return self._born(message, len(payload))
            case Death():
                return self.ended(device, message.session)
            case BlobRequest():
                self._registry.heard(device, self._monotonic())
                self._post.fetched(device, message, self._offered(device))
            case ReleaseReport():
                if self._desk is not None:
                    self._desk.reported(message)
            case LogReport() | CrashReport():
                self._told(message)
            case Alive():
                pass
            case BlobNotFound():
                self._post.ask(self._uploads.gone(device, message.sha256, self._monotonic()))
            case Progress() | Refusal() | Update():
                if message.job == self._job.name:
                    return self._report(device, message)
                if isinstance(message, Update):
                    self.void(device, message.job, message.round, message.attempt)
            case _:
                raise ProtocolError("message of a device", got=message.kind)
        return None

    def _ask(self, device: str) -> None:
        """Let a device announce itself, if it is there."""
        now = self._monotonic()
        if self.asks and now >= self._asked.get(device, now):
            self._asked[device] = now + _AGAIN_S
            self._post.send(device, Hello(int(self._clock())))

    def _born(self, birth: Birth, size: int) -> on.Event | None:
        self.out.discard(birth.device)
        self._registry.admit(birth.device, one_line(birth.software), size)
        self._quarantine.born(birth.device)
        name = one_line(birth.profile, 64)
        self._registry.born(birth.device, birth.session, name, birth.samples, self._monotonic())
        answer_s, abilities = birth.answer_s or 0.0, birth.abilities or ()
        self._post.ask(self._uploads.born(birth.device, birth.session, answer_s, self._monotonic(), abilities))
        if self._desk is not None:
            self._desk.born(birth.device)
        self.wants_log(birth)
        if birth.held is not None:
            self.void(birth.device, **birth.held)
        return self.described(birth, name)

    def wants_log(self, birth: Birth) -> None:
        """Tell a board that is there what of its log it may tell, if it knows how to."""
        if self._logs is not None and LOG in (birth.abilities or ()):
            self._post.send(birth.device, self._logs.wanted(birth.device))

    def keep_logs(self) -> None:
        """Write down what boards told of their logs, and tell them that it is here."""
        for device, answer in ({} if self._logs is None else self._logs.save()).items():
            self._post.send(device, answer)

    def _told(self, message: LogReport | CrashReport) -> None:
        if self._logs is None or not self._registry.admitted(message.device):
            return  # anybody can think of names
        if isinstance(message, CrashReport):
            self._logs.crashed(message)
        else:
            self._logs.lines(message)

    def described(self, birth: Birth, name: str) -> on.DeviceBorn | None:
        """What a device says of itself, checked, as an event; None where it can't even be planned for.

        Args:
            birth: Its announcement.
            name: Its profile's name, as it may be shown.
        """
        try:
            profile = self._profile(_plain_name(birth.profile))
            # What is kept is what we know how to check, and no more.
            probe = None if birth.probe is None else ProbeReport.from_dict(birth.probe).to_dict()
        except ProfileError as error:
            self._registry.exclude(birth.device, _advice(error), name, birth.samples)
            return None
        return on.DeviceBorn(birth.device, birth.session, profile, birth.samples, probe, birth.codecs or ())

    def _profile(self, name: str) -> dict[str, Any]:
        """A hardware profile; a file that was changed is read again soon.

        Boards of one kind share one object: thousands of copies would fill the memory.
        """
        now = self._monotonic()
        read_at, known = self._known_profiles.get(name, (-math.inf, None))
        if known is None or now - read_at > _PROFILE_S:
            found = find(name, self._profiles).to_dict()
            known = known if known == found else found
            self._known_profiles[name] = now, known
        return known

    def _report(self, device: str, message: Progress | Refusal | Update) -> on.Event | None:
        """What a device says about its part in a round."""
        if isinstance(message, Progress):
            task = self._state.tasks.get(device)
            if task is not None and (message.round, message.attempt) == (self._state.round_of(task), task.attempt):
                self._registry.heard(device, self._monotonic(), message)
                share = share_of(message.phase, message.done, message.total) if self._job.pace else None
                if share is not None and task.progress is Part.OFFERED and news(task, share):
                    return on.Progressed(device, message.round, message.attempt, share)
            return None
        if isinstance(message, Refusal):
            reason = one_line(message.reason)
            log.warning("%sdevice %s refuses round %d: %s", self._registry.prefix, device, message.round, reason)
            return on.OfferRefused(device, message.round, message.attempt, reason)
        contact = self._registry[device]
        metrics = believable(message.metrics)
        accuracy, loss = served(metrics, "accuracy"), served(metrics, "loss")
        contact.accuracy = contact.accuracy if accuracy is None else accuracy
        contact.loss = contact.loss if loss is None else loss
        if self._uploads.fetching(device, message.round, message.attempt, message.weights):
            self._post.ask(self._uploads.heard(device, self._monotonic()))
            return None  # said again while it waits its turn: in a large fleet that is most of what is announced
        return on.UpdateAnnounced(
            device,
            message.round,
            message.attempt,
            message.base,
            message.weights.to_dict(),
            message.samples,
            message.steps,
            metrics,
        )

    def void(self, device: str, job: str, round: int, attempt: int) -> None:  # noqa: A002 - the message's own names
        """If what a device holds can't count any more, tell it to let go, so that it doesn't train in vain."""
        task = self._state.tasks.get(device)
        if job != self._job.name:
            reason = "this server runs another job"
        elif task is None or round != self._state.round_of(task):
            reason = "the round is over"  # an earlier attempt of this round may be going on as the present one
        else:
            return
        self._post.send(device, Cancelled(job, round, attempt, reason), job)

    def _offered(self, device: str) -> frozenset[str]:
        """Digests of what a device may fetch: only what its own offer names, and the release that it is given."""
        return self.offered(device) | (frozenset() if self._desk is None else self._desk.files(device))

    def offered(self, device: str) -> frozenset[str]:
        """Digests of what a device's own offer names; may be asked from any thread."""
        task = self._state.tasks.get(device)
        offer: Mapping[str, Any] = (task.offer if task else None) or {}
        named = [*offer.values(), *offer.get("lowered", {}).values(), *offer.get("blocked", {}).values()]
        named += offer.get("slabs", [])
        return frozenset(v["sha256"] for v in named if isinstance(v, dict) and "sha256" in v)


def _advice(error: ProfileError) -> str:
    """Why a profile can't be used, with what to do about it on this side of the wire."""
    if not error.what.startswith("there is no hardware profile"):
        return one_line(str(error))
    return one_line(
        f"{error.what}. Give the server the board's profile file, too: --profiles FOLDER (docs/add-a-board.md)"
    )


def _plain_name(profile: str) -> str:
    """The name of a profile; a device's word must not become a path on this machine.

    Raises:
        ProfileError: It is none.
    """
    if not NAME.fullmatch(profile):
        raise ProfileError(
            "name of a device's hardware profile",
            expected="up to 64 lower-case letters, digits, dots and dashes",
            got=repr(profile)[:80],
        )
    return profile
