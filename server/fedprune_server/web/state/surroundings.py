"""Members and rollouts for the console, read from their databases on a thread when they have changed.

Another process may be writing to these databases, and the disk may be slow: the server's loop waits for neither.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedprune.core.errors import FedpruneError, StorageError, reason
from fedprune.core.text import one_line
from fedprune.releases.release import Release
from fedprune.releases.rollout import Fate
from fedprune.security.keys import VerifyingKey
from fedprune.wire.fleet_messages import ReleaseOffer
from fedprune_server.enrollment.store import APPROVED, WAITING, IdentityStore
from fedprune_server.ota.store import RolloutEntry, RolloutStore

SWEEP_S = 2.0
"""Pause between two looks."""

MOST_ROLLOUTS = 20
"""Rollouts that the console lists."""

_END_S = 35.0
"""How long the end waits for a look under way: each of its three steps may wait 10 s for another writer."""

_FAILURES = 50
_EARLIER_FAILURES = 3
"""Failed boards that are listed of the latest rollout, and of each earlier one."""


class Member(NamedTuple):
    """A device's membership.

    Attributes:
        status: `member`, `waiting` or `revoked`.
        key: Fingerprint of a key that waits for approval.
    """

    status: str
    key: str | None = None


class Members:
    """Memberships of all devices, read through a connection of their own."""

    def __init__(self, store: IdentityStore) -> None:
        self._store = store
        self._version: str | None = None
        self._known: Mapping[str, Member] = {}

    @property
    def names(self) -> set[str]:
        return set(self._known)

    def status(self, device: str) -> Member | None:
        return self._known.get(device)

    def look(self) -> set[str]:
        """Devices whose membership has changed since the last call."""
        version = self._store.version()
        before = self._known
        if version != self._version:
            self._version, self._known = version, self._read()
        changed = set()
        if before is not self._known:
            changed = {n for n in before.keys() | self._known.keys() if before.get(n) != self._known.get(n)}
        return changed

    def _read(self) -> dict[str, Member]:
        found: dict[str, Member] = {}
        rank = {"revoked": 0, "waiting": 1, "member": 2}
        for device in self._store.devices():
            status = {APPROVED: "member", WAITING: "waiting"}.get(device.status, "revoked")
            key = VerifyingKey.from_hex(device.key).fingerprint if status == "waiting" else None
            before = found.get(device.device, Member("revoked"))
            best = status if rank[status] >= rank[before.status] else before.status
            found[device.device] = Member(best, key or before.key)
        return found


class ReleaseWatch:
    """The latest rollouts and each board's report about the last one, read through a connection of their own."""

    def __init__(self, store: RolloutStore) -> None:
        self._store = store
        self._version: int | None = None
        self._names: dict[int, str] = {}
        self._standing: dict[str, dict[str, Any]] = {}
        self._moved: set[str] = set()

    def standing(self, device: str) -> dict[str, Any] | None:
        """A board's last report about the latest rollout's release."""
        return self._standing.get(device)

    def moved(self) -> set[str]:
        """Boards whose report has changed since the last call."""
        moved, self._moved = self._moved, set()
        return moved

    def look(self) -> tuple[dict[str, Any], ...] | None:
        """The latest rollouts, newest first; None if nothing has changed."""
        version = self._store.version()
        if version == self._version:
            return None
        entries = self._store.entries()[: -MOST_ROLLOUTS - 1 : -1]
        entry = entries[0] if entries else None
        rows = tuple(
            _row(e, self._before(e.prior), failures=_FAILURES if e is entry else _EARLIER_FAILURES) for e in entries
        )
        before, self._standing = self._standing, {} if entry is None else _reports(entry)
        self._moved |= {n for n in before.keys() | self._standing.keys() if before.get(n) != self._standing.get(n)}
        self._version = version  # only now: a failed read is repeated
        return rows

    def _before(self, number: int | None) -> str | None:
        """The release of an earlier rollout, which never changes."""
        if number is not None and number not in self._names:
            offer = self._store.offer(number)
            if offer is not None:
                self._names[number] = _named(offer)
        return None if number is None else self._names.get(number)


@dataclass(frozen=True)
class Seen:
    """Devices that have changed, the latest rollouts (None if unchanged), and releases that can be rolled out."""

    changed: frozenset[str]
    rollouts: tuple[dict[str, Any], ...] | None
    releases: tuple[str, ...]


class SurroundingsPoller:
    """Looks at members and rollouts: on a thread once it is started, until then when it is asked.

    Args:
        members: Memberships; None where every device may join.
        releases: Rollouts; None where the server gives boards no releases.
        names: Names of releases that can be rolled out.
    """

    def __init__(
        self,
        members: Members | None = None,
        releases: ReleaseWatch | None = None,
        names: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self._members, self._releases, self._names = members, releases, names
        self._changed: set[str] = set()
        self._rollouts: tuple[dict[str, Any], ...] | None = None
        self._found: queue.Queue[Seen | FedpruneError] = queue.Queue(1)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def names(self) -> set[str]:
        return set() if self._members is None else self._members.names

    @property
    def has_releases(self) -> bool:
        return self._releases is not None

    def member(self, device: str) -> Member | None:
        return Member("member") if self._members is None else self._members.status(device)

    def update(self, device: str) -> dict[str, Any] | None:
        return None if self._releases is None else self._releases.standing(device)

    def start(self) -> None:
        """Look every few seconds from now on, on a thread."""
        self._thread = threading.Thread(target=self._run, name="fedprune-surroundings", daemon=True)
        self._thread.start()

    def seen(self) -> Seen | None:
        """Result of the latest look; None where there was none since the last call."""
        if self._thread is None:
            return self.look()
        try:
            found = self._found.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, FedpruneError):
            raise found
        return found

    def look(self) -> Seen:
        """Look, on this thread; if the disk fails, the next look reports the changes."""
        if self._members is not None and not self._over.is_set():
            self._changed |= self._members.look()
        names: tuple[str, ...] = ()
        if self._releases is not None and not self._over.is_set():  # else its database may be closed by now
            found = self._releases.look()
            self._rollouts = self._rollouts if found is None else found
            self._changed |= self._releases.moved()
            names = self._names()
        changed, self._changed = frozenset(self._changed), set()
        rollouts, self._rollouts = self._rollouts, None
        return Seen(changed, rollouts, names)

    def close(self) -> None:
        """End the thread; a look under way ends after the database that it is reading."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._over.is_set():
            found: Seen | FedpruneError
            try:
                found = self.look()
            except FedpruneError as error:
                found = error
            except Exception as error:  # noqa: BLE001 - it must not end the thread
                found = StorageError(f"members and rollouts: {type(error).__name__}: {reason(error)}")
            while not self._over.is_set():  # the next look waits until this result is taken
                try:
                    self._found.put(found, timeout=SWEEP_S)
                    break
                except queue.Full:
                    continue
            self._over.wait(SWEEP_S)


def _reports(entry: RolloutEntry) -> dict[str, dict[str, Any]]:
    found = {}
    for name, said in entry.reports.items():
        state, reason = one_line(str(said.get("state", "")), 64), one_line(str(said.get("reason", "")), 300)
        found[name] = {"number": entry.offer.number, "state": state, "reason": reason, "at": float(said.get("at", 0.0))}
    return found


def _named(offer: ReleaseOffer) -> str:
    """A release's number and version."""
    try:
        release = Release.from_bytes(offer.manifest.encode())
    except FedpruneError:
        return str(offer.number)
    return one_line(f"{release.number} ({release.version})", 190)


def _row(entry: RolloutEntry, before: str | None, *, failures: int) -> dict[str, Any]:
    rollout, counts = entry.rollout, Counter(b.fate for b in entry.rollout.boards.values())
    failed = list(rollout.failures().items())[:failures]
    return {
        "name": f"rollout {entry.number}",
        "number": entry.number,
        "release": _named(entry.offer),
        "stage": rollout.stage,
        "stages": len(rollout.plan.stages),
        "of": len(rollout.boards) - counts[Fate.GONE],
        "done": counts[Fate.WELL],
        "failed": counts[Fate.FAILED],
        "given": counts[Fate.GIVEN],
        "waiting": counts[Fate.WAITING],
        "state": entry.state,
        "why": one_line(rollout.why, 1500),
        "at": entry.at,
        "failures": {n: one_line(why, 300) for n, why in failed},
        "subject": entry.offer.number,
        "before": before,
        "leaves": entry.leaves,
    }
