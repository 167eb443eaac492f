"""The coordinator of rollouts: boards' reports and the clock come in, offers of a release go out.

`fedprune.releases.rollout` decides what to do next. Here each decision is saved before it is carried out, offers are
repeated to silent boards, and each state of a board gets a deadline.

A rollout's time is that of the monotonic clock, and stands still without a connection, because no board could report.
Once the connection is back, boards that were given the release get their full time again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from fedprune.core.errors import ReleaseError
from fedprune.core.text import one_line, quantity
from fedprune.releases.rollout import Fate, Give, Rollout, RolloutCommand, RolloutPhase, TickAt, Withdraw
from fedprune.wire.fleet_messages import (
    COMMITTED,
    DOWNLOADING,
    REFUSED,
    ROLLED_BACK,
    STAGED,
    TRIAL,
    ReleaseReport,
    ReleaseWithdrawn,
)
from fedprune.wire.messages import FromServer
from fedprune_server.ota.store import RolloutEntry, RolloutStore

log = logging.getLogger("fedprune.server")

# How often the database is asked for rollouts that were started, paused or stopped: an operator doesn't notice a
# second, and the loop turns many times in one.
_POLL_INTERVAL_S = 1.0

# A board that is silent for this long is offered the release again: a PUBACK is the broker's, not the board's. A board
# answers an offer that it has already with its state.
_OFFER_INTERVAL_S = 60.0

# Added to each attempt of a trial, for the restart of the service: the board's launcher counts from its own start.
_RESTART_ALLOWANCE_S = 60.0


class RolloutCoordinator:
    """Runs the rollout that is under way. Every method raises `StorageError` if the disk fails or is full.

    `members` returns the boards of the fleet; None takes every board for a member. Deadlines count on the monotonic
    clock; the other one, in seconds since 1970, is only for the record."""

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
        self._own_releases: set[int] = set()
        self._last_requests: list[tuple[Any, ...]] | None = None
        self._next_poll_at = 0.0
        self._wake_at = math.inf
        self._started_at = 0.0
        self._is_connected = False
        self._last_contact_at: dict[str, float] = {}
        self._unsaved_reports: set[str] = set()  # boards whose last reports are not saved yet
        self._logged_failures: dict[str, ReleaseReport] = {}  # the last that was logged of each board

    def on_connection_change(self, up: bool) -> None:
        """Note that the connection is up or lost. Nothing is sent before it is up."""
        self._is_connected = up
        if up and self._entry is not None:  # boards that have the release get their full time again
            self._take_step(self._entry, lambda r, now: r.restore_deadlines(now))
        self.tick()

    def downloadable_files(self, device: str) -> frozenset[str]:
        """Digests that a device may download: the release's files, while it is given that release."""
        return self._files if self._fate_of(device) is Fate.GIVEN else frozenset()

    def on_birth(self, device: str) -> None:
        """Offer the release again to a board that has connected, perhaps after a restart."""
        entry = self._entry
        if entry is None or (self._members is not None and device not in self._members()):
            return
        if entry.includes_newcomers and self._fate_of(device) in (None, Fate.GONE):
            self._take_step(entry, lambda r, now: r.add_board(device, now))
        elif self._fate_of(device) is Fate.GIVEN:
            self._send_offer(entry, device)

    def drop_boards(self, devices: Iterable[str]) -> None:
        """Take boards that are no longer members out of the rollout, unless they have ended it."""
        entry = self._entry
        departed = sorted(n for n in devices if self._fate_of(n) in (Fate.WAITING, Fate.GIVEN))
        if entry is not None and departed:
            log.info(
                "rollout %d continues without %s, which are no members any more", entry.number, ", ".join(departed)
            )
            self._take_step(entry, lambda r, now: r.remove_boards(departed, now))

    def on_report(self, report: ReleaseReport) -> None:
        """Take in a board's report on a release."""
        device, entry = report.device, self._entry
        reason = one_line(report.reason)
        if report.state in (ROLLED_BACK, REFUSED) and self._logged_failures.get(device) != report:
            self._logged_failures[device] = report  # it is repeated at every birth
            log.warning("device %s: release %d is %s: %s", device, report.number, report.state, reason)
        if entry is not None and report.number == entry.left_release and report.state in (TRIAL, COMMITTED):
            # The board installed the release that is being rolled back, after the rollback began or after it was
            # counted as failed: it must be rolled back, too.
            if self._members is None or device in self._members():
                self._take_step(entry, lambda r, now: r.add_board(device, now))
            return
        if entry is None or report.number != entry.offer.number or device not in entry.rollout.boards:
            self._withdraw_if_ours(report)
            return
        if report.manifest not in (None, hashlib.sha256(entry.offer.manifest.encode()).hexdigest()):
            return  # of another release with this number; the board refuses the offer of this one
        last_report = entry.reports.get(device, {})
        report_row = {"state": report.state, "reason": reason, "done": report.done, "total": report.total}
        has_progress = any(last_report.get(k) != report_row[k] for k in ("state", "done"))
        entry.reports[device] = {**report_row, "at": self._clock()}
        self._unsaved_reports.add(device)
        self._last_contact_at[device] = self._monotonic()
        if report.state == COMMITTED:
            self._take_step(entry, lambda r, now: r.report_success(device, now))
        elif report.state in (ROLLED_BACK, REFUSED):
            self._take_step(entry, lambda r, now: r.report_failure(device, f"{report.state}: {reason}", now))
        elif self._fate_of(device) is not Fate.GIVEN:
            self._withdraw_if_ours(report)
        elif has_progress:
            # On trial a board is silent until the new release has reached the broker, or every attempt has failed.
            trial_s = entry.offer.attempts * (entry.offer.seconds + _RESTART_ALLOWANCE_S)
            seconds = entry.rollout.plan.board_seconds + (trial_s if report.state == TRIAL else 0.0)
            is_new_state = last_report.get("state") != report.state  # progress of a download need not survive a crash
            self._take_step(entry, lambda r, now: r.report_progress(device, now, seconds), keep=is_new_state)

    def tick(self) -> None:
        """Take in changed rollouts and the time that has passed while the connection was up."""
        if not self._is_connected:
            return
        now = self._monotonic()
        if self._last_requests is None or now >= self._next_poll_at:
            self._next_poll_at = now + _POLL_INTERVAL_S
            orders = self._store.requests()
            if orders != self._last_requests:
                self._last_requests = orders
                # Take in what the command line has written. The last rollout replaces the others.
                for latest in self._store.entries_under_way():
                    is_new = self._entry is None or self._entry.number != latest.number
                    if not is_new or self._start_rollout(latest):
                        self._apply_request(latest, fresh=is_new)
            # What looks at every board has its time once a second: the loop turns far more often.
            if self._entry is not None and self._members is not None:
                members = self._members()
                self.drop_boards([board for board in self._entry.rollout.boards if board not in members])
            if self._entry is not None:
                for device in self._entry.rollout.busy_boards:
                    if now >= self._last_contact_at.get(device, 0.0) + _OFFER_INTERVAL_S:
                        self._send_offer(self._entry, device)
        if self._entry is not None and self._now() >= self._wake_at:
            self._take_step(self._entry, lambda r, at: r.tick(at))

    def _start_rollout(self, entry: RolloutEntry) -> bool:
        """Start to run a rollout; False if it can't go on."""
        try:
            release = entry.release
        except ReleaseError as error:  # written by another version
            log.error("rollout %d can't go on: %s", entry.number, error)
            return False
        # One that is to stop needs no files, and must be able to end.
        if entry.stop_reason is None and not all(self._store.blobs.has(f.sha256) for f in release.files):
            log.error(
                "rollout %d can't go on, because files of its release are missing here. Copy `releases/` from the "
                "machine where it was begun and start the server again; or stop it: fedprune-server rollout stop",
                entry.number,
            )
            return False
        self._entry, self._last_contact_at, self._wake_at = entry, {}, math.inf
        self._unsaved_reports.clear()
        # The monotonic clock begins at 0 with each boot; the rollout's time was stored.
        self._started_at = self._monotonic() - entry.rollout.now
        self._files = frozenset(f.sha256 for f in release.files)
        self._own_releases = self._store.release_numbers()
        boards = quantity(len(entry.rollout.boards), "board")
        log.info("rollout %d: release %d (%s) to %s", entry.number, release.number, release.version, boards)
        return True

    def _apply_request(self, stored: RolloutEntry, *, fresh: bool) -> None:
        """Bring the rollout into the state that the database asks for, whichever requests led to it."""
        entry = self._entry
        if entry is None:
            return
        phase = entry.rollout.phase
        if stored.stop_reason is not None:
            reason = one_line(stored.stop_reason)
            self._take_step(entry, lambda r, _: r.stop(reason))
        elif stored.pause_reason is not None and phase is RolloutPhase.RUNNING:
            reason = one_line(stored.pause_reason)
            self._take_step(entry, lambda r, now: r.pause(reason, now))
        elif stored.pause_reason is None and phase is RolloutPhase.PAUSED:
            self._take_step(entry, lambda r, now: r.resume(now))
        if fresh and self._entry is entry:
            self._take_step(entry, lambda r, now: r.restore_deadlines(now))

    def _take_step(
        self, entry: RolloutEntry, step: Callable[[Rollout, float], list[RolloutCommand]], *, keep: bool = True
    ) -> None:
        """Let the rollout take a step, and save it before any message of it is sent."""
        rollout = entry.rollout
        stage, phase = rollout.stage, rollout.phase
        commands = step(rollout, self._now())
        wakes = [c.at for c in commands if isinstance(c, TickAt)]
        self._wake_at = min(wakes, default=self._wake_at)
        # Failures are saved in the step in which they happen: `rollout.changed_boards` then has none of an earlier
        # step, and no board is told twice that its release is withdrawn.
        failed_boards = {name for name in rollout.changed_boards if rollout.boards[name].fate is Fate.FAILED}
        if keep or failed_boards or any(not isinstance(c, TickAt) for c in commands):
            self._store.save(entry.number, rollout, entry.reports, self._unsaved_reports)
            self._unsaved_reports.clear()
        self._carry_out(entry, commands, failed_boards)
        if rollout.stage != stage and rollout.phase is RolloutPhase.RUNNING:
            log.info("rollout %d: stage %d of %d", entry.number, rollout.stage + 1, rollout.stage_count)
        if rollout.phase is not phase:
            suffix = f": {rollout.why}" if rollout.why else ""
            log.info("rollout %d of release %d: %s%s", entry.number, entry.offer.number, rollout.phase.value, suffix)
        if not rollout.phase.is_under_way:
            self._entry, self._files = None, frozenset()

    def _carry_out(self, entry: RolloutEntry, commands: Iterable[RolloutCommand], failed_boards: Iterable[str]) -> None:
        number, rollout = entry.offer.number, entry.rollout
        for command in commands:
            if isinstance(command, Give):
                self._send_offer(entry, command.board)
            elif isinstance(command, Withdraw):
                self._send(command.board, ReleaseWithdrawn(number, one_line(rollout.why)))
        for device in sorted(failed_boards):
            if entry.reports.get(device, {}).get("state") not in (ROLLED_BACK, REFUSED):
                log.warning("device %s: release %d: %s", device, number, rollout.boards[device].reason)
                self._send(device, ReleaseWithdrawn(number, one_line(rollout.boards[device].reason)))

    def _send_offer(self, entry: RolloutEntry, device: str) -> None:
        self._last_contact_at[device] = self._monotonic()
        self._send(device, entry.offer)

    def _withdraw_if_ours(self, report: ReleaseReport) -> None:
        """Withdraw a superseded release. A release that was installed from a USB stick has a number that was never
        rolled out, and is left alone."""
        own_numbers = self._own_releases or self._store.release_numbers()
        if report.state in (DOWNLOADING, STAGED) and report.number in own_numbers:
            self._send(report.device, ReleaseWithdrawn(report.number, "its rollout is over"))

    def _fate_of(self, device: str) -> Fate | None:
        board = None if self._entry is None else self._entry.rollout.boards.get(device)
        return None if board is None else board.fate

    def _now(self) -> float:
        """The rollout's time, which continues from where the last process left it."""
        return self._monotonic() - self._started_at
