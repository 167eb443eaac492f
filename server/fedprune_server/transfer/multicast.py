"""Blobs that many devices pull, published once for all of them.

Devices say in their wants that they listen to the blob's shared topic. A leaf is then published when everybody who
pulls the blob has asked for it, or when a board has waited for it long enough; a board that asks for it meanwhile isn't
answered again. So a hundred devices cost one publication, slow ones hold up the others to a degree, and a broker holds
little for each. Who missed a leaf asks again, as for every leaf, and gets it with the others who missed it, or alone.

Nothing here must be right for a transfer to succeed: whatever gets lost is asked for again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedprune.blobs.blob_ref import DIGEST, LEAF
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.state import Progress
from fedprune.wire.chunk import MAX_PACKET, leaves_per_chunk
from fedprune.wire.messages import BlobNotFound, BlobRequest
from fedprune.wire.transfer import BlobSender

GATHER_S = 1.0
"""Seconds that a leaf waits for devices that haven't asked for it yet."""

ON_ITS_WAY_S = 4.0
"""Seconds after a publication in which who asks has asked too early: less than a device's patience."""

LIVE_S = 5.0
"""Seconds after its last want in which the others wait for a device."""

HOLD_S = 60.0
"""Seconds that the first devices of a round wait for the offers of the last ones."""

AGAIN_S = 0.5
"""Leaf tables and blobs of a leaf are published at most so often, and at once for boards that haven't listened yet:
they are small, and by them a device hears that shared topics reach it."""

_LOOK_S = 0.5


class Publication(NamedTuple):
    """A chunk for all who listen.

    Attributes:
        listeners: Devices that have asked for this blob.
    """

    sha256: str
    chunk: bytes
    listeners: Collection[str]


class Audience:
    """Who pulls what, as the offers of the present parts say.

    Args:
        state: The coordinator's state; read, never changed.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._look_at = 0.0
        self._named: dict[str, set[str]] = {}
        self._complete = True

    def of(self, sha256: str, now: float) -> Collection[str]:
        """Devices whose offers name a blob that may be shared."""
        self._look(now)
        return self._named.get(sha256, ())

    def several(self, sha256: str, device: str, now: float) -> bool:
        """Whether others than the device that asks for a blob have it in their offers, too.

        A device that asks has its offer: if it isn't known here, the last look was before that, and so is what it says
        of the others.
        """
        known = self.of(sha256, now)
        if len(known) < 2 and device not in known:
            self._look_at = now
            known = self.of(sha256, now)
        return len(known) > 1

    def complete(self, now: float) -> bool:
        """Whether no offer of the round is still to be made."""
        self._look(now)
        return self._complete

    def _look(self, now: float) -> None:
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        self._named, self._complete = {}, True
        for device, task in self._state.tasks.items():
            if task.progress is Progress.EXTRACTING:
                self._complete = False
            for digest in shareable(task.offer or {}):
                self._named.setdefault(digest, set()).add(device)


def shareable(offer: Mapping[str, Any]) -> set[str]:
    """Digests of an offer's blobs that other boards get, too: with slabs also its weights."""
    if "slabs" not in offer:
        return set()
    named = [offer[k] for k in ("training", "inference", "mask") if k in offer]
    named += [*offer["slabs"], *offer.get("lowered", {}).values()]
    return {ref["sha256"] for ref in named}


@dataclass(eq=False)
class _Share:
    """One part of one blob.

    Attributes:
        total: Leaves or pieces.
        at_once: Whether it is small.
        began: When it was first asked for.
        opened: When it was first seen that no board's offer is missing.
        waiting: Who waits for a leaf, and since when.
        sent: When a leaf was last published.
        fronts: Up to which leaf a device has asked, and when it last did.
        reached: Devices that listened as something was published.
    """

    total: int
    at_once: bool
    began: float
    opened: float | None = None
    waiting: dict[int, tuple[set[str], float]] = field(default_factory=dict)
    sent: dict[int, float] = field(default_factory=dict)
    fronts: dict[str, tuple[int, float]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)

    def newcomer(self, device: str) -> bool:
        """Whether something small is published for a device that asks, however lately it was."""
        return self.at_once and device not in self.reached

    def live(self, now: float) -> list[int]:
        """The fronts of devices that the others wait for."""
        return [front for front, at in self.fronts.values() if now - at < LIVE_S]


class Multicast:
    """The queue of blobs published to all. Does no network I/O.

    Args:
        audience: Who pulls what.
        max_packet: Bytes of an MQTT packet that the broker lets through.
    """

    def __init__(self, store: BlobStore, audience: Audience, max_packet: int = MAX_PACKET) -> None:
        self._store = store
        self._serve = BlobSender(store)
        self._audience = audience
        self._max_packet = max_packet
        self._shares: OrderedDict[tuple[str, str], _Share] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether a board waits for a blob."""
        return any(share.waiting for share in self._shares.values())

    def add(self, device: str, want: BlobRequest, now: float) -> list[BlobRequest]:
        """Take in a want.

        Returns:
            What the device is to be answered alone.
        """
        if not (want.shared and self._audience.several(want.sha256, device, now) and self._store.has(want.sha256)):
            return [want]
        share = self._share(want, now)
        end = min(want.first + want.count, share.total)
        front, _ = share.fronts.get(device, (0, now))
        share.fronts[device] = (max(front, end), now)
        alone: list[int] = []
        for leaf in range(want.first, end):
            sent = share.sent.get(leaf)
            if leaf in share.waiting:
                share.waiting[leaf][0].add(device)
            elif sent is None or share.newcomer(device) or (now - sent >= ON_ITS_WAY_S and len(share.live(now)) > 1):
                share.waiting[leaf] = ({device}, now)
            elif now - sent >= ON_ITS_WAY_S:
                alone.append(leaf)
        return _wants(want, alone)

    def drop(self, device: str) -> None:
        """Forget what a device wanted."""
        for share in self._shares.values():
            share.fronts.pop(device, None)
            share.reached.discard(device)
            for leaf, (devices, _) in list(share.waiting.items()):
                devices.discard(device)
                if not devices:
                    del share.waiting[leaf]

    def next(self, now: float) -> Publication | tuple[str, BlobRequest] | None:
        """The next chunk for all, or what one device is to be answered alone; None if nothing is due. Raises
        `StorageError` if the disk fails."""
        for key, share in list(self._shares.items()):
            due = self._due(key[0], share, now)
            if not due:
                continue
            self._shares.move_to_end(key)
            sha256, part = key
            first = due[0]
            lacking, _ = share.waiting[first]
            if first in share.sent and len(lacking) == 1 and not share.newcomer(next(iter(lacking))):
                del share.waiting[first]
                return next(iter(lacking)), BlobRequest(sha256, part, first, 1)
            run = _run(due, leaves_per_chunk(self._max_packet))
            for leaf in run:
                del share.waiting[leaf]
                share.sent[leaf] = now
            answer = self._serve.answer(BlobRequest(sha256, part, first, len(run)), self._max_packet)
            chunk = None if isinstance(answer, BlobNotFound) else next(iter(answer), None)
            if chunk is not None:
                share.reached.update(share.fronts)
                return Publication(sha256, chunk, share.fronts)
        return None

    def _due(self, sha256: str, share: _Share, now: float) -> list[int]:
        """Leaves whose time has come, ascending."""
        if not share.waiting:
            return []
        if share.at_once:
            return sorted(i for i in share.waiting if now - share.sent.get(i, -AGAIN_S) >= AGAIN_S)
        if share.opened is None:
            if not self._audience.complete(now) and now - share.began < HOLD_S:
                return []
            share.opened = now
        opened, fronts = share.opened, share.live(now)
        late = now - opened < GATHER_S and any(d not in share.fronts for d in self._audience.of(sha256, now))
        reached = 0 if late else min(fronts, default=0)
        return sorted(
            leaf
            for leaf, (_, since) in share.waiting.items()
            if now - max(since, opened) >= GATHER_S or (leaf < reached and leaf not in share.sent)
        )

    def _share(self, want: BlobRequest, now: float) -> _Share:
        key = want.sha256, want.part
        share = self._shares.get(key)
        if share is None:
            for old in [k for k in self._shares if not self._audience.of(k[0], now)]:
                del self._shares[old]
            leaves = -(-self._store.size(want.sha256) // LEAF)
            pieces = -(-leaves * DIGEST // LEAF)
            small = want.part == "leaves" or leaves == 1
            share = self._shares[key] = _Share(pieces if want.part == "leaves" else leaves, small, now)
        return share


def _run(leaves: Iterable[int], most: int) -> list[int]:
    """The leaves at the beginning that follow each other."""
    run: list[int] = []
    for leaf in leaves:
        if run and (leaf != run[-1] + 1 or len(run) == most):
            break
        run.append(leaf)
    return run


def _wants(want: BlobRequest, leaves: list[int]) -> list[BlobRequest]:
    """Wants for some of a want's leaves, ascending."""
    out: list[BlobRequest] = []
    while leaves:
        run = _run(leaves, len(leaves))
        out.append(BlobRequest(want.sha256, want.part, run[0], len(run)))
        leaves = leaves[len(run) :]
    return out
