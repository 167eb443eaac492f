"""Messages of a board to its server: signs of life, progress, refusals and requests for the blobs of an offer.

The finished update is sent by `network.update_sender`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.core.text import one_line
from fedprune.wire.lost_pieces import LostPieces, dropping_broker_message
from fedprune.wire.messages import Alive, BlobRequest, Message, Offer, Refusal, RoundProgress
from fedprune.wire.request_numbers import with_request_number
from fedprune.wire.topics import NO_JOB
from fedprune_device.hardware.readings import temperature_c
from fedprune_device.network.board_status import BoardStatus
from fedprune_device.network.connection import BoardConnection
from fedprune_device.privacy.redaction import refusal_reason

_LOG = logging.getLogger("fedprune.device")

PROGRESS_INTERVAL_S = 1.0  # between two reports of progress
# Seconds of silence after which a board sends a sign of life: its broker may not report when it is gone.
ALIVE_INTERVAL_S = 300.0

_MAX_REASON_LENGTH = 4000


class Uplink:
    """Sends messages, and shows other threads in `status` what the board works on."""

    def __init__(self, connection: BoardConnection, status: BoardStatus | None = None) -> None:
        self._connection, self._device = connection, connection.device
        self.status = status or BoardStatus()
        self._lost_downloads = LostPieces()
        self._last_progress: tuple[str, int, int] | None = None
        self._next_progress_at = 0.0
        self._has_sent = True  # since `_quiet_since`
        self._quiet_since = 0.0
        self._refused_offer: Offer | None = None
        self._refusal: Refusal | None = None

    def send(self, message: Message, job: str = NO_JOB, qos: int = 1) -> None:
        self._has_sent = True
        self._connection.send(message, job, qos)

    def request_chunks(self, job: str, requests: Iterable[BlobRequest]) -> None:
        for request in requests:
            if self._lost_downloads.note_request(request, self._connection.clock()):
                advice = dropping_broker_message("what the server sends")
                _LOG.warning("no piece of blob %s comes: the server is slow, or %s", request.sha256[:12], advice)
            self.send(with_request_number(request), job)

    def report_progress(self, offer: Offer, status: tuple[str, int, int], now: float) -> None:
        """Report an offer's progress (phase, units done, units in all) if it has changed, at most once a second."""
        self.status.set_working(offer, status)
        if now < self._next_progress_at or status == self._last_progress:
            return
        self._last_progress, self._next_progress_at = status, now + PROGRESS_INTERVAL_S
        phase, done, total = status
        self.send(
            RoundProgress(self._device, offer.job, offer.round, offer.attempt, phase, done, total, temperature_c()),
            offer.job,
            qos=0,
        )

    def repeat_progress(self) -> None:
        """Let the next report of progress be sent, though nothing may have changed: the server repeats its offer to a
        board of which it sees nothing."""
        self._last_progress, self._next_progress_at = None, 0.0

    def send_alive(self, session: int, now: float) -> None:
        """Send a sign of life after minutes of silence."""
        if not self._has_sent and now - self._quiet_since >= ALIVE_INTERVAL_S:
            self.send(Alive(self._device, session), qos=0)
        if self._has_sent:
            self._has_sent, self._quiet_since = False, now

    def refuse(self, offer: Offer, error: BaseException) -> None:
        code = error.exit_code if isinstance(error, FedpruneError) else ExitCode.INTERNAL
        reason = refusal_reason(error, private=False)  # the log stays on the board
        _LOG.warning("round %d of job %s: refused: %s", offer.round, offer.job, reason)
        self.status.set_failure(offer, one_line(reason, _MAX_REASON_LENGTH))
        self._refused_offer = offer
        sent_reason = one_line(refusal_reason(error, private=bool(offer.recipe.get("update_clip"))), _MAX_REASON_LENGTH)
        self._refusal = Refusal(self._device, offer.job, offer.round, offer.attempt, sent_reason, int(code))
        self.send(self._refusal, offer.job)

    def repeat_refusal(self, offer: Offer) -> bool:
        """Repeat the last refusal, if it was of this very offer; returns whether it was."""
        if self._refusal is None or self._refused_offer != offer:
            return False
        self.send(self._refusal, offer.job)
        return True

    def forget_refusal(self) -> None:
        """Forget the refused offer, which is no longer open: if it comes again, it is a new one."""
        self._refused_offer = self._refusal = None
