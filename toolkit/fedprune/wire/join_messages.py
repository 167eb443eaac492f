"""Messages by which a device is let in; `fedprune.security.joining` makes and checks what is signed in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.fields import Device, Digest, Name, choice, hexadecimal, text, whole

APPROVED, WAITING, REFUSED = "approved", "waiting", "refused"

MAX_AUTHORITIES = 2
"""Certificate authorities that a fleet trusts at a time: two while one replaces the other."""

Pem = Annotated[str, text(8192)]


@dataclass(frozen=True)
class JoinRequest(CheckedMessage, kind="join"):
    """Somebody wants to be let in as a device, or, being one, wants a new certificate."""

    site: Name
    """Where it wants to take part."""
    device: Device
    """As what."""
    key: Annotated[str, hexadecimal(64)]
    """Its verifying key, as hex."""
    csr: Annotated[str, text(4096)]
    """Its certificate request (PKCS #10, PEM), with the device as common name; what else it says doesn't count."""
    nonce: Annotated[str, hexadecimal(32)]
    """Random; part of the topics of request and answer."""
    claim: Annotated[str, hexadecimal(10)] | None
    """Id of the claim that it uses, as hex; None to wait for the operator, or to renew."""
    mac: Annotated[str, hexadecimal(64)] | None
    """HMAC-SHA256 over all of the above, by a key that follows from the claim's secret."""
    signature: Annotated[str, hexadecimal(128)]
    """Over all of the above, by `key`."""


@dataclass(frozen=True)
class JoinAnswer(CheckedMessage, kind="joined"):
    """What a server says to a `JoinRequest`."""

    request: Digest
    """sha256 of the request that it answers, with its signature."""
    status: Annotated[str, choice(APPROVED, WAITING, REFUSED)]
    """`approved`; `waiting` for the operator: ask again with the same request; or `refused`."""
    reason: Annotated[str, text(4096)]
    """Why, in words."""
    time: Annotated[int, whole(0, 2**40)]
    """The server's, in seconds since 1970; no certificate that has ended by then counts any more."""
    authority: Pem
    """The certificate authorities that the fleet trusts (PEM), the oldest first: one, or two while one replaces the
    other."""
    certificate: Pem | None
    """The device's (PEM), if it is approved."""
    server_key: Annotated[str, hexadecimal(64)] | None
    """What the server signs its messages with, as hex, if the device is approved."""
    signature: Annotated[str, hexadecimal(16, 160)]
    """Over all of the above, by the first authority's key: ECDSA with SHA-256, in DER, as hex."""
