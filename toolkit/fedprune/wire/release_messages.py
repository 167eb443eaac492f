"""Messages that offer boards a release of the runtime, and report its installation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.fields import Count, Device, Digest, Items, choice, hexadecimal, number, text, whole

DOWNLOADING, STAGED, TRIAL = "downloading", "staged", "trial"
COMMITTED, ROLLED_BACK, REFUSED = "committed", "rolled back", "refused"
STATES = (DOWNLOADING, STAGED, TRIAL, COMMITTED, ROLLED_BACK, REFUSED)
"""Progress of a release on a board; the last three are final."""

MAX_NUMBER = 2**31 - 1
MAX_MANIFEST = 65_536
MAX_FILES = 64
"""Limits of a release: its number, the bytes of its manifest, its files."""

MAX_ATTEMPTS, MAX_SECONDS = 100, 3600.0
"""Attempts of a trial, and seconds of each."""

ReleaseNumber = Annotated[int, whole(0, MAX_NUMBER)]


@dataclass(frozen=True)
class ReleaseOffer(CheckedMessage, kind="release"):
    """An offer of a release, which a board installs."""

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
    """A release must no longer be installed; boards that try or run it continue."""

    number: ReleaseNumber
    """The release's number."""
    reason: Annotated[str, text(4096)]
    """Why, in words."""


@dataclass(frozen=True)
class ReleaseReport(CheckedMessage, kind="release_report"):
    """Progress of a release on a board; sent after every birth and at every change."""

    device: Device
    number: ReleaseNumber
    """The release's number."""
    state: Annotated[str, choice(*STATES)]
    """One of `STATES`."""
    reason: Annotated[str, text(4096)]
    """Why it was refused or rolled back, or what the board waits for."""
    done: Count
    """Leaves of its files that have arrived."""
    total: Count
    """Leaves of its files; 0 where none are fetched."""


ReleaseFromServer = ReleaseOffer | ReleaseWithdrawn
