"""A cohort of boards and a server that carry out a secure sum in one process, and what the server saw of it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from fedprune.secure_aggregation.collector import Collector
from fedprune.secure_aggregation.keys import join_shares, own_mask_key, pair_mask_key, restored_mask_key
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.messages import decode_bits, decode_roster, decode_unmasking
from fedprune.secure_aggregation.participant import Participant
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.security.keys import SigningKey, VerifyingKey

IDENTITIES = {f"b{i:03}": SigningKey.make() for i in range(120)}
DIRECTORY: dict[str, VerifyingKey] = {name: key.verifying_key for name, key in IDENTITIES.items()}
NAMES = tuple(IDENTITIES)

STEPS = ("advertise", "share", "mask", "unmask")


@dataclass
class Transcript:
    """All messages of a secure sum, by step and board: from the boards, and to them."""

    answers: dict[str, dict[str, bytes]] = field(default_factory=lambda: {step: {} for step in STEPS})
    requests: dict[str, dict[str, bytes]] = field(default_factory=lambda: {step: {} for step in STEPS})


class MaskedCohort:
    """Boards and a server; `carry_out` runs the steps. Randomness of the keys is real."""

    def __init__(self, session: SecureSumSession, names: Sequence[str], seed: int = 0) -> None:
        self.session = session
        self.boards = {n: Participant(session, n, IDENTITIES[n], DIRECTORY) for n in names}
        self.collector = Collector(session, DIRECTORY, Random(seed))
        self.transcript = Transcript()

    def carry_out(self, vectors: Mapping[str, Vector], absent: Mapping[str, Collection[str]] | None = None) -> Vector:
        """The sum; `absent` is which boards drop out at each step, before they answer."""
        left = set(self.boards)
        gone = absent or {}
        requests: Mapping[str, bytes] = dict.fromkeys(left, b"")
        take: dict[str, tuple[Callable[[str, bytes], None], Callable[[], Mapping[str, bytes]] | None]] = {
            "advertise": (self.collector.add_advertisement, self.collector.rosters),
            "share": (self.collector.add_shares, self.collector.deliveries),
            "mask": (self.collector.add_masked, self.collector.survivors),
            "unmask": (self.collector.add_unmasking, None),
        }
        for step in STEPS:
            self.transcript.requests[step] = dict(requests)
            left -= set(gone.get(step, ()))
            add, end = take[step]
            for name in sorted(left & set(requests)):
                answer = self._answer(step, name, requests[name], vectors[name])
                self.transcript.answers[step][name] = answer
                add(name, answer)
            if end is not None:
                requests = end()
        return self.collector.total()

    def _answer(self, step: str, name: str, request: bytes, vector: Vector) -> bytes:
        board = self.boards[name]
        if step == "advertise":
            return board.advertise()
        if step == "share":
            return board.share(request)
        return board.mask(request, vector.copy()) if step == "mask" else board.unmask(request)


def draw_vector(session: SecureSumSession, seed: int) -> Vector:
    """A vector of numbers of the whole range."""
    random = np.random.default_rng(seed)
    return Vector(
        random.integers(0, 2**32, session.narrow, np.uint32), random.integers(0, 2**64, session.wide, np.uint64)
    )


def plain_sum(vectors: Collection[Vector], session: SecureSumSession) -> Vector:
    """The sum without masks."""
    total = Vector.zeros(session)
    for vector in vectors:
        total.add(vector)
    return total


class ServerView:
    """The parts of single vectors that a server which follows the protocol can compute from a transcript.

    Attributes:
        graph: Neighbours by board, of those that got a roster.
        shared: Boards that had shared their secrets.
        seeds: Boards whose own mask is known.
        mask_keys: Boards whose mask key is known.
    """

    def __init__(self, session: SecureSumSession, transcript: Transcript) -> None:
        self.session = session
        rosters = {n: decode_roster(raw, session) for n, raw in transcript.requests["share"].items()}
        self.keys = {name: keys for roster in rosters.values() for name, keys in roster.items()}
        self.graph = {name: tuple(roster) for name, roster in rosters.items()}
        self.shared = set(transcript.answers["share"])
        self.arrived = {n: Vector.from_bytes(raw, session).copy() for n, raw in transcript.answers["mask"].items()}
        self.seed_shares: dict[str, dict[int, bytes]] = {}
        self.key_shares: dict[str, dict[int, bytes]] = {}
        for holder, raw in transcript.answers["unmask"].items():
            around = self.graph[holder]
            alive = decode_bits(transcript.requests["unmask"][holder], around, session, "survivors")
            for owner, share in decode_unmasking(raw, [n for n in around if n in self.shared]).items():
                kind = self.seed_shares if owner in alive else self.key_shares
                kind.setdefault(owner, {})[self.graph[owner].index(holder) + 1] = share
        threshold = session.threshold
        self.seeds = {n: join_shares(s, threshold) for n, s in self.seed_shares.items() if len(s) >= threshold}
        self.mask_keys = {n: join_shares(s, threshold) for n, s in self.key_shares.items() if len(s) >= threshold}

    def links(self, board: str) -> list[str]:
        """The neighbours with which a board has a mask that the server can't compute."""
        if board in self.mask_keys:
            return []
        return [n for n in self.graph[board] if n in self.shared and n not in self.mask_keys]

    def revealed_groups(self) -> list[set[str]]:
        """The groups of boards whose sums the server can compute: all of their masks are known, or cancel."""
        groups, waiting = [], set(self.shared)
        while waiting:
            group, reached = set(), [waiting.pop()]
            while reached:
                board = reached.pop()
                group.add(board)
                neighbours = [n for n in self.links(board) if n in waiting]
                waiting -= set(neighbours)
                reached += neighbours
            if all(n in self.arrived and n in self.seeds for n in group):
                groups.append(group)
        return groups

    def unmasked_vector(self, board: str) -> Vector:
        """A board's vector without the masks that the server can compute."""
        out = self.arrived[board].copy()
        if board in self.seeds:
            out.add_mask(own_mask_key(self.session, board, self.seeds[board]), negative=True)
        for neighbour in self.graph[board]:
            if neighbour in self.mask_keys:
                secret = restored_mask_key(self.mask_keys[neighbour], self.keys[neighbour].mask)
                key = pair_mask_key(self.session, secret, neighbour, board, self.keys[board].mask)
                out.add_mask(key, negative=neighbour > board)
        return out
