"""Messages by which a device joins a fleet; `fedprune.security.joining` makes and checks their signatures."""

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
    """A request to join as a device, or, by a member, for a new certificate."""

    site: Name
    """The fleet's site."""
    device: Device
    """The name that it asks for."""
    key: Annotated[str, hexadecimal(64)]
    """The device's verifying key, as hex."""
    csr: Annotated[str, text(4096)]
    """Certificate request (PKCS #10, PEM) with the device as common name; its other contents are ignored."""
    nonce: Annotated[str, hexadecimal(32)]
    """Random; part of the topics of request and answer."""
    claim: Annotated[str, hexadecimal(10)] | None
    """Id of the claim that is used, as hex; None to wait for the operator's approval, or to renew."""
    mac: Annotated[str, hexadecimal(64)] | None
    """HMAC-SHA256 over all of the above, by a key derived from the claim's secret."""
    signature: Annotated[str, hexadecimal(128)]
    """Over all of the above, by `key`."""


@dataclass(frozen=True)
class JoinAnswer(CheckedMessage, kind="joined"):
    """A server's answer to a `JoinRequest`."""

    request: Digest
    """sha256 of the answered request, including its signature."""
    status: Annotated[str, choice(APPROVED, WAITING, REFUSED)]
    """`approved`; `waiting` for the operator, so that the same request is to be repeated; or `refused`."""
    reason: Annotated[str, text(4096)]
    """Why, in words."""
    time: Annotated[int, whole(0, 2**40)]
    """The server's time in seconds since 1970; certificates that ended before are void."""
    authority: Pem
    """The certificate authorities that the fleet trusts (PEM), the oldest first: one, or two while one replaces the
    other."""
    certificate: Pem | None
    """The device's certificate (PEM), if it is approved."""
    server_key: Annotated[str, hexadecimal(64)] | None
    """The server's verifying key, as hex, if the device is approved."""
    signature: Annotated[str, hexadecimal(16, 160)]
    """Over all of the above, by the first authority's key: ECDSA with SHA-256, in DER, as hex."""
