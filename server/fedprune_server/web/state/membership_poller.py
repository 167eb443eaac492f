"""Reads members and rollouts for the console from their databases, on a thread, when they have changed.

Another process may be writing to these databases, and the disk may be slow: the server's loop waits for neither.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedprune.core.errors import FedpruneError, StorageError, error_reason
from fedprune.core.text import one_line
from fedprune.releases.release import Release
from fedprune.releases.rollout import Fate
from fedprune.security.keys import VerifyingKey
from fedprune.wire.fleet_messages import ReleaseOffer
from fedprune_server.enrollment.store import APPROVED, WAITING, IdentityStore
from fedprune_server.ota.store import RolloutEntry, RolloutStore

# Pause between two polls, each of which reads one number unless something has changed.
POLL_INTERVAL_S = 2.0

# Rollouts that the console lists; a row of one can hold the reasons of 50 boards.
MAX_ROLLOUTS = 20

# How long `close` waits for a poll under way: each of its three steps may wait 10 s for another writer.
_END_TIMEOUT_S = 35.0

_MAX_FAILURES = 50
# Failed boards that are listed of the latest rollout, and of each earlier one.
_MAX_EARLIER_FAILURES = 3


class Member(NamedTuple):
    """A device's membership.

    Attributes:
        status: `member`, `waiting` or `revoked`.
        key: Fingerprint of a key that waits for approval.
    """

    status: str
    key: str | None = None


@dataclass(frozen=True)
class PollResult:
    """Devices that have changed, the latest rollouts (None if unchanged), and releases that can be rolled out."""

    changed_devices: frozenset[str]
    rollouts: tuple[dict[str, Any], ...] | None
    releases: tuple[str, ...]


class MembershipPoller:
    """Reads members and rollouts when they have changed: on a thread once it is started, until then when it is asked.

    Args:
        members: Memberships, through a connection of its own; None where every device may join.
        rollouts: Rollouts, through a connection of its own; None where the server gives boards no releases.
        release_names: Returns the names of releases that can be rolled out.
    """

    def __init__(
        self,
        members: IdentityStore | None = None,
        rollouts: RolloutStore | None = None,
        release_names: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self._members, self._rollouts, self._release_names = members, rollouts, release_names
        self._versions: tuple[str | None, int | None] = (None, None)
        self._memberships: Mapping[str, Member] = {}
        self._reports: Mapping[str, dict[str, Any]] = {}  # about the latest rollout's release, by board
        self._earlier_releases: dict[int, str] = {}  # releases of earlier rollouts, which never change
        self._result_lock = threading.Lock()  # for what follows
        self._changed_devices: set[str] = set()
        self._rows: tuple[dict[str, Any], ...] | None = None
        self._releases: tuple[str, ...] = ()
        self._has_polled = False
        self._error: FedpruneError | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def member_names(self) -> set[str]:
        return set(self._memberships)

    @property
    def has_releases(self) -> bool:
        return self._rollouts is not None

    def member(self, device: str) -> Member | None:
        return Member("member") if self._members is None else self._memberships.get(device)

    def release_report(self, device: str) -> dict[str, Any] | None:
        """A board's last report about the latest rollout's release."""
        return self._reports.get(device)

    def start(self) -> None:
        """Poll every few seconds from now on, on a thread."""
        self._thread = threading.Thread(target=self._run, name="fedprune-members", daemon=True)
        self._thread.start()

    def latest(self) -> PollResult | None:
        """The changes that polls have found since the last call; None if there was no poll.

        Raises the error of a poll that failed; the changes that others found are kept for the next call.
        """
        if self._thread is None:
            self._poll()
        with self._result_lock:
            error, self._error = self._error, None
            if error is not None:
                raise error
            if not self._has_polled:
                return None
            result = PollResult(frozenset(self._changed_devices), self._rows, self._releases)
            self._changed_devices, self._rows, self._has_polled = set(), None, False
            return result

    def close(self) -> None:
        """End the thread; a poll under way ends after the database that it is reading."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_END_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._poll()
            self._stopping.wait(POLL_INTERVAL_S)

    def _poll(self) -> None:
        try:
            self._poll_members()
            if not self._stopping.is_set():  # otherwise its database may be closed by now
                self._poll_rollouts()
            with self._result_lock:
                self._has_polled = True
        except FedpruneError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - it must not end the thread
            self._error = StorageError(f"members and rollouts: {type(error).__name__}: {error_reason(error)}")

    def _poll_members(self) -> None:
        if self._members is None or (version := self._members.version()) == self._versions[0]:
            return
        former, self._memberships = self._memberships, _memberships(self._members)
        self._versions = version, self._versions[1]
        with self._result_lock:  # `latest` takes the changes on another thread
            self._changed_devices |= _differences(former, self._memberships)

    def _poll_rollouts(self) -> None:
        if self._rollouts is None:
            return
        version = self._rollouts.change_count()
        if version != self._versions[1]:
            entries = self._rollouts.entries()[: -MAX_ROLLOUTS - 1 : -1]
            limits = [_MAX_FAILURES] + [_MAX_EARLIER_FAILURES] * len(entries)
            befores = [self._release_before(e.earlier_rollout) for e in entries]
            rows = tuple(_rollout_row(e, b, failures=n) for e, b, n in zip(entries, befores, limits, strict=False))
            former, self._reports = self._reports, _reports(entries[0]) if entries else {}
            self._versions = self._versions[0], version  # only now: a failed read is repeated
            with self._result_lock:
                self._rows = rows
                self._changed_devices |= _differences(former, self._reports)
        self._releases = self._release_names()

    def _release_before(self, number: int | None) -> str | None:
        """The release of an earlier rollout."""
        if number is None or self._rollouts is None:
            return None
        if number not in self._earlier_releases and (offer := self._rollouts.offer_of(number)) is not None:
            self._earlier_releases[number] = _release_name(offer)
        return self._earlier_releases.get(number)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def _memberships(store: IdentityStore) -> dict[str, Member]:
    """Each device's best status, of all keys that asked in its name."""
    members: dict[str, Member] = {}
    rank = {"revoked": 0, "waiting": 1, "member": 2}
    for device in store.devices():
        status = {APPROVED: "member", WAITING: "waiting"}.get(device.status, "revoked")
        key = VerifyingKey.from_hex(device.key).fingerprint if status == "waiting" else None
        best_so_far = members.get(device.device, Member("revoked"))
        better = status if rank[status] >= rank[best_so_far.status] else best_so_far.status
        members[device.device] = Member(better, key or best_so_far.key)
    return members


def _reports(entry: RolloutEntry) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "number": entry.offer.number,
            "state": one_line(str(report.get("state", "")), 64),
            "reason": one_line(str(report.get("reason", "")), 300),
            "at": float(report.get("at", 0.0)),
        }
        for name, report in entry.reports.items()
    }


def _release_name(offer: ReleaseOffer) -> str:
    """A release's number and version."""
    try:
        release = Release.from_bytes(offer.manifest.encode())
    except FedpruneError:
        return str(offer.number)
    return one_line(f"{release.number} ({release.version})", 190)


def _rollout_row(entry: RolloutEntry, earlier_release: str | None, *, failures: int) -> dict[str, Any]:
    rollout, counts = entry.rollout, Counter(b.fate for b in entry.rollout.boards.values())
    failed = list(rollout.failures().items())[:failures]
    return {
        "name": f"rollout {entry.number}",
        "number": entry.number,
        "release": _release_name(entry.offer),
        "stage": rollout.stage,
        "stages": len(rollout.plan.stages),
        "of": len(rollout.boards) - counts[Fate.GONE],
        "done": counts[Fate.WELL],
        "failed": counts[Fate.FAILED],
        "given": counts[Fate.GIVEN],
        "waiting": counts[Fate.WAITING],
        "state": entry.state,
        "why": one_line(rollout.why, 1500),
        "at": entry.started_at,
        "failures": {n: one_line(why, 300) for n, why in failed},
        "subject": entry.offer.number,
        "before": earlier_release,
        "leaves": entry.left_release,
    }
