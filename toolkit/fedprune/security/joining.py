"""Requests to join a fleet, and the verification of their answers.

A request is signed by the device's key, which proves possession; with a claim (`security.join_claim`) it is also
authenticated by the claim's key, which proves permission. The answer is signed by the authority. The device knows the
authority's key by its pin (the beginning of the key's sha256), which the claim holds, or which was configured. Neither
side has to trust the network.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedprune.core.errors import JoinError, ProtocolError, SignatureError
from fedprune.core.text import one_line
from fedprune.security.certificates import (
    certificate_name,
    is_issued_by,
    key_digest,
    pem_of,
    pin_of,
    read_certificate,
    request_key,
)
from fedprune.security.join_claim import JoinClaim, claim_mac, is_same
from fedprune.security.keys import SigningKey, VerifyingKey, grouped_digits, transcript
from fedprune.wire.fleet_messages import APPROVED, REFUSED, JoinAnswer, JoinRequest

_REQUEST_DOMAIN, _PROOF_DOMAIN, _ANSWER_DOMAIN = "fedprune join 1", "fedprune join proof 1", "fedprune joined 1"


@dataclass(frozen=True)
class Admission:
    """An approved device's certificate, the fleet's authority (both PEM), the server's key and its time."""

    certificate: str
    authority: str
    server: VerifyingKey
    time: int


def make_join_request(site: str, device: str, key: SigningKey, csr: str, claim: JoinClaim | None = None) -> JoinRequest:
    """A request to join, or, with a member's key, for a new certificate; `csr` is a certificate request for the TLS
    key. With a claim the device joins at once; without one the operator decides."""
    nonce = secrets.token_hex(16)
    claim_id = claim.id.hex() if claim is not None else None
    body = _request_text(site, device, key.verifying_key.hex, csr, nonce, claim_id)
    proof = claim_mac(claim.key, body) if claim is not None else None
    signature = key.sign(transcript(_PROOF_DOMAIN, body, proof)).hex()
    return JoinRequest(site, device, key.verifying_key.hex, csr, nonce, claim_id, proof, signature)


def check_request(request: JoinRequest) -> VerifyingKey:
    """Verify that a request's sender has the keys in it; returns the verifying key.

    The certificate request has to name the device. Otherwise a member could repeat another's certificate request under
    its own name, and so use up that device's TLS key.

    Raises `SignatureError` if the signature is invalid, and `ProtocolError` if the key or certificate request is
    invalid or another device's, or a claim lacks its proof.
    """
    if (request.claim is None) != (request.mac is None):
        raise ProtocolError("join: claim and mac", expected="both or neither", got="one")
    key = VerifyingKey.from_hex(request.key, "join: field key")
    key.verify(bytes.fromhex(request.signature), transcript(_PROOF_DOMAIN, _request_body(request), request.mac))
    request_key(request.csr, request.device)
    return key


def holds_claim(request: JoinRequest, key: bytes) -> bool:
    """Whether the request's sender knows a claim's secret; in constant time."""
    return is_same(claim_mac(key, _request_body(request)), request.mac or "")


def request_digest(request: JoinRequest) -> str:
    """The sha256 of a request, by which the server recognises repetitions and the answer names the request."""
    return hashlib.sha256(
        transcript(_REQUEST_DOMAIN, _request_body(request), request.mac, request.signature)
    ).hexdigest()


def signed_answer_bytes(
    request: str, status: str, reason: str, time: int, authority: str, certificate: str | None, server_key: str | None
) -> bytes:
    """The signed bytes of an answer, from the fields of `JoinAnswer`."""
    return transcript(_ANSWER_DOMAIN, request, status, reason, time, authority, certificate, server_key)


def check_answer(answer: JoinAnswer, request: JoinRequest, pin: bytes) -> Admission | None:
    """Verify the answer to a request by the authority with this pin: the claim's, a configured one, or the known one.

    Returns the admission; None if the device must wait for the operator and repeat the request. Raises `SignatureError`
    if the answer is to another request, or not by the authority with the pin, `JoinError` if the device is refused, and
    `ProtocolError` if the answer is invalid.
    """
    if not is_same(answer.request, request_digest(request)):
        raise SignatureError("the answer is to another request")
    authority = read_certificate(answer.authority, "the authority's certificate")
    if not is_same(pin_of(authority), pin):
        raise SignatureError(
            "the answer comes from another server than the claim's",
            expected=f"an authority with pin {grouped_digits(pin.hex())}",
            got=grouped_digits(pin_of(authority).hex()),
            hint="The connection is intercepted, or the claim is another server's.",
        )
    signed = signed_answer_bytes(
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
    _check_certificate(certificate, authority, request)
    server = VerifyingKey.from_hex(answer.server_key, "joined: field server_key")
    return Admission(pem_of(certificate), pem_of(authority), server, answer.time)


def _check_certificate(certificate: x509.Certificate, authority: x509.Certificate, request: JoinRequest) -> None:
    if not is_issued_by(certificate, authority):
        raise ProtocolError("the device's certificate is not by the server's authority")
    if key_digest(certificate.public_key()) != key_digest(request_key(request.csr)):
        raise ProtocolError("the device's certificate is for another key")
    if certificate_name(certificate) != request.device:
        raise ProtocolError(
            "name in the device's certificate", expected=request.device, got=repr(certificate_name(certificate))
        )


def _request_text(site: str, device: str, key: str, csr: str, nonce: str, claim: str | None) -> bytes:
    return transcript(_REQUEST_DOMAIN, site, device, key, csr, nonce, claim)


def _request_body(request: JoinRequest) -> bytes:
    return _request_text(request.site, request.device, request.key, request.csr, request.nonce, request.claim)
