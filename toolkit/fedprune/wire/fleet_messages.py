"""Messages outside of rounds: joining a fleet, releases of the runtime, boards' crashes, connections, and servers that
meet.

`fedprune.security.joining` makes and checks the signatures of join messages. Messages between servers of one identity
never reach devices.
"""

from __future__ import annotations

from typing import Annotated, TypedDict

from fedprune.core.records import Digest, hex_text, item_count, number_range, printable_text, word_of
from fedprune.wire.fields import CheckedMessage, Count, Device, Name

# States of a request to join; a board may refuse a release, too.
APPROVED, WAITING, REFUSED = "approved", "waiting", "refused"

Pem = Annotated[str, printable_text(8192)]


class JoinRequest(CheckedMessage, frozen=True, tag="join"):
    """A request to join as a device, or, by a member, for a new certificate."""

    site: Name
    """The fleet's site."""
    device: Device
    """The name that it asks for."""
    key: Annotated[str, hex_text(64)]
    """The device's verifying key, as hex."""
    csr: Annotated[str, printable_text(4096)]
    """Certificate request (PKCS #10, PEM) with the device as common name; its other contents are ignored."""
    nonce: Annotated[str, hex_text(32)]
    """Random; part of the topics of request and answer."""
    claim: Annotated[str, hex_text(10)] | None
    """Id of the claim that is used, as hex; None to wait for the operator's approval, or to renew."""
    mac: Annotated[str, hex_text(64)] | None
    """HMAC-SHA256 over all of the above, by a key derived from the claim's secret."""
    signature: Annotated[str, hex_text(128)]
    """Over all of the above, by `key`."""


class JoinAnswer(CheckedMessage, frozen=True, tag="joined"):
    """A server's answer to a `JoinRequest`."""

    request: Digest
    """sha256 of the answered request, including its signature."""
    status: Annotated[str, word_of((APPROVED, WAITING, REFUSED))]
    """`approved`; `waiting` for the operator, so that the same request is to be repeated; or `refused`."""
    reason: Annotated[str, printable_text(4096)]
    """Why, in words."""
    time: Annotated[int, number_range(0, 2**40)]
    """The server's time in seconds since 1970; certificates that ended before are void."""
    authority: Pem
    """The fleet's certificate authority (PEM)."""
    certificate: Pem | None
    """The device's certificate (PEM), if it is approved."""
    server_key: Annotated[str, hex_text(64)] | None
    """The server's verifying key, as hex, if the device is approved."""
    signature: Annotated[str, hex_text(16, 160)]
    """Over all of the above, by the authority's key: ECDSA with SHA-256, in DER, as hex."""


DOWNLOADING, STAGED, TRIAL = "downloading", "staged", "trial"
COMMITTED, ROLLED_BACK = "committed", "rolled back"
# Progress of a release on a board; the last three are final.
RELEASE_STATES = (DOWNLOADING, STAGED, TRIAL, COMMITTED, ROLLED_BACK, REFUSED)

# Limits of a release: its number, the bytes of its manifest, its files.
MAX_RELEASE_NUMBER = 2**31 - 1
MAX_MANIFEST_BYTES = 65_536
MAX_RELEASE_FILES = 64

# Attempts of a trial, and seconds of each: a release that fails must end by itself on a board that nobody can reach.
MAX_TRIAL_ATTEMPTS, MAX_TRIAL_S = 100, 3600.0

ReleaseNumber = Annotated[int, number_range(0, MAX_RELEASE_NUMBER)]


class ReleaseOffer(CheckedMessage, frozen=True, tag="release"):
    """An offer of a release, which a board installs."""

    number: ReleaseNumber
    """The release's number."""
    manifest: Annotated[str, printable_text(MAX_MANIFEST_BYTES)]
    """Its manifest, as it was signed (`fedprune.releases.release.Release.to_bytes`)."""
    signature: Annotated[str, hex_text(128)]
    """The server's on it, as hex."""
    leaves: Annotated[tuple[Digest, ...], item_count(MAX_RELEASE_FILES, min_items=1)]
    """For each file of the manifest, in order, the sha256 of its leaf table: with the digest and size in the
    manifest, they name the blob that the board pulls."""
    attempts: Annotated[int, number_range(1, MAX_TRIAL_ATTEMPTS)]
    """How often it may be started until it is healthy."""
    seconds: Annotated[float, number_range(1, MAX_TRIAL_S)]
    """How long each attempt may take."""


class ReleaseWithdrawn(CheckedMessage, frozen=True, tag="release_withdrawn"):
    """A release must no longer be installed; boards that try or run it continue."""

    number: ReleaseNumber
    """The release's number."""
    reason: Annotated[str, printable_text(4096)]
    """Why, in words."""


class ReleaseReport(CheckedMessage, frozen=True, tag="release_report"):
    """Progress of a release on a board; sent after every birth and at every change."""

    device: Device
    number: ReleaseNumber
    """The release's number."""
    state: Annotated[str, word_of(RELEASE_STATES)]
    """One of `RELEASE_STATES`."""
    reason: Annotated[str, printable_text(4096)]
    """Why it was refused or rolled back, or what the board waits for."""
    done: Count
    """Leaves of its files that have arrived."""
    total: Count
    """Leaves of its files; 0 where none are fetched."""
    manifest: Digest | None = None
    """sha256 of the manifest of the release of this number that is installed, because others may have the number."""


ReleaseFromServer = ReleaseOffer | ReleaseWithdrawn


# Limits of a crash report: characters of its text, frames of its traceback.
MAX_CRASH_TEXT = 1000
MAX_FRAMES = 16

MeasuredNumber = Annotated[float, number_range(-1e12, 1e12)]


class TracebackFrame(TypedDict):
    """A frame of a crash's traceback."""

    module: Annotated[str, printable_text(128)]
    line: Annotated[int, number_range(0, 2**31 - 1)]
    function: Annotated[str, printable_text(128)]


class CrashReport(CheckedMessage, frozen=True, tag="crash"):
    """An unexpected end of a board's last run."""

    device: Device
    number: Count
    """Its time in milliseconds since 1970 by the board's clock, by which the server recognises repetitions."""
    at: Count
    """Time in seconds since 1970 by the board's clock."""
    cause: Annotated[str, printable_text(64)]
    """`error` (one with an exit code), `exception`, `thread`, `signal` or `killed`; others may come."""
    text: Annotated[str, printable_text(MAX_CRASH_TEXT)]
    """The exception or signal, for people."""
    frames: Annotated[tuple[TracebackFrame, ...], item_count(MAX_FRAMES)]
    """The traceback, innermost frame first."""
    release: Annotated[str, printable_text(256)]
    """The runtime that ran, with its version."""
    slot: Annotated[str, printable_text(64)]
    """Which of two installed releases it was; empty without a launcher."""
    uptime_s: MeasuredNumber | None = None
    """Seconds that it had run, or None."""
    temperature_c: MeasuredNumber | None = None
    """The board's temperature, or None."""
    memory_available: Count | None = None
    """Bytes of memory that were free, or None."""
    memory_total: Count | None = None
    """Bytes of memory, or None."""


class CrashStored(CheckedMessage, frozen=True, tag="crash_stored"):
    """A crash is on the server's disk: the board sends it no more."""

    number: Count
    """The crash's number."""


# Ability of a board: it spreads its reconnects as the server says, and disconnects for a time if the server asks it to.
RECONNECT_ABILITY = "reconnect"

# The longest time for which a board is sent away.
MAX_BOARD_AWAY_S = 7 * 86_400.0


class Reconnect(CheckedMessage, frozen=True, tag="reconnect"):
    """How a board connects again; also the answer to each birth. Only a board with the ability `reconnect` is sent
    away."""

    spread_s: Annotated[float, number_range(0.0, 3600.0)]
    """After a lost connection, each attempt comes after a random pause of up to this many seconds, or more."""
    away_s: Annotated[float, number_range(1.0, MAX_BOARD_AWAY_S)] | None = None
    """Seconds for which a board without a part disconnects now; None to stay connected."""


RandomId = Annotated[str, hex_text(32)]


class ServerQuery(CheckedMessage, frozen=True, tag="server-query"):
    """A query for the servers that serve a site."""

    instance: RandomId
    """Random id of the querying process."""
    nonce: RandomId
    """Random; answers repeat it, so that older answers are ignored."""
    since: Count
    """As in `ServerPresence`."""
    lease: RandomId | None
    """As in `ServerPresence`."""


class ServerPresence(CheckedMessage, frozen=True, tag="server-presence"):
    """A server's answer to a `ServerQuery`: it serves this site, or begins to."""

    nonce: RandomId
    """The query's."""
    instance: RandomId
    """Random id of the answering process."""
    host: Annotated[str, printable_text(256)]
    """Name of its machine."""
    folder: Annotated[str, printable_text(4096)]
    """Its state folder."""
    since: Count
    """When it began to serve, in seconds since 1970; 0 while it only begins."""
    lease: RandomId | None
    """Id of the database whose lease it holds; null where that is a file of its own. Between two servers of one
    database the lease decides."""
