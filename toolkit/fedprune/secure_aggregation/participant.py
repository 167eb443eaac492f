"""A board's side of a secure sum.

    participant = Participant(session, name, identity, directory)
    to_server = participant.advertise()
    to_server = participant.share(roster)
    to_server = participant.mask(delivery, vector)
    to_server = participant.unmask(survivors)

With x its vector, p its own mask and p_j the mask of the pair with neighbour j, a board sends

    y = x + p + Σ_{j after it} p_j − Σ_{j before it} p_j

over the neighbours that have shared, by name (Bonawitz et al. 2017, Sec. 4).
"""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.core.errors import ProtocolError
from fedprune.secure_aggregation.keys import SHARE_BYTES, Advertisement, BoardKeys, own_mask_key, split_secret
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.messages import decode_bits, decode_delivery, decode_roster
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.wire.topics import check_device


class Participant:
    """A board in one secure sum, from its keys to the shares that it hands out.

    Every message of the server is answered once; the same message again gets the same answer, and a different one is
    refused. Its secrets are never stored: a board that restarts has dropped out. Other boards know it by the key
    `identity`. It trusts their identity keys in `directory`, which therefore come from where the server of the sum
    can't change them.
    """

    def __init__(
        self, session: SecureSumSession, name: str, identity: SigningKey, directory: Mapping[str, VerifyingKey]
    ) -> None:
        self._session, self._name, self._directory = session, check_device(name), directory
        self._keys = BoardKeys()
        self._advertisement = self._keys.advertise(session, name, identity)
        self._neighbours: dict[str, Advertisement] = {}
        self._received_shares: dict[str, bytes] | None = None
        self._answers: dict[str, tuple[bytes, bytes]] = {}

    def advertise(self) -> bytes:
        return self._advertisement.to_bytes()

    def share(self, roster: bytes) -> bytes:
        """Shares of the board's secrets for its neighbours. Raises `SignatureError` if a neighbour's keys are not
        signed by its identity key for this sum; `ProtocolError` if the roster is damaged, has too few neighbours, one
        whose identity key the board doesn't know or an invalid key, or differs from an earlier one."""
        former_answer = self._former_answer("roster", roster)
        if former_answer is not None:
            return former_answer
        neighbours = decode_roster(roster, self._session)
        for name, advertisement in neighbours.items():
            key = self._directory.get(name)
            if key is None or name == self._name:
                raise ProtocolError(
                    "neighbour in a roster", expected="another board whose identity key is known", got=name
                )
            # The server passes keys on: only a neighbour's own signature shows that it hasn't replaced them.
            advertisement.verify(self._session, name, key)
        holders, threshold = len(neighbours), self._session.threshold
        pairs = zip(
            split_secret(self._keys.seed, holders, threshold),
            split_secret(self._keys.mask_secret, holders, threshold),
            strict=True,
        )
        answer = b"".join(
            self._keys.seal_shares(self._session, self._name, name, advertisement, seed + mask)
            for (name, advertisement), (seed, mask) in zip(neighbours.items(), pairs, strict=True)
        )
        self._neighbours = neighbours
        return self._record_answer("roster", roster, answer)

    def mask(self, delivery: bytes, vector: Vector) -> bytes:
        """The board's vector, masked in place. Raises `ProtocolError` if shares are damaged or too few, the vector has
        another size, or it isn't the time: a second vector under the same masks would give away the difference."""
        if not self._neighbours or self._received_shares is not None:
            raise ProtocolError("a delivery of shares", expected="one, after the roster", got="another")
        if (vector.narrow.size, vector.wide.size) != (self._session.narrow, self._session.wide):
            raise ProtocolError("bytes of a vector", expected=self._session.size, got=len(vector.to_bytes()))
        sealed = decode_delivery(delivery, tuple(self._neighbours), self._session)
        received, keys = {}, {}
        for name, raw in sealed.items():
            advertisement = self._neighbours[name]
            received[name] = self._keys.open_shares(self._session, self._name, name, advertisement, raw)
            keys[name] = self._keys.mask_key(self._session, self._name, name, advertisement)
        # Set before any mask is added: from here on a second vector is refused.
        self._received_shares = received
        vector.add_mask(own_mask_key(self._session, self._name, self._keys.seed))
        for name, key in keys.items():
            vector.add_mask(key, negative=name < self._name)
        return vector.to_bytes()

    def unmask(self, survivors: bytes) -> bytes:
        """For every neighbour that has shared one share: of its seed if its vector has arrived, else of its mask key.
        Raises `ProtocolError` if too few survived, a survivor had not shared, the board itself has not sent its vector,
        or other survivors were named before: both shares of a board would unmask its update."""
        former_answer = self._former_answer("survivors", survivors)
        if former_answer is not None:
            return former_answer
        if self._received_shares is None:
            raise ProtocolError("survivors of a secure sum", expected="a delivery of shares before", got="none")
        alive = decode_bits(survivors, tuple(self._neighbours), self._session, "neighbours that survived")
        # Of one that had not shared there is nothing to answer with, and no honest server names it.
        strangers = set(alive) - set(self._received_shares)
        if strangers:
            raise ProtocolError("survivors of a secure sum", expected="boards that had shared", got=min(strangers))
        answer = b"".join(
            shares[:SHARE_BYTES] if name in alive else shares[SHARE_BYTES:]
            for name, shares in self._received_shares.items()
        )
        return self._record_answer("survivors", survivors, answer)

    def _former_answer(self, what: str, message: bytes) -> bytes | None:
        former_message, answer = self._answers.get(what, (message, None))
        if former_message != message:
            raise ProtocolError(f"{what} of a secure sum", expected="the same as before", got="a different message")
        return answer

    def _record_answer(self, what: str, message: bytes, answer: bytes) -> bytes:
        self._answers[what] = (message, answer)
        return answer
