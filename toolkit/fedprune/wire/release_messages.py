"""Messages by which a server gives its boards a release of the runtime, and by which they say what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedprune.wire import validation as check
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.validation import Check

DOWNLOADING, STAGED, TRIAL = "downloading", "staged", "trial"
COMMITTED, ROLLED_BACK, REFUSED = "committed", "rolled back", "refused"
STATES = (DOWNLOADING, STAGED, TRIAL, COMMITTED, ROLLED_BACK, REFUSED)
"""Where a release stands on a board; the last three are how it ends."""

MAX_NUMBER = 2**31 - 1
MAX_MANIFEST = 65_536
MAX_FILES = 64
"""Of a release: its number, bytes of its manifest, files."""

MAX_ATTEMPTS, MAX_SECONDS = 100, 3600.0
"""Of a trial, and of each attempt at it."""

_NUMBER = check.whole(0, MAX_NUMBER)


@dataclass(frozen=True)
class ReleaseOffer(CheckedMessage):
    """A board is to update itself.

    Attributes:
        number: The release's number.
        manifest: Its manifest, as it was signed (`fedprune.releases.release.Release.to_bytes`).
        signature: The server's on it, as hex.
        leaves: For each file of the manifest, in order, the sha256 of its leaf table: with the digest and the size that
            the manifest says they name the blob that the board pulls.
        attempts: How often it may be started until it is healthy.
        seconds: How long each attempt may take.
    """

    number: int
    manifest: str
    signature: str
    leaves: tuple[str, ...]
    attempts: int
    seconds: float

    kind: ClassVar[str] = "release"
    checks: ClassVar[Mapping[str, Check]] = {
        "number": _NUMBER,
        "manifest": check.text(MAX_MANIFEST),
        "signature": check.hexadecimal(128),
        "leaves": check.digests(MAX_FILES),
        "attempts": check.whole(1, MAX_ATTEMPTS),
        "seconds": check.number(1, MAX_SECONDS),
    }


@dataclass(frozen=True)
class ReleaseWithdrawn(CheckedMessage):
    """A release is no longer to be installed; a board that tries or runs it goes on.

    Attributes:
        number: The release's number.
        reason: Why, in words.
    """

    number: int
    reason: str

    kind: ClassVar[str] = "release_withdrawn"
    checks: ClassVar[Mapping[str, Check]] = {"number": _NUMBER, "reason": check.text(4096)}


@dataclass(frozen=True)
class ReleaseReport(CheckedMessage):
    """Where a release stands on a board; said at every birth, and when it changes.

    Attributes:
        device: The board.
        number: The release's number.
        state: One of `STATES`.
        reason: Why it was refused or rolled back, or what it waits for.
        done: Leaves of its files that are there.
        total: Leaves of its files; 0 where nothing is pulled.
    """

    device: str
    number: int
    state: str
    reason: str
    done: int
    total: int

    kind: ClassVar[str] = "release_report"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        "number": _NUMBER,
        "state": check.choice(*STATES),
        "reason": check.text(4096),
        "done": check.whole(),
        "total": check.whole(),
    }


ReleaseFromServer = ReleaseOffer | ReleaseWithdrawn
