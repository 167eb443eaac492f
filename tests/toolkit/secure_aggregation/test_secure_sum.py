"""A secure sum is exact for any set of dropouts, or fails with a clear error, and reveals no single vector."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import FedpruneError, ProtocolError, SignatureError
from fedprune.secure_aggregation.keys import (
    ADVERTISEMENT_BYTES,
    SEALED_BYTES,
    SHARE_BYTES,
    pair_mask_key,
    restored_mask_key,
)
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.messages import encode_bits
from fedprune.secure_aggregation.participant import Participant
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.security.keys import transcript
from support.fakes.masked_cohort import (
    DIRECTORY,
    IDENTITIES,
    NAMES,
    STEPS,
    MaskedCohort,
    ServerView,
    draw_vector,
    plain_sum,
)

pytestmark = pytest.mark.board

SMALL = SecureSumSession(b"job 1, round 2", 4, 3, 5, 3)
SIX = NAMES[:6]


def same_vector(first: Vector, second: Vector) -> bool:
    return first.to_bytes() == second.to_bytes()


def vectors(session: SecureSumSession, names: Iterable[str], seed: int = 0) -> dict[str, Vector]:
    return {name: draw_vector(session, seed + i) for i, name in enumerate(names)}


@dataclass(frozen=True)
class Case:
    session: SecureSumSession
    names: tuple[str, ...]
    absent: dict[str, set[str]]
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any cohort of up to twelve boards on any circle, of which any drop out at any step."""
    half = draw(st.integers(1, 5))
    threshold = draw(st.integers(half + 1, 2 * half))
    names = NAMES[: draw(st.integers(threshold + 1, 12))]
    session = SecureSumSession(b"drawn", 2 * half, threshold, draw(st.integers(0, 3)), draw(st.integers(1, 3)))
    leaves = draw(st.sampled_from([0, 1, 1, 2, 3, 12]))
    absent: dict[str, set[str]] = {step: set() for step in STEPS}
    for name in draw(st.permutations(names))[:leaves]:
        absent[draw(st.sampled_from(STEPS))].add(name)
    return Case(session, names, absent, draw(st.integers(0, 1000)))


def enough(view: ServerView, case: Case, arrived: set[str], answered: set[str]) -> bool:
    """Whether by the rules of the protocol a sum can be made: worked out from who was there alone."""
    threshold, graph = case.session.threshold, view.graph

    def has_enough(board: str, some: set[str]) -> bool:
        return sum(n in some for n in graph[board]) >= threshold

    needed = {b for b in view.shared if b in arrived or set(graph[b]) & arrived}
    return (
        bool(arrived)
        and all(has_enough(b, view.shared) for b in view.shared)
        and all(has_enough(b, arrived) and has_enough(b, answered) for b in needed)
    )


@given(cases())
@settings(deadline=None, max_examples=150)
def test_the_sum_is_the_survivors_or_there_is_none(case: Case) -> None:
    cohort = MaskedCohort(case.session, case.names, case.seed)
    inputs = vectors(case.session, case.names, case.seed)
    there, present = set(case.names), {}
    for step in STEPS:
        there -= case.absent[step]
        present[step] = set(there)
    if len(present["advertise"]) <= case.session.threshold:
        with pytest.raises(ProtocolError, match="boards of a secure sum"):
            cohort.carry_out(inputs, case.absent)
        assert not cohort.transcript.answers["mask"]
        return
    total, lost = None, ""
    try:
        total = cohort.carry_out(inputs, case.absent)
    except ProtocolError as error:
        lost = str(error)
    view = ServerView(case.session, cohort.transcript)
    # Where a circle fell apart, sums of its parts may be known; a part is never a single board.
    assert all(len(group) > case.session.threshold for group in view.revealed_groups())
    if not enough(view, case, present["mask"], present["unmask"]):
        assert total is None
        assert "left in a secure sum" in lost
        return
    assert total is not None, lost
    assert cohort.collector.boards == tuple(sorted(present["mask"]))
    assert same_vector(total, plain_sum([inputs[n] for n in present["mask"]], case.session))
    if len(present["advertise"] - present["mask"]) < case.session.degree:
        assert view.revealed_groups() == [present["mask"]]


# What the server's transcript tells


@given(st.integers(0, 1000), st.sets(st.sampled_from(SIX), max_size=1), st.sampled_from(["share", "mask", "unmask"]))
@settings(deadline=None, max_examples=30)
def test_every_other_input_with_the_same_sum_explains_the_transcript(seed: int, gone: set[str], step: str) -> None:
    """For a transcript and any other vectors of the same sum there are masks that give the very same transcript."""
    cohort = MaskedCohort(SMALL, SIX, seed)
    inputs = vectors(SMALL, SIX, seed)
    total = cohort.carry_out(inputs, {step: gone})
    view, boards = ServerView(SMALL, cohort.transcript), cohort.collector.boards
    alternative_inputs = vectors(SMALL, boards, seed + 5000)
    rest = plain_sum([alternative_inputs[n] for n in boards[:-1]], SMALL)
    alternative_inputs[boards[-1]] = Vector(total.narrow - rest.narrow, total.wide - rest.wide)
    # What is left of each vector once the known masks are taken off: the input and masks of pairs of survivors.
    hidden = {name: view.unmasked_vector(name) for name in boards}
    assert all(not same_vector(hidden[name], inputs[name]) for name in boards)
    masks = _explaining(hidden, alternative_inputs, view)
    for name in boards:
        remasked = alternative_inputs[name].copy()
        for (first, second), mask in masks.items():
            if name == first:
                remasked.add(mask)
            elif name == second:
                remasked.narrow -= mask.narrow
                remasked.wide -= mask.wide
        assert same_vector(remasked, hidden[name])


def _explaining(
    hidden: dict[str, Vector], alternative_inputs: dict[str, Vector], view: ServerView
) -> dict[tuple[str, str], Vector]:
    """Masks of pairs that the server doesn't know, along a tree: each board's makes up for what its input changes."""
    root = min(hidden)
    above, order = {root: root}, [root]
    for board in order:
        for neighbour in view.links(board):
            if neighbour in hidden and neighbour not in above:
                above[neighbour] = board
                order.append(neighbour)
    assert set(above) == set(hidden)
    owed = {
        n: Vector(hidden[n].narrow - alternative_inputs[n].narrow, hidden[n].wide - alternative_inputs[n].wide)
        for n in hidden
    }
    masks = {}
    for board in reversed(order[1:]):
        masks[board, above[board]] = owed[board]
        owed[above[board]] = owed[above[board]].copy()
        owed[above[board]].add(owed[board])
    assert same_vector(owed[root], Vector.zeros(view.session))
    return masks


def test_masked_vectors_look_uniform_and_independent_of_what_is_masked() -> None:
    session = SecureSumSession(b"uniform", 4, 3, 40_000, 20_000)
    nothing = {name: Vector.zeros(session) for name in SIX}
    first, second = MaskedCohort(session, SIX), MaskedCohort(session, SIX)
    for cohort in (first, second):
        assert same_vector(cohort.carry_out(nothing), Vector.zeros(session))
    for name in SIX:
        first_vector, second_vector = (
            np.frombuffer(cohort.transcript.answers["mask"][name], np.uint8) for cohort in (first, second)
        )
        for sent in (first_vector, second_vector, first_vector - second_vector):
            counts = np.bincount(sent, minlength=256)
            expected = sent.size / 256
            # χ² of 255 degrees of freedom exceeds 435, eight deviations, with a probability below 10^-10.
            assert float(((counts - expected) ** 2).sum() / expected) < 435


def test_an_own_mask_stays_when_a_vector_comes_too_late() -> None:
    """A board counts as dropped out, its mask key is restored, and then its vector arrives: its seed is not known."""
    cohort = MaskedCohort(SMALL, SIX)
    late, inputs = SIX[2], vectors(SMALL, SIX)
    total = cohort.carry_out(inputs, {"mask": {late}})
    sent = cohort.boards[late].mask(cohort.transcript.requests["mask"][late], inputs[late].copy())
    with pytest.raises(ProtocolError, match=f"masked vector of {late}"):
        cohort.collector.add_masked(late, sent)
    assert same_vector(total, plain_sum([inputs[n] for n in SIX if n != late], SMALL))
    view = ServerView(SMALL, cohort.transcript)
    assert late in view.mask_keys
    assert late not in view.seeds
    vector = Vector.from_bytes(sent, SMALL).copy()
    secret = restored_mask_key(view.mask_keys[late], view.keys[late].mask)
    for neighbour in view.graph[late]:
        vector.add_mask(
            pair_mask_key(SMALL, secret, late, neighbour, view.keys[neighbour].mask), negative=neighbour > late
        )
    assert not same_vector(vector, inputs[late])


def test_no_board_hands_out_both_shares_of_another() -> None:
    cohort = MaskedCohort(SMALL, SIX)
    cohort.carry_out(vectors(SMALL, SIX))
    view = ServerView(SMALL, cohort.transcript)
    for name, board in cohort.boards.items():
        around = view.graph[name]
        asked = cohort.transcript.requests["unmask"][name]
        answer = cohort.transcript.answers["unmask"][name]
        assert board.unmask(asked) == answer
        assert len(answer) == SHARE_BYTES * len(around)  # one share for each neighbour
        for dropped in around:
            with pytest.raises(ProtocolError, match="the same as before"):
                board.unmask(encode_bits(around, set(around) - {dropped}))


# What boards refuse


def join_cohort() -> tuple[MaskedCohort, dict[str, bytes], dict[str, bytes]]:
    """A cohort after the step of keys: rosters, and what boards answered."""
    cohort = MaskedCohort(SMALL, SIX)
    for name, board in cohort.boards.items():
        cohort.collector.add_advertisement(name, board.advertise())
    rosters = cohort.collector.rosters()
    return cohort, rosters, {name: cohort.boards[name].share(raw) for name, raw in rosters.items()}


def test_keys_of_another_board_or_another_sum_are_refused() -> None:
    cohort, foreign_session = MaskedCohort(SMALL, SIX), SecureSumSession(b"job 1, round 3", 4, 3, 5, 3)
    advertised = {name: board.advertise() for name, board in cohort.boards.items()}
    with pytest.raises(SignatureError):
        cohort.collector.add_advertisement(SIX[0], advertised[SIX[1]])
    stale = Participant(foreign_session, SIX[0], IDENTITIES[SIX[0]], DIRECTORY).advertise()
    with pytest.raises(SignatureError):
        cohort.collector.add_advertisement(SIX[0], stale)
    with pytest.raises(ProtocolError, match="takes part"):
        cohort.collector.add_advertisement("stranger", advertised[SIX[0]])
    _, rosters, _ = join_cohort()
    board = Participant(SMALL, SIX[0], IDENTITIES[SIX[0]], DIRECTORY)
    roster = rosters[SIX[0]]
    first = 1 + len(SIX[1])
    for wrong in (advertised[SIX[2]], stale):
        with pytest.raises(SignatureError):
            board.share(roster[:first] + wrong + roster[first + ADVERTISEMENT_BYTES :])
    unknown = Participant(SMALL, SIX[0], IDENTITIES[SIX[0]], {n: DIRECTORY[n] for n in SIX[:2]})
    with pytest.raises(ProtocolError, match="identity key is known"):
        unknown.share(roster)
    with pytest.raises(ProtocolError, match="another board"):
        cohort.boards[SIX[1]].share(rosters[SIX[0]])  # it has SIX[1] itself as a neighbour


SMALL_ORDER = (
    0,
    1,
    2**255 - 20,
    2**255 - 19,
    2**255 - 18,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
"""u-coordinates of X25519 with which every secret agrees on zeros (Bernstein, cr.yp.to/ecdh.html)."""


@pytest.mark.parametrize("point", SMALL_ORDER)
@pytest.mark.parametrize("key", [0, 1])
def test_the_server_refuses_a_key_of_small_order_that_its_owner_signed(point: int, key: int) -> None:
    cohort, hostile = MaskedCohort(SMALL, SIX), SIX[1]
    raw = cohort.boards[hostile].advertise()
    public = [raw[:32], raw[32:64], raw[64:96]]
    public[key] = point.to_bytes(32, "little")
    text = transcript("fedprune secure sum keys 1", SMALL.digest, hostile, *public)
    with pytest.raises(ProtocolError, match="small order"):
        cohort.collector.add_advertisement(hostile, b"".join(public) + IDENTITIES[hostile].sign(text))


def test_a_roster_below_the_threshold_or_out_of_order_is_refused() -> None:
    _, rosters, _ = join_cohort()
    entry = 1 + len(SIX[0]) + ADVERTISEMENT_BYTES
    roster = rosters[SIX[0]]
    entries = [roster[at : at + entry] for at in range(0, len(roster), entry)]
    for wrong, problem in (
        (b"", "from 3 to 4, got 0"),
        (b"".join(entries[:2]), "from 3 to 4, got 2"),
        (b"".join([*entries, b"\x04zzzz" + bytes(ADVERTISEMENT_BYTES)]), "from 3 to 4, got 5"),
        (b"".join([entries[1], entries[0], *entries[2:]]), "names in order"),
        (b"".join([entries[0], *entries]), "names in order"),
        (roster[:-1], "bytes of an advertisement"),
        (b"\x03a b" + roster, "neighbour in a roster"),
        (b"\xff" + roster, "neighbour in a roster"),
    ):
        board = Participant(SMALL, SIX[0], IDENTITIES[SIX[0]], DIRECTORY)
        with pytest.raises(ProtocolError, match=problem):
            board.share(wrong)


def test_another_roster_a_second_vector_and_steps_out_of_order_are_refused() -> None:
    cohort, rosters, shares = join_cohort()
    name = SIX[0]
    board = cohort.boards[name]
    for sender, message in shares.items():
        cohort.collector.add_shares(sender, message)
    deliveries = cohort.collector.deliveries()
    assert board.share(rosters[name]) == shares[name]  # the same answer to the same message
    with pytest.raises(ProtocolError, match="the same as before"):
        board.share(rosters[name] + b"x")
    with pytest.raises(ProtocolError, match="a delivery of shares before"):
        board.unmask(b"\x0f")
    with pytest.raises(ProtocolError, match="bytes of a vector"):
        board.mask(deliveries[name], Vector.zeros(SecureSumSession(b"x", 4, 3, 1, 1)))
    board.mask(deliveries[name], Vector.zeros(SMALL))
    with pytest.raises(ProtocolError, match="after the roster"):
        board.mask(deliveries[name], Vector.zeros(SMALL))
    fresh = Participant(SMALL, name, IDENTITIES[name], DIRECTORY)
    with pytest.raises(ProtocolError, match="after the roster"):
        fresh.mask(deliveries[name], Vector.zeros(SMALL))


def test_damaged_shares_and_too_few_of_them_are_refused_before_anything_is_sent() -> None:
    cohort, _, shares = join_cohort()
    for name, message in shares.items():
        cohort.collector.add_shares(name, message)
    name = SIX[0]
    delivery = cohort.collector.deliveries()[name]
    vector = draw_vector(SMALL, 1)
    before = vector.copy()
    changed = bytearray(delivery)
    changed[-1] ^= 1
    for wrong, problem in (
        (bytes(changed), "don't decrypt"),
        (
            bytes([0b0011]) + delivery[1 : 1 + 2 * SEALED_BYTES],
            "neighbours that have shared: expected 3 or more, got 2",
        ),
        (bytes([0b10111]) + delivery[1:], "bits of neighbours that have shared"),
        (delivery[:-1], "bytes of sealed shares"),
        (b"", "bits of neighbours"),
    ):
        with pytest.raises(ProtocolError, match=problem):
            cohort.boards[name].mask(wrong, vector)
        assert same_vector(vector, before)
    cohort.boards[name].mask(delivery, vector)


def test_a_sum_of_too_few_survivors_or_of_boards_that_never_shared_is_refused() -> None:
    cohort, rosters, shares = join_cohort()
    name = SIX[0]
    view = [peer for peer in SIX if peer.encode() in rosters[name]]
    absent = view[1]
    for peer, message in shares.items():
        if peer != absent:
            cohort.collector.add_shares(peer, message)
    board = cohort.boards[name]
    board.mask(cohort.collector.deliveries()[name], Vector.zeros(SMALL))
    with pytest.raises(ProtocolError, match="expected 3 or more, got 2"):
        board.unmask(encode_bits(view, view[2:]))
    with pytest.raises(ProtocolError, match=f"boards that had shared, got {absent}"):
        board.unmask(encode_bits(view, view))
    assert len(board.unmask(encode_bits(view, set(view) - {absent}))) == 3 * SHARE_BYTES


# What the server refuses


def test_messages_of_other_steps_and_other_boards_are_refused_and_repeated_ones_ignored() -> None:
    cohort, _, shares = join_cohort()
    collector = cohort.collector
    for name, message in shares.items():
        collector.add_shares(name, message)
        collector.add_shares(name, message)
    with pytest.raises(ProtocolError, match="another step's message"):
        collector.add_masked(SIX[0], bytes(SMALL.size))
    with pytest.raises(ProtocolError, match="the same as before"):
        collector.add_shares(SIX[0], shares[SIX[1]])
    deliveries = collector.deliveries()
    with pytest.raises(ProtocolError, match="step of the shares"):
        collector.deliveries()
    masked = {
        n: cohort.boards[n].mask(raw, draw_vector(SMALL, i)) for i, (n, raw) in enumerate(sorted(deliveries.items()))
    }
    with pytest.raises(ProtocolError, match="bytes of a masked vector"):
        collector.add_masked(SIX[0], masked[SIX[0]][:-1])
    for name, message in masked.items():
        collector.add_masked(name, message)
        collector.add_masked(name, message)
    with pytest.raises(ProtocolError, match="the same as before"):
        collector.add_masked(SIX[0], masked[SIX[1]])
    asked = collector.survivors()
    for name, raw in asked.items():
        answer = cohort.boards[name].unmask(raw)
        for wrong in (answer[:-1], bytes([0xFF]) * len(answer)):
            with pytest.raises(ProtocolError):
                collector.add_unmasking(name, wrong)
        assert not collector.is_ready or name != min(asked)
        collector.add_unmasking(name, answer)
    assert collector.is_ready
    assert same_vector(collector.total(), plain_sum([draw_vector(SMALL, i) for i in range(6)], SMALL))
    with pytest.raises(ProtocolError, match="nothing more"):
        collector.add_advertisement(NAMES[7], cohort.boards[SIX[0]].advertise())


@pytest.mark.parametrize("survives", [True, False])
def test_false_shares_are_noticed(survives: bool) -> None:
    """Of a seed, and of a mask key."""
    liar, cohort = SIX[0], MaskedCohort(SMALL, SIX, seed=0)
    owner = SMALL.neighbours(SIX, Random(0))[liar][0]
    add = cohort.collector.add_unmasking

    def add_altered_share(board: str, raw: bytes) -> None:
        add(board, raw if board != liar else raw[:16] + bytes([raw[16] ^ 1]) + raw[17:])

    cohort.collector.add_unmasking = add_altered_share  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match=f"shares of a secret of {owner} are false"):
        cohort.carry_out(vectors(SMALL, SIX), {"mask": set() if survives else {owner}})


@given(st.sampled_from(["roster", "delivery", "survivors"]), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_changed_message_is_refused_by_name_or_changes_nothing(what: str, at: int, value: int, cut: bool) -> None:
    cohort, rosters, shares = join_cohort()
    name = SIX[0]
    board = cohort.boards[name]
    if what == "roster":
        board = Participant(SMALL, name, IDENTITIES[name], DIRECTORY)
        message, take = rosters[name], board.share
    else:
        for peer, sent in shares.items():
            cohort.collector.add_shares(peer, sent)
        deliveries = cohort.collector.deliveries()
        if what == "delivery":
            message = deliveries[name]

            def take(raw: bytes) -> bytes:
                return board.mask(raw, Vector.zeros(SMALL))
        else:
            for peer, raw in deliveries.items():
                cohort.collector.add_masked(peer, cohort.boards[peer].mask(raw, Vector.zeros(SMALL)))
            message, take = cohort.collector.survivors()[name], board.unmask
    place = at % len(message)
    changed = message[:place] if cut else message[:place] + bytes([value]) + message[place + 1 :]
    if changed == message:
        take(changed)
        return
    refused: FedpruneError | None = None
    try:
        take(changed)
    except FedpruneError as error:
        refused = error
    # Any set of enough survivors is a valid request.
    assert isinstance(refused, ProtocolError) or (refused is None and what == "survivors")
