"""Answers boards' requests to join; the authority signs the answers."""

from __future__ import annotations

import logging

from fedprune.core.errors import IdentityError, JoinError, ProtocolError
from fedprune.core.text import one_line
from fedprune.security.authority import SERVER_COMMON_NAME
from fedprune.security.joining import check_request, request_digest, signed_answer_bytes
from fedprune.wire.fleet_messages import APPROVED, REFUSED, WAITING, JoinAnswer, JoinRequest
from fedprune.wire.messages import parse_message
from fedprune.wire.topics import Topics
from fedprune_server.enrollment.pki import IdentityFolder

log = logging.getLogger("fedprune.server")


class EnrollmentService:
    """Answers requests to join. The same request gets the same certificate again."""

    def __init__(self, identity: IdentityFolder) -> None:
        self._identity = identity
        self._topics = Topics(identity.site)

    def receive(self, topic: str, payload: bytes) -> tuple[str, JoinAnswer]:
        """The topic and the answer to a request on a topic. Raises `ProtocolError` for one that gets no answer."""
        nonce = self._topics.parse_join(topic)
        request = parse_message(payload)
        if not isinstance(request, JoinRequest):
            raise ProtocolError("message of who wants to join", expected=JoinRequest.kind, got=request.kind)
        if request.nonce != nonce:
            raise ProtocolError("nonce of a request", expected=nonce, got=request.nonce)
        return self._topics.join_answer(nonce), self.answer(request)

    def answer(self, request: JoinRequest) -> JoinAnswer:
        """The answer to a request. Raises `ProtocolError` if the sender lacks the keys that the request names."""
        check_request(request)
        digest = request_digest(request)
        stored_answer = self._identity.store.stored_answer(digest)
        try:
            # Checked before a stored answer is sent again: the device may have been revoked since.
            if not self._approve(request, digest):
                return self._sign_answer(digest, WAITING, "the operator must approve this device")
            if stored_answer is not None:
                answer = parse_message(stored_answer)
                if isinstance(answer, JoinAnswer):
                    return answer
            certificate = self._issue(request)
        except (JoinError, IdentityError) as error:
            log.warning("%s may not join: %s", request.device, one_line(str(error)))
            return self._sign_answer(digest, REFUSED, one_line(str(error)))
        answer = self._sign_answer(digest, APPROVED, "", certificate, self._identity.key.verifying_key.hex)
        self._identity.store.store_answer(digest, request.device, answer.to_bytes())
        log.info("%s has a certificate", request.device)
        return answer

    def _issue(self, request: JoinRequest) -> str:
        """A certificate for an approved device. Raises `JoinError` if the device has been revoked meanwhile."""
        store = self._identity.store
        certificate = store.certificate(request, self._identity.authority.now())
        if certificate is None:
            issued = self._identity.authority.issue_device(request.site, request.device, request.csr)
            certificate = store.add_certificate(request, issued)
        # A revocation first withdraws the key's approval and then lists its certificates. So if the key is still
        # approved now, a later revocation will list this certificate; if it isn't, the list may lack it.
        if store.key_of(request.device) != request.key:
            self._identity.update_revocations()
            raise JoinError(f"{request.device} is approved no more")
        return certificate

    def _approve(self, request: JoinRequest, digest: str) -> bool:
        """Approve a device by its claim, which is used up, or look up the operator's decision; False if it must wait.

        Raises:
            JoinError: The device is refused.
            IdentityError: The authority would issue no certificate; the claim stays unused.
        """
        if request.site != self._identity.site:
            raise JoinError(f"this server's site is {self._identity.site}", got=request.site)
        if request.device == SERVER_COMMON_NAME:
            raise JoinError(f"no device may be called {SERVER_COMMON_NAME!r}", hint="Choose another name.")
        now = self._identity.authority.now()
        if request.claim is not None:
            # Only for its errors: a claim must not be used up for a device that gets no certificate.
            self._identity.store.certificate(request, now)
            self._identity.store.use_claim(request, digest, now)
            return True
        status = self._identity.store.request_approval(request.device, request.key, now)
        if status not in (APPROVED, WAITING):
            raise JoinError(f"this key of {request.device} was revoked", hint="Let the board make a new one.")
        return status == APPROVED

    def _sign_answer(
        self, request: str, status: str, reason: str, certificate: str | None = None, server_key: str | None = None
    ) -> JoinAnswer:
        authority = self._identity.authority
        now, pem = authority.now(), authority.pem
        signature = authority.sign(signed_answer_bytes(request, status, reason, now, pem, certificate, server_key))
        return JoinAnswer(request, status, reason, now, pem, certificate, server_key, signature.hex())
