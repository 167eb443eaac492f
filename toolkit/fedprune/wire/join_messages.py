"""Messages by which a device is let in; `fedprune.security.joining` makes and checks what is signed in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedprune.wire import validation as check
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.validation import Check

APPROVED, WAITING, REFUSED = "approved", "waiting", "refused"

MAX_AUTHORITIES = 2
"""Certificate authorities that a fleet trusts at a time: two while one replaces the other."""

_PEM = check.text(8192)


@dataclass(frozen=True)
class JoinRequest(CheckedMessage):
    """Somebody wants to be let in as a device, or, being one, wants a new certificate.

    Attributes:
        site: Where it wants to take part.
        device: As what.
        key: Its verifying key, as hex.
        csr: Its certificate request (PKCS #10, PEM), with the device as common name; what else it says doesn't count.
        nonce: Random; part of the topics of request and answer.
        claim: Id of the claim that it uses, as hex; None to wait for the operator, or to renew.
        mac: HMAC-SHA256 over all of the above, by a key that follows from the claim's secret.
        signature: Over all of the above, by `key`.
    """

    site: str
    device: str
    key: str
    csr: str
    nonce: str
    claim: str | None
    mac: str | None
    signature: str

    kind: ClassVar[str] = "join"
    checks: ClassVar[Mapping[str, Check]] = {
        "site": check.name,
        "device": check.device,
        "key": check.hexadecimal(64),
        "csr": check.text(4096),
        "nonce": check.hexadecimal(32),
        "claim": check.optional(check.hexadecimal(10)),
        "mac": check.optional(check.hexadecimal(64)),
        "signature": check.hexadecimal(128),
    }


@dataclass(frozen=True)
class JoinAnswer(CheckedMessage):
    """What a server says to a `JoinRequest`.

    Attributes:
        request: sha256 of the request that it answers, with its signature.
        status: `approved`; `waiting` for the operator: ask again with the same request; or `refused`.
        reason: Why, in words.
        time: The server's, in seconds since 1970; no certificate that has ended by then counts any more.
        authority: The certificate authorities that the fleet trusts (PEM), the oldest first: one, or two while one
            replaces the other.
        certificate: The device's (PEM), if it is approved.
        server_key: What the server signs its messages with, as hex, if the device is approved.
        signature: Over all of the above, by the first authority's key: ECDSA with SHA-256, in DER, as hex.
    """

    request: str
    status: str
    reason: str
    time: int
    authority: str
    certificate: str | None
    server_key: str | None
    signature: str

    kind: ClassVar[str] = "joined"
    checks: ClassVar[Mapping[str, Check]] = {
        "request": check.digest,
        "status": check.choice(APPROVED, WAITING, REFUSED),
        "reason": check.text(4096),
        "time": check.whole(0, 2**40),
        "authority": _PEM,
        "certificate": check.optional(_PEM),
        "server_key": check.optional(check.hexadecimal(64)),
        "signature": check.hexadecimal(16, 160),
    }
