"""The desk that runs rollouts: what boards report and the clock go in, offers of a release go out.

What to do next `fedprune.releases.rollout` decides. Here it is kept on the disk before it is done, said again to
boards that are silent, and every state of a board gets its deadline: to be heard of, to get on with the download, to
find a quiet moment, and to end the trial.

A rollout's seconds are those of a clock that nobody sets. Without a connection no time passes for it, because no board
could say anything, and when the connection is back those that were at it get their time anew.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable

from fedprune.core.errors import ReleaseError
from fedprune.core.text import one_line
from fedprune.releases.release import Release
from fedprune.releases.rollout import Fate, Give, Rollout, RolloutCommand, RolloutPhase, Wake, Withdraw
from fedprune.wire.messages import FromServer
from fedprune.wire.release_messages import (
    COMMITTED,
    DOWNLOADING,
    REFUSED,
    ROLLED_BACK,
    STAGED,
    TRIAL,
    ReleaseOffer,
    ReleaseReport,
    ReleaseWithdrawn,
)
from fedprune_server.ota.store import RolloutEntry, RolloutStore

log = logging.getLogger("fedprune.server")

_LOOK_S = 1.0
"""At most so often it is looked whether somebody began, paused or stopped a rollout."""

_AGAIN_S = 60.0
"""A board that is silent for so long is offered the release again: a broker's acknowledgement is no board's."""

_START_S = 60.0
"""What an attempt of a trial may take beyond its own limit: the service's restart, and the start."""


class RolloutCoordinator:
    """Runs the rollout that is under way.

    Args:
        store: Where rollouts are kept.
        send: Sends a message to a board.
        members: Who is in the fleet; without it everybody always is.
        clock: Seconds since 1970, for the record alone.
        monotonic: Seconds of a clock that nobody sets, for deadlines.
    """

    def __init__(
        self,
        store: RolloutStore,
        send: Callable[[str, FromServer], None],
        members: Callable[[], Collection[str]] | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._send = send
        self._members = members
        self._clock, self._monotonic = clock, monotonic
        self._entry: RolloutEntry | None = None
        self._files: frozenset[str] = frozenset()
        self._offered: set[int] = set()
        self._version: int | None = None
        self._look_at = 0.0
        self._wake_at = math.inf
        self._zero = 0.0
        self._connected = False
        self._said: dict[str, float] = {}
        self._bad: dict[str, ReleaseReport] = {}

    def connected(self, up: bool) -> None:
        """The connection is up, or is lost; before it is up nothing is done.

        Raises:
            StorageError: The disk fails or is full.
        """
        self._connected = up
        if up and self._entry is not None:
            self._do(self._entry, lambda r, now: r.resumed(now))
        self.tick()

    def files(self, device: str) -> frozenset[str]:
        """Digests of what a device may pull: a release's files, while it is given that release."""
        return self._files if self._fate(device) is Fate.GIVEN else frozenset()

    def born(self, device: str) -> None:
        """A board is there, perhaps after a restart: it hears again what it is to do.

        Raises:
            StorageError: The disk fails or is full.
        """
        entry = self._entry
        if entry is None or (self._members is not None and device not in self._members()):
            return
        if entry.joins and self._fate(device) in (None, Fate.GONE):
            self._do(entry, lambda r, now: r.join(device, now))
        elif self._fate(device) is Fate.GIVEN:
            self._offer(entry, device)

    def without(self, devices: Iterable[str]) -> None:
        """Boards are no members any more: those that had not ended leave the rollout. Said twice, it changes nothing.

        Raises:
            StorageError: The disk fails or is full.
        """
        entry = self._entry
        gone = sorted(n for n in devices if self._fate(n) in (Fate.WAITING, Fate.GIVEN))
        if entry is not None and gone:
            log.info("rollout %d goes on without %s, which are no members any more", entry.number, ", ".join(gone))
            self._do(entry, lambda r, now: r.without(gone, now))

    def reported(self, report: ReleaseReport) -> None:
        """A board says where a release stands.

        Raises:
            StorageError: The disk fails or is full.
        """
        device, entry = report.device, self._entry
        reason = one_line(report.reason)
        if report.state in (ROLLED_BACK, REFUSED) and self._bad.get(device) != report:
            self._bad[device] = report  # it is said again at every birth
            log.warning("device %s: release %d is %s: %s", device, report.number, report.state, reason)
        if entry is not None and report.number == entry.leaves and report.state in (TRIAL, COMMITTED):
            # It was given what is left after it was ordered to leave that, or was taken for one that had failed.
            if self._members is None or device in self._members():
                self._do(entry, lambda r, now: r.join(device, now))
            return
        if entry is None or report.number != entry.offer.number or device not in entry.rollout.boards:
            self._withdraw_if_ours(report)
            return
        before = entry.reports.get(device, {})
        told = {"state": report.state, "reason": reason, "done": report.done, "total": report.total}
        moved = any(before.get(k) != told[k] for k in ("state", "done"))
        entry.reports[device] = {**told, "at": self._clock()}
        self._said[device] = self._monotonic()
        if report.state == COMMITTED:
            self._do(entry, lambda r, now: r.well(device, now))
        elif report.state in (ROLLED_BACK, REFUSED):
            self._do(entry, lambda r, now: r.failed(device, f"{report.state}: {reason}", now))
        elif self._fate(device) is not Fate.GIVEN:
            self._withdraw_if_ours(report)
        elif moved:
            seconds = self._patience(entry, report.state)
            news = before.get("state") != report.state  # a download's progress alone need not survive
            self._do(entry, lambda r, now: r.heard(device, now, seconds), keep=news)

    def tick(self) -> None:
        """Time has passed; it doesn't count as long as the connection is lost.

        Raises:
            StorageError: The disk fails or is full.
        """
        if not self._connected:
            return
        now = self._monotonic()
        if self._version is None or now >= self._look_at:
            self._look_at = now + _LOOK_S
            version = self._store.version()
            if version != self._version:
                self._version = version
                self._look()
            if self._entry is not None and self._members is not None:
                self.without(set(self._entry.rollout.boards) - set(self._members()))
        entry = self._entry
        if entry is not None and self._now() >= self._wake_at:
            self._do(entry, lambda r, at: r.tick(at))
        if entry is not None:
            for device, board in entry.rollout.boards.items():
                if board.fate is Fate.GIVEN and now >= self._said.get(device, 0.0) + _AGAIN_S:
                    self._offer(entry, device)

    def _look(self) -> None:
        """Take in what the command line wrote. Of several the last one goes on: it takes the place of the others."""
        for latest in self._store.under_way():
            fresh = self._entry is None or self._entry.number != latest.number
            if not fresh or self._begin(latest):
                self._follow(latest, fresh=fresh)

    def _begin(self, entry: RolloutEntry) -> bool:
        """Take a rollout up; whether it can go on."""
        try:
            release = Release.from_bytes(entry.offer.manifest.encode())
        except ReleaseError as error:  # what was kept isn't what this version writes
            log.error("rollout %d can't go on: %s", entry.number, error)
            return False
        self._entry, self._said, self._wake_at = entry, {}, math.inf
        self._zero = self._monotonic() - entry.rollout.now
        self._files = frozenset(f.sha256 for f in release.files)
        self._offered = self._store.releases()
        boards = len(entry.rollout.boards)
        log.info("rollout %d: release %d (%s) to %d boards", entry.number, release.number, release.version, boards)
        return True

    def _follow(self, wanted: RolloutEntry, *, fresh: bool) -> None:
        """Do what somebody wants of the rollout: how it is, and not what was said when, so that nothing is missed."""
        entry = self._entry
        if entry is None:
            return
        phase = entry.rollout.phase
        if wanted.wish is not None:
            why = one_line(wanted.wish)
            self._do(entry, lambda r, _: r.stop(why))
        elif wanted.hold is not None and phase is RolloutPhase.RUNNING:
            why = one_line(wanted.hold)
            self._do(entry, lambda r, now: r.pause(why, now))
        elif wanted.hold is None and phase is RolloutPhase.PAUSED:
            self._do(entry, lambda r, now: r.go_on(now))
        if fresh and self._entry is entry:
            self._do(entry, lambda r, now: r.resumed(now))

    def _do(
        self, entry: RolloutEntry, step: Callable[[Rollout, float], list[RolloutCommand]], *, keep: bool = True
    ) -> None:
        """Let the rollout take a step; it is on the disk before anything of it is said."""
        rollout = entry.rollout
        stage, phase, failed = rollout.stage, rollout.phase, set(rollout.failures())
        commands = step(rollout, self._now())
        wakes = [c.at for c in commands if isinstance(c, Wake)]
        self._wake_at = min(wakes, default=self._wake_at)
        late = set(rollout.failures()) - failed
        if keep or late or any(not isinstance(c, Wake) for c in commands):
            self._store.save(entry.number, rollout, entry.reports)
        self._carry_out(entry, commands, late)
        if rollout.stage != stage and rollout.phase is RolloutPhase.RUNNING:
            log.info("rollout %d: stage %d of %d", entry.number, rollout.stage + 1, len(rollout.plan.stages))
        if rollout.phase is not phase:
            why = f": {rollout.why}" if rollout.why else ""
            log.info("rollout %d of release %d: %s%s", entry.number, entry.offer.number, rollout.phase.value, why)
        if not rollout.phase.under_way:
            self._entry, self._files = None, frozenset()

    def _carry_out(self, entry: RolloutEntry, commands: Iterable[RolloutCommand], late: Iterable[str]) -> None:
        number, rollout = entry.offer.number, entry.rollout
        for command in commands:
            if isinstance(command, Give):
                self._offer(entry, command.board)
            elif isinstance(command, Withdraw):
                self._send(command.board, ReleaseWithdrawn(number, one_line(rollout.why)))
        for device in sorted(late):
            if entry.reports.get(device, {}).get("state") not in (ROLLED_BACK, REFUSED):
                log.warning("device %s: release %d: %s", device, number, rollout.boards[device].reason)
                self._send(device, ReleaseWithdrawn(number, one_line(rollout.boards[device].reason)))

    def _offer(self, entry: RolloutEntry, device: str) -> None:
        self._said[device] = self._monotonic()
        self._send(device, entry.offer)

    def _withdraw_if_ours(self, report: ReleaseReport) -> None:
        """A board is at what nobody wants it to install any more; what came from a stick is not ours to stop."""
        if report.state in (DOWNLOADING, STAGED) and report.number in (self._offered or self._store.releases()):
            self._send(report.device, ReleaseWithdrawn(report.number, "its rollout is over"))

    def _fate(self, device: str) -> Fate | None:
        board = None if self._entry is None else self._entry.rollout.boards.get(device)
        return None if board is None else board.fate

    def _now(self) -> float:
        """The rollout's time: it goes on from where the last process left it."""
        return self._monotonic() - self._zero

    @staticmethod
    def _patience(entry: RolloutEntry, state: str) -> float:
        """Seconds after which a board in a state has failed unless something happens."""
        offer: ReleaseOffer = entry.offer
        trial = offer.attempts * (offer.seconds + _START_S) if state == TRIAL else 0.0
        return entry.rollout.plan.board_seconds + trial
