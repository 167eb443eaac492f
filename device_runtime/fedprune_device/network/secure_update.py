"""The board's side of a secure sum: the server learns the sum of several boards' updates, but no single one.

Each board masks its update with random numbers that cancel out in the sum (`fedprune.secure_aggregation`). The server
leads through the steps: keys, roster and shares, delivery of the shares, the masked update, and unmasking.
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ProtocolError
from fedprune.model.recipe import Recipe
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.messages import decode_roster
from fedprune.secure_aggregation.participant import Participant
from fedprune.secure_aggregation.session import SecureSumSession, task_digest
from fedprune.secure_aggregation.vector_form import MaskedForm
from fedprune.security.keys import KEY_BYTES, VerifyingKey
from fedprune.wire.messages import Offer, SecureStep, TrainingDone, UpdateAnnouncement
from fedprune_device.network.backoff import Backoff
from fedprune_device.network.connection import BoardConnection
from fedprune_device.network.offer_checks import attempt_of
from fedprune_device.network.uplink import Uplink

_LOG = logging.getLogger("fedprune.device")


class SecureUpdate:
    """The update of the current offer, in memory only: a board that restarts has dropped out of the sum.

    The board repeats its last message until the server answers with the next step. A server that begins another
    sum (it has restarted, or too many boards had dropped out) ends this board's part in the one before: its secrets are
    gone, and the next ones are new.
    """

    def __init__(self, connection: BoardConnection, uplink: Uplink, blobs: BlobStore) -> None:
        self._connection, self._uplink, self._blobs = connection, uplink, blobs
        self._update: UpdateAnnouncement | None = None
        self._vector = b""
        self._value_counts, self._task = (0, 0), ""  # numbers of 32 and of 64 bits in the vector
        self._backoff = Backoff()
        self._last_message: TrainingDone | SecureStep | None = None
        self._participation: _Participation | None = None
        self._abandoned_sums: set[str] = set()

    @property
    def is_waiting(self) -> bool:
        return self._update is not None

    @property
    def sum_id(self) -> str:
        """The number of the sum that the board takes part in; empty for none."""
        return "" if self._participation is None else self._participation.sum_id

    @staticmethod
    def check(offer: Offer) -> None:
        """Raise `ProtocolError` if an offer's form of the update can't be used, or its recipe says otherwise."""
        if offer.secure is not None:
            MaskedForm.from_json(offer.secure)
        if (masked := Recipe.from_dict(offer.recipe).secure_aggregation) != (offer.secure is not None):
            raise ProtocolError(
                "offer: secure",
                expected="present" if masked else "absent, as the recipe has no secure_aggregation",
                got="none" if offer.secure is None else "present",
            )

    def keep(self, offer: Offer, update: UpdateAnnouncement, now: float) -> None:
        """Keep a trained update, which is not masked yet, until the server has the sum; may raise `StorageError`."""
        self.drop()
        form = MaskedForm.from_json(offer.secure)
        self._vector = self._blobs.read(update.weights.sha256)
        self._value_counts = form.narrow, form.wide
        self._task = task_digest(offer.selection, offer.weights.sha256, offer.recipe, offer.secure or {})
        self._update = update
        self._announce_trained(now)

    def renumber(self, attempt: int, now: float) -> None:
        """Continue with another attempt at the same offer, in another sum."""
        if self._update is not None:
            self._update = replace(self._update, attempt=attempt)
            self._announce_trained(now)

    def drop(self) -> None:
        """Forget the update and all secrets of its sum."""
        self._update, self._vector, self._last_message, self._participation = None, b"", None, None
        self._abandoned_sums.clear()

    def resend_now(self, now: float) -> None:
        """Repeat the last message at the next turn: the server or the connection is new."""
        self._backoff.restart(now)

    def turn(self, now: float) -> None:
        if self._last_message is not None and self._backoff.take_if_due(now):
            self._uplink.send(self._last_message, self._last_message.job)

    def receive(self, message: SecureStep, now: float) -> UpdateAnnouncement | None:
        """Carry out the server's next step of the sum. Returns the masked update when it is to be announced.

        Raises:
            ProtocolError: The message is damaged or breaks the protocol's rules.
            SignatureError: A neighbour's keys are not its own.
            StorageError: The masked vector can't be written.
        """
        update = self._update
        if update is None or attempt_of(message) != attempt_of(update):
            return None
        if message.step == "session" and message.sum not in self._abandoned_sums:
            self._join_sum(message, now)
            return None
        participation = self._participation
        if participation is None or message.sum != participation.sum_id:
            return None
        match message.step:
            case "roster":
                self._send_step(message, "shares", participation.share(message.content), now)
            case "delivery" if not participation.is_masked:
                self._last_message = None  # the update is announced from now on
                masked = participation.mask(message.content, self._vector)
                return replace(update, weights=self._blobs.put(masked))
            case "survivors":
                self._send_step(message, "unmasking", participation.participant.unmask(message.content), now)
                self._last_message = None  # not repeated: the server asks again while the update is announced
        return None

    def _announce_trained(self, now: float) -> None:
        """Report to the server that the update is ready for a sum."""
        update = self._update
        if update is None:
            return
        self._participation = None
        self._last_message = TrainingDone(
            update.device, *attempt_of(update), update.base, update.samples, update.steps, metrics=update.metrics
        )
        self._backoff.restart(now)

    def _join_sum(self, message: SecureStep, now: float) -> None:
        key = self._connection.channel.signing_key
        if self._participation is None or self._participation.sum_id != message.sum:
            session = SecureSumSession.from_bytes(message.content)
            if (session.narrow, session.wide) != self._value_counts:
                got = f"{session.narrow} and {session.wide}"
                raise ProtocolError(
                    "numbers of a secure sum", expected="{} and {}".format(*self._value_counts), got=got
                )
            if session.task != self._task:
                raise ProtocolError(
                    "what the boards of a secure sum are asked for",
                    expected="the same of all",
                    got="something else of this board",
                    hint="If others sent less, the sum would be this board's update. Update the server and its boards.",
                )
            if self._participation is not None:
                self._abandoned_sums.add(self._participation.sum_id)
                _LOG.info("round %d of job %s: the secure sum begins again", message.round, message.job)
            directory: dict[str, VerifyingKey] = {}  # the participant verifies neighbours with it; `share` fills it
            participant = Participant(session, self._connection.device, key, directory)
            self._participation = _Participation(message.sum, session, directory, participant)
        self._send_step(message, "keys", key.verifying_key.raw + self._participation.participant.advertise(), now)

    def _send_step(self, message: SecureStep, step: str, content: bytes, now: float) -> None:
        self._last_message = SecureStep.of(message.job, message.round, message.attempt, message.sum, step, content)
        self._backoff.restart(now)
        self.turn(now)


class _Participation:
    """The board's state in one sum: its secrets, and the identity keys of its neighbours by their names."""

    def __init__(
        self, sum_: str, session: SecureSumSession, directory: dict[str, VerifyingKey], participant: Participant
    ) -> None:
        self.sum_id, self.participant, self.is_masked = sum_, participant, False
        self._session, self._directory = session, directory

    def share(self, content: bytes) -> bytes:
        """The shares for the neighbours, whose identity keys the server names with the first roster."""
        keys_end = 2 + KEY_BYTES * int.from_bytes(content[:2], "big")
        keys, roster = content[2:keys_end], content[keys_end:]
        names = tuple(decode_roster(roster, self._session))
        if len(keys) != KEY_BYTES * len(names):
            raise ProtocolError("identity keys of neighbours", expected=len(names), got=f"{len(keys)} bytes")
        for index, name in enumerate(names):
            self._directory.setdefault(name, VerifyingKey(keys[KEY_BYTES * index : KEY_BYTES * (index + 1)]))
        return self.participant.share(roster)

    def mask(self, delivery: bytes, vector: bytes) -> bytes:
        masked = self.participant.mask(delivery, Vector.from_bytes(vector, self._session).copy())
        self.is_masked = True
        return masked
