"""Joining: what a device asks with, and what it believes of the answer.

A request is signed by the device's key, which proves that it has it; with a claim it is also authenticated by the
claim's key, which proves that it may. The answer is signed by the authority, whose key the device knows by the claim's
pin, or by a pin that it was given. Neither has to trust what is in between.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedprune.core.errors import JoinError, ProtocolError, SignatureError
from fedprune.core.text import one_line
from fedprune.security.canonical_encoding import transcript
from fedprune.security.certificates import (
    issued_by,
    key_digest,
    name_of,
    pem_of,
    pin_of,
    read_authorities,
    read_certificate,
    request_key,
)
from fedprune.security.join_token import Claim, mac, same
from fedprune.security.keys import SigningKey, VerifyingKey, grouped
from fedprune.wire.join_messages import APPROVED, REFUSED, JoinAnswer, JoinRequest

_REQUEST, _PROOF, _ANSWER = "fedprune join 1", "fedprune join proof 1", "fedprune joined 1"


@dataclass(frozen=True)
class Admission:
    """What a device that is let in has learnt.

    Attributes:
        certificate: Its certificate (PEM).
        authority: The authorities that the fleet trusts (PEM), the oldest first.
        server: What the server signs its messages with.
        time: The server's, in seconds since 1970.
    """

    certificate: str
    authority: str
    server: VerifyingKey
    time: int


def make_request(site: str, device: str, key: SigningKey, csr: str, claim: Claim | None = None) -> JoinRequest:
    """Ask to be let in, or, with a key that is let in, for a new certificate.

    Args:
        site: Where.
        device: As what.
        key: The device's.
        csr: A request for a certificate, with a TLS key that has none yet.
        claim: To be let in at once; without one the operator decides.

    Raises:
        ProtocolError: A name is none.
    """
    nonce = secrets.token_hex(16)
    said = claim.id.hex() if claim is not None else None
    body = _request_text(site, device, key.verifying.hex, csr, nonce, said)
    proof = mac(claim.key, body) if claim is not None else None
    signature = key.sign(transcript(_PROOF, body, proof)).hex()
    return JoinRequest(site, device, key.verifying.hex, csr, nonce, said, proof, signature)


def check_request(request: JoinRequest) -> VerifyingKey:
    """Make sure that whoever asks has the keys that it asks for.

    The certificate request has to name the device: a member could otherwise repeat another's request for a certificate
    under its own name, and so use up that one's TLS key.

    Raises:
        SignatureError: It has not.
        ProtocolError: Key or certificate request are none, that one is another device's, or a claim comes without its
            proof.
    """
    if (request.claim is None) != (request.mac is None):
        raise ProtocolError("join: claim and mac", expected="both or neither", got="one")
    key = VerifyingKey.from_hex(request.key, "join: field key")
    key.verify(bytes.fromhex(request.signature), transcript(_PROOF, _body(request), request.mac))
    request_key(request.csr, request.device)
    return key


def holds_claim(request: JoinRequest, key: bytes) -> bool:
    """Whether whoever asks knows a claim's secret; takes the same time either way."""
    return same(mac(key, _body(request)), request.mac or "")


def digest_of(request: JoinRequest) -> str:
    """sha256 of a request, by which it is known again and its answer names it."""
    return hashlib.sha256(transcript(_REQUEST, _body(request), request.mac, request.signature)).hexdigest()


def answer_text(
    request: str, status: str, reason: str, time: int, authority: str, certificate: str | None, server_key: str | None
) -> bytes:
    """What an answer's signature covers; arguments are the fields of `JoinAnswer`."""
    return transcript(_ANSWER, request, status, reason, time, authority, certificate, server_key)


def check_answer(answer: JoinAnswer, request: JoinRequest, *pins: bytes) -> Admission | None:
    """What an answer gives the device that asked.

    Args:
        answer: What came.
        request: What was asked.
        pins: Of the authority: the claim's, one that the device was given, or those that it knows.

    Returns:
        What it needs from now on; None if it must wait for the operator, and ask again with the same request.

    Raises:
        SignatureError: The answer is to another request, or not by an authority with one of the pins.
        JoinError: The device is refused.
        ProtocolError: The answer makes no sense.
    """
    if not same(answer.request, digest_of(request)):
        raise SignatureError("the answer is to another request")
    authorities = read_authorities(answer.authority)
    authority = authorities[0]
    if not any(same(pin_of(authority), pin) for pin in pins):
        raise SignatureError(
            "the answer comes from another server than the claim's",
            expected=f"an authority with pin {grouped(pins[0].hex())}",
            got=grouped(pin_of(authority).hex()),
            hint="Somebody stands between this board and its server, or the claim is another server's.",
        )
    signed = answer_text(
        answer.request,
        answer.status,
        answer.reason,
        answer.time,
        answer.authority,
        answer.certificate,
        answer.server_key,
    )
    key = authority.public_key()
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(bytes.fromhex(answer.signature), signed, ec.ECDSA(hashes.SHA256()))
        authority.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise SignatureError("the answer is not signed by the server's authority") from error
    if answer.status == REFUSED:
        raise JoinError(f"the server refuses {request.device}: {one_line(answer.reason)}")
    if answer.status != APPROVED:
        return None
    if answer.certificate is None or answer.server_key is None:
        raise ProtocolError("joined: approved", expected="a certificate and the server's key", got="one or none")
    certificate = read_certificate(answer.certificate, "the device's certificate")
    _check_certificate(certificate, authorities, request)
    server = VerifyingKey.from_hex(answer.server_key, "joined: field server_key")
    trusted = "".join(map(pem_of, authorities))
    return Admission(pem_of(certificate), trusted, server, answer.time)


def _check_certificate(
    certificate: x509.Certificate, authorities: Sequence[x509.Certificate], request: JoinRequest
) -> None:
    if not any(issued_by(certificate, authority) for authority in authorities):
        raise ProtocolError("the device's certificate is not by the server's authority")
    if key_digest(certificate.public_key()) != key_digest(request_key(request.csr)):
        raise ProtocolError("the device's certificate is for another key")
    if name_of(certificate) != request.device:
        raise ProtocolError("name in the device's certificate", expected=request.device, got=repr(name_of(certificate)))


def _request_text(site: str, device: str, key: str, csr: str, nonce: str, claim: str | None) -> bytes:
    return transcript(_REQUEST, site, device, key, csr, nonce, claim)


def _body(request: JoinRequest) -> bytes:
    return _request_text(request.site, request.device, request.key, request.csr, request.nonce, request.claim)
