"""Messages by which a server gives its boards a release of the runtime, and by which they say what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.fields import Count, Device, Digest, Items, choice, hexadecimal, number, text, whole

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

ReleaseNumber = Annotated[int, whole(0, MAX_NUMBER)]


@dataclass(frozen=True)
class ReleaseOffer(CheckedMessage, kind="release"):
    """A board is to update itself."""

    number: ReleaseNumber
    """The release's number."""
    manifest: Annotated[str, text(MAX_MANIFEST)]
    """Its manifest, as it was signed (`fedprune.releases.release.Release.to_bytes`)."""
    signature: Annotated[str, hexadecimal(128)]
    """The server's on it, as hex."""
    leaves: Annotated[tuple[Digest, ...], Items(MAX_FILES, "digests", least=1)]
    """For each file of the manifest, in order, the sha256 of its leaf table: with the digest and the size that the
    manifest says they name the blob that the board pulls."""
    attempts: Annotated[int, whole(1, MAX_ATTEMPTS)]
    """How often it may be started until it is healthy."""
    seconds: Annotated[float, number(1, MAX_SECONDS)]
    """How long each attempt may take."""


@dataclass(frozen=True)
class ReleaseWithdrawn(CheckedMessage, kind="release_withdrawn"):
    """A release is no longer to be installed; a board that tries or runs it goes on."""

    number: ReleaseNumber
    """The release's number."""
    reason: Annotated[str, text(4096)]
    """Why, in words."""


@dataclass(frozen=True)
class ReleaseReport(CheckedMessage, kind="release_report"):
    """Where a release stands on a board; said at every birth, and when it changes."""

    device: Device
    number: ReleaseNumber
    """The release's number."""
    state: Annotated[str, choice(*STATES)]
    """One of `STATES`."""
    reason: Annotated[str, text(4096)]
    """Why it was refused or rolled back, or what it waits for."""
    done: Count
    """Leaves of its files that are there."""
    total: Count
    """Leaves of its files; 0 where nothing is pulled."""


ReleaseFromServer = ReleaseOffer | ReleaseWithdrawn
