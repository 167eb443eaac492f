"""The server's side of a secure sum.

    collector = Collector(session, directory)
    collector.add_advertisement(board, message)  # from each board
    collector.rosters()                          # for each of them
    collector.add_shares(board, message)
    collector.deliveries()
    collector.add_masked(board, message)
    collector.survivors()
    collector.add_unmasking(board, message)
    collector.total()

Each board masks its vector with its neighbours, and gives them shares of its secrets (`SecureSumSession` says who is
whose neighbour). The server ends each of the four steps when it likes; boards that haven't answered by then have
dropped out. If a board drops out after it has shared, its neighbours' shares restore its secret, so that its masks can
be taken out of the sum. Boards that drop out earlier have no part in the sum.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping
from random import Random

from fedprune.core.errors import ProtocolError
from fedprune.secure_aggregation.keys import (
    SEALED_BYTES,
    Advertisement,
    commitment_to,
    join_shares,
    own_mask_key,
    pair_mask_key,
    restored_mask_key,
)
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.messages import (
    decode_unmasking,
    encode_bits,
    encode_delivery,
    encode_roster,
    split_bytes,
)
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.security.keys import VerifyingKey


class FalseSharesError(ProtocolError):
    """Shares of a board's secret don't fit: it has sent wrong ones, or those who hold them have."""


_ADVERTISE, _SHARE, _MASK, _UNMASK, _END = "advertisement", "shares", "masked vector", "unmasking", ""
_STEPS = (_ADVERTISE, _SHARE, _MASK, _UNMASK, _END)


class Collector:
    """The sum of a cohort's masked vectors, which are added as they arrive: memory is that of one vector.

    `add_...` raises `ProtocolError` for a message that is damaged, of another step, of a board that has dropped out, or
    different from the board's earlier one; the same one again is ignored. The methods that end a step raise it if too
    few boards are left: then the sum is lost, and the next attempt needs a new session. `directory` has the boards'
    identity keys, `random` decides which boards are neighbours.
    """

    def __init__(
        self, session: SecureSumSession, directory: Mapping[str, VerifyingKey], random: Random | None = None
    ) -> None:
        self._session, self._directory = session, directory
        self._random = random or secrets.SystemRandom()
        self._step = _ADVERTISE
        self._digests_of_step: dict[str, dict[str, bytes]] = {step: {} for step in _STEPS}
        self._keys: dict[str, Advertisement] = {}
        self._neighbours: dict[str, tuple[str, ...]] = {}
        self._sealed_shares: dict[str, dict[str, bytes]] = {}
        self._shares: dict[str, dict[str, bytes]] = {}
        self._sum = Vector.zeros(session)

    @property
    def boards(self) -> tuple[str, ...]:
        """The boards whose vectors are in the sum."""
        return tuple(sorted(self._digests_of_step[_MASK]))

    def add_advertisement(self, board: str, message: bytes) -> None:
        """Raises `SignatureError` if the board's identity key has not signed it. A key of small order is refused."""
        if not self._is_new(_ADVERTISE, board, message, self._directory):
            return
        keys = Advertisement.from_bytes(message)
        keys.verify(self._session, board, self._directory[board])
        # Verified before it is stored: a board that is refused can send its right advertisement later.
        self._keys[board] = keys
        self._record_message(board, message)

    def rosters(self) -> dict[str, bytes]:
        """End the step of keys: each board's message."""
        self._end_step(_ADVERTISE)
        self._neighbours = self._session.neighbours(tuple(self._keys), self._random)
        return {b: encode_roster({n: self._keys[n] for n in neighbours}) for b, neighbours in self._neighbours.items()}

    def add_shares(self, board: str, message: bytes) -> None:
        if not self._is_new(_SHARE, board, message, self._neighbours):
            return
        neighbours = self._neighbours[board]
        self._sealed_shares[board] = dict(
            zip(neighbours, split_bytes(message, SEALED_BYTES, len(neighbours), "sealed shares"), strict=True)
        )
        self._record_message(board, message)

    def deliveries(self) -> dict[str, bytes]:
        """End the step of shares: each remaining board's message."""
        self._end_step(_SHARE)
        self._check_remaining(self._sealed_shares, self._sealed_shares)
        return {
            board: encode_delivery(
                self._neighbours[board],
                {n: self._sealed_shares[n][board] for n in self._neighbours[board] if n in self._sealed_shares},
            )
            for board in self._sealed_shares
        }

    def add_masked(self, board: str, message: bytes) -> None:
        if not self._is_new(_MASK, board, message, self._sealed_shares):
            return
        # Added on arrival and not kept: memory would grow with the cohort. So a board can't be taken out of the sum
        # later.
        self._sum.add(Vector.from_bytes(message, self._session))
        self._record_message(board, message)

    def survivors(self) -> dict[str, bytes]:
        """End the step of masked vectors: each remaining board's message."""
        self._end_step(_MASK)
        survivors = self._digests_of_step[_MASK]
        self._check_remaining(self._boards_to_restore(), survivors)
        return {board: encode_bits(self._neighbours[board], survivors) for board in survivors}

    def add_unmasking(self, board: str, message: bytes) -> None:
        if not self._is_new(_UNMASK, board, message, self._digests_of_step[_MASK]):
            return
        owners = [name for name in self._neighbours[board] if name in self._sealed_shares]
        for owner, share in decode_unmasking(message, owners).items():
            self._shares.setdefault(owner, {})[board] = share
        self._record_message(board, message)

    @property
    def is_ready(self) -> bool:
        """Whether enough boards have answered for `total`."""
        threshold = self._session.threshold
        return self._step == _UNMASK and all(
            len(self._shares.get(b, ())) >= threshold for b in self._boards_to_restore()
        )

    def total(self) -> Vector:
        """The sum of the vectors of `boards`. Raises `ProtocolError`, which names a board, if too few shares of its
        secret have arrived or some are false."""
        self._end_step(_UNMASK)
        self._check_remaining(self._boards_to_restore(), self._digests_of_step[_UNMASK])
        survivors = self._digests_of_step[_MASK]
        # All keys first: if a board's shares are false, the sum stays as it is.
        masks = [key for board in self._boards_to_restore() for key in self._mask_keys(board, survivors)]
        for key, negative in masks:
            self._sum.add_mask(key, negative=negative)
        return self._sum

    def _boards_to_restore(self) -> tuple[str, ...]:
        """The boards of which a secret must be restored: survivors, and others with whom survivors have masked."""
        survivors = self._digests_of_step[_MASK]
        return tuple(b for b in self._sealed_shares if not survivors.keys().isdisjoint((b, *self._neighbours[b])))

    def _mask_keys(self, board: str, survivors: Collection[str]) -> list[tuple[bytes, bool]]:
        """The keys of masks that a board's restored secret gives, and whether to subtract them."""
        neighbours, keys = self._neighbours[board], self._keys[board]
        shares = {neighbours.index(holder) + 1: share for holder, share in self._shares[board].items()}
        try:
            secret = join_shares(shares, self._session.threshold)
            if board in survivors:
                # A wrong seed would subtract a wrong mask, and leave a sum of noise.
                if commitment_to(self._session, board, secret) != keys.commitment:
                    raise ProtocolError("restored seed", expected="the board's own", got="another one")
                return [(own_mask_key(self._session, board, secret), True)]
            key = restored_mask_key(secret, keys.mask)
        except ProtocolError as error:
            raise FalseSharesError(
                f"shares of a secret of {board} are false ({error})",
                hint="The board or one of its neighbours has sent wrong ones. Repeat the round.",
            ) from error
        # What a survivor has added with this board is subtracted, and the other way round.
        return [
            (pair_mask_key(self._session, key, board, n, self._keys[n].mask), board > n)
            for n in neighbours
            if n in survivors
        ]

    def _check_remaining(self, boards: Collection[str], remaining_boards: Collection[str]) -> None:
        """Make sure that enough neighbours of each board remain to restore its secret. Raises `ProtocolError`, and ends
        the sum, if one has too few, or no board remains."""
        for board in boards:
            remaining = sum(n in remaining_boards for n in self._neighbours[board])
            if remaining < self._session.threshold:
                self._step = _END
                raise ProtocolError(
                    f"neighbours of {board} that are left in a secure sum",
                    expected=f"{self._session.threshold} or more",
                    got=remaining,
                    hint="Too many boards have dropped out. Repeat the round.",
                )
        if not remaining_boards:
            self._step = _END
            raise ProtocolError(
                "boards that are left in a secure sum", expected="some", got=0, hint="Repeat the round."
            )

    def _is_new(self, step: str, board: str, message: bytes, members: Collection[str]) -> bool:
        """Whether a board's message of a step is new. Raises `ProtocolError` if it may not come, or differs from an
        earlier one."""
        if board not in members:
            raise ProtocolError(f"{step} for a secure sum", expected="a board that takes part", got=board)
        former_digest = self._digests_of_step[step].get(board)
        if former_digest is not None:
            if former_digest != hashlib.sha256(message).digest():
                raise ProtocolError(f"{step} of {board}", expected="the same as before", got="a different message")
            return False
        if step != self._step:
            raise ProtocolError(
                f"{step} of {board}", expected=self._step or "nothing more", got="another step's message"
            )
        return True

    def _record_message(self, board: str, message: bytes) -> None:
        # By digest: a masked vector is as large as a model.
        self._digests_of_step[self._step][board] = hashlib.sha256(message).digest()

    def _end_step(self, step: str) -> None:
        if step != self._step:
            raise ProtocolError(f"end of the step of the {step}", expected=self._step or "nothing more", got=step)
        self._step = _STEPS[_STEPS.index(step) + 1]
