"""What a feed looks up beside jobs: who is let in, and what becomes of a release. It is read when it has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedprune.core.errors import FedpruneError
from fedprune.core.text import one_line
from fedprune.releases.release import Release
from fedprune.releases.rollout import Fate, RolloutPhase
from fedprune.security.keys import VerifyingKey
from fedprune.wire.release_messages import ReleaseOffer
from fedprune_server.enrollment.store import APPROVED, WAITING, Device, IdentityStore
from fedprune_server.ota.store import RolloutEntry, RolloutStore

MOST_ROLLOUTS = 20
"""Rollouts that the console lists."""

_FAILURES = 50
_EARLIER_FAILURES = 3
"""Boards that failed in the latest rollout, and in each of the earlier ones, that are named."""


class Member(NamedTuple):
    """What the identity knows of a device.

    Attributes:
        status: `member`, `waiting` or `revoked`.
        key: Fingerprint of a key that waits.
        behind: What of the server it knew an earlier one of when it connected last, in words.
    """

    status: str
    key: str | None = None
    behind: str | None = None


class Members:
    """Who is let in, who waits, and who was shut out.

    Args:
        store: The identity's database, open for this alone.
        behind: What of the server a device knew an earlier one of when it connected last.
    """

    def __init__(self, store: IdentityStore, behind: Callable[[Device], Sequence[str]] = lambda _device: ()) -> None:
        self._store, self._behind = store, behind
        self._version: int | None = None
        self._known: Mapping[str, Member] = {}

    @property
    def names(self) -> set[str]:
        """All who asked, ever."""
        return set(self._known)

    def status(self, device: str) -> Member | None:
        """A device; None for one that never asked."""
        return self._known.get(device)

    def look(self) -> set[str]:
        """See whether somebody asked, was let in or shut out.

        Returns:
            Whose status is another than at the last call.

        Raises:
            StorageError: The disk fails.
        """
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
            behind = " and ".join(self._behind(device)) or before.behind
            found[device.device] = Member(best, key or before.key, behind)
        return found


class ReleaseWatch:
    """The latest rollouts, and where the last one's release stands on each board.

    Args:
        store: The rollouts' database, open for this alone.
    """

    def __init__(self, store: RolloutStore) -> None:
        self._store = store
        self._version: int | None = None
        self._names: dict[int, str] = {}
        self._standing: dict[str, dict[str, Any]] = {}
        self._moved: set[str] = set()

    def standing(self, device: str) -> dict[str, Any] | None:
        """A board's progress with the latest rollout's release (`row_types.Installation`), by its last report."""
        return self._standing.get(device)

    def moved(self) -> set[str]:
        """Boards of which something else is true than at the last call."""
        moved, self._moved = self._moved, set()
        return moved

    def look(self) -> tuple[dict[str, Any], ...] | None:
        """Rows of `publisher_messages.ROLLOUT`; None where nothing has changed.

        Raises:
            StorageError: The disk fails.
        """
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
        self._version = version  # once it is read: what fails is looked at again
        return rows

    def _before(self, number: int | None) -> str | None:
        """The release of an earlier rollout, which never changes."""
        if number is not None and number not in self._names:
            offer = self._store.offer(number)
            if offer is not None:
                self._names[number] = _named(offer)
        return None if number is None else self._names.get(number)


def _reports(entry: RolloutEntry) -> dict[str, dict[str, Any]]:
    found = {}
    for name, said in entry.reports.items():
        state, reason = one_line(str(said.get("state", "")), 64), one_line(str(said.get("reason", "")), 300)
        found[name] = {"number": entry.offer.number, "state": state, "reason": reason, "at": float(said.get("at", 0.0))}
    return found


def _named(offer: ReleaseOffer) -> str:
    """A release as people call it."""
    try:
        release = Release.from_bytes(offer.manifest.encode())
    except FedpruneError:
        return str(offer.number)
    return one_line(f"{release.number} ({release.version})", 190)


def _state(entry: RolloutEntry) -> str:
    """Where it stands, or what the server was told and hasn't done yet."""
    phase = entry.rollout.phase
    if not phase.under_way:
        return phase.value
    if entry.wish is not None:
        return "stopping"
    if (entry.hold is not None) == (phase is RolloutPhase.PAUSED):
        return phase.value
    return "pausing" if entry.hold is not None else "resuming"


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
        "state": _state(entry),
        "why": one_line(rollout.why, 1500),
        "at": entry.at,
        "failures": {n: one_line(why, 300) for n, why in failed},
        "subject": entry.offer.number,
        "before": before,
        "leaves": entry.leaves,
    }
