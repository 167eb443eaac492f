"""A server and its devices, each behind its signed link, and a broker between them that may do what it likes."""

import errno
import itertools
import logging
import shutil
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fedprune.core.errors import SignatureError, StorageError
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.join_claim import JoinClaim
from fedprune.security.joining import signed_answer_bytes
from fedprune.security.keys import SigningKey
from fedprune.security.signed_envelope import SignedEnvelope, seal
from fedprune.security.trusted_time import BUILD_TIME
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import APPROVED, REFUSED, JoinAnswer, JoinRequest
from fedprune.wire.messages import Birth, Death, Finished, Hello, RoundProgress, parse_message
from fedprune.wire.queues import ConnectionUp, Event
from fedprune.wire.topics import Topics
from fedprune_device.network import membership as device_side
from fedprune_device.network.connection import BoardConnection, ReceivedMessage
from fedprune_server.devices import quarantine as quarantine_module
from fedprune_server.devices.quarantine import BYTES_PER_POINT, MAX_POINTS, STRANGERS, Quarantine
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.messaging import authentication as server_side
from fedprune_server.messaging.connection import RateLimitedLink
from fedprune_server.messaging.transport import DeviceRevoked, DuplicateIdentity
from fedprune_server.storage.folder_layout import DATABASE_FILE
from support.faults.failing_disk import fault

DAY = 24 * 3600
TOPICS = Topics("lab")
Sent = tuple[str, bytes]


class End:
    """One end of a line: what it publishes lies in the broker's hands until somebody passes it on."""

    def __init__(self) -> None:
        self.connected = True
        self.unsent = 0
        self.room = True
        self.sent: list[Sent] = []
        self.inbox: deque[Sent | Event] = deque()

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        self.sent.append((topic, payload))
        return True

    def get(self, timeout: float | None = 0.0) -> Sent | Event | None:
        return self.inbox.popleft() if self.inbox else None

    def flush(self, timeout: float) -> bool:
        return True


class Server:
    def __init__(self, identity: IdentityFolder, now: Callable[[], float]) -> None:
        self.end = End()
        self.store = identity.store
        self.link = server_side.AuthenticatedLink(self.end, identity, now)
        self.shut_out: list[str] = []
        self.doubled: list[str] = []

    def say(self, device: str, message: Hello | Finished) -> Sent:
        assert self.link.publish(TOPICS.down(device, getattr(message, "job", "-")), message.to_bytes())
        return self.end.sent[-1]

    def receive(self, *sent: Sent) -> list[Sent]:
        self.end.inbox.extend(sent)
        messages = []
        while (item := self.link.get()) is not None:
            if isinstance(item, tuple):
                messages.append(item)
            elif isinstance(item, DeviceRevoked):
                self.shut_out.append(item.device)
            elif isinstance(item, DuplicateIdentity):
                self.doubled.append(item.device)
        self.store._require_database().flush()  # as the loop does at the end of its turn
        return messages


class Board:
    def __init__(self, identity: DeviceIdentity, now: Callable[[], float]) -> None:
        self.identity = identity
        self.end = End()
        self.channel = device_side.SignedChannel(identity, now)
        self.connection = BoardConnection(self.end, self.channel, now)
        self._last_birth: Birth | None = None

    def say(self, message: Birth | Death | RoundProgress) -> Sent:
        if isinstance(message, Birth):
            self._last_birth = message
        assert self.connection.send(message)
        return self.end.sent[-1]

    def seal_message(self, message: Death) -> Sent:
        topic = TOPICS.up(message.device)
        return topic, self.channel.seal(topic, message)

    def receive(self, *sent: Sent) -> list[Sent]:
        messages = []
        for topic, payload in sent:
            self.end.inbox.append((topic, payload))
            item = self.connection.receive()
            if isinstance(item, ReceivedMessage):
                messages.append((topic, item.message.to_bytes()))
            elif isinstance(item, Chunk):
                messages.append((topic, item.to_bytes()))
            if self.connection.channel.is_birth_due and self._last_birth is not None:  # as the agent does
                self.connection.send(self._last_birth)
        return messages


class Lab:
    """A site with two boards, and clocks that stand still until they are moved."""

    def __init__(self, folder: Path, identity: IdentityFolder) -> None:
        self.identity = identity
        self.folder = folder
        self.now = 0.0
        self._milliseconds = itertools.count(1000, 1000)
        self.server = self.new_server()
        self.boards = {name: self.let_in(name, name) for name in ("pi-1", "pi-2")}
        self.server.end.sent.clear()

    def make_claim(self, name: str | None) -> JoinClaim:
        return JoinClaim.parse(self.identity.make_claim(name, DAY).text)

    def device_identity(self, folder: str, name: str) -> DeviceIdentity:
        return DeviceIdentity(self.folder / folder, "lab", name, clock=lambda: float(BUILD_TIME))

    def server_with(self, *, is_guarded: bool = False, **options: Any) -> Server:
        """A new server whose link has these options."""
        server = self.new_server()
        end = RateLimitedLink(server.end, options["quarantine"], is_signed=True) if is_guarded else server.end
        server.link = server_side.AuthenticatedLink(end, self.identity, lambda: self.now, **options)
        return server

    def let_in(self, name: str, folder: str) -> Board:
        claim, device = self.make_claim(name), self.device_identity(folder, name)
        assert device.admit(self.answer(device.request(claim)), claim.pin) is not None
        return Board(device, lambda: self.now)

    def answer(self, request: JoinRequest) -> JoinAnswer:
        """What the server says to a request to join."""
        assert self.server.receive(asking(request)) == []
        topic, raw = self.server.end.sent.pop()
        answer = parse_message(raw)
        assert isinstance(answer, JoinAnswer)
        assert topic == TOPICS.join_answer(request.nonce)
        return answer

    def new_server(self) -> Server:
        self.server = Server(self.identity, lambda: self.now)
        return self.server

    def another_board(self, folder: str, name: str) -> Board:
        """One whose clock shows another second whenever it is asked."""
        clock = lambda: BUILD_TIME + next(self._milliseconds) / 1000  # noqa: E731
        return Board(DeviceIdentity(self.folder / folder, "lab", name, clock=clock), lambda: self.now)

    def new_board(self, name: str) -> Board:
        self.boards[name] = Board(self.device_identity(name, name), lambda: self.now)
        return self.boards[name]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with IdentityFolder.make(tmp_path / "state", "lab", clock=lambda: float(BUILD_TIME + 30 * DAY)) as identity:
        yield Lab(tmp_path, identity)


def asking(request: JoinRequest) -> Sent:
    return TOPICS.join_request(request.nonce), request.to_bytes()


def birth(name: str, session: int = 1) -> Birth:
    return Birth(name, session, "", 10, "fedprune")


def test_both_hear_what_the_other_said_and_only_once(lab: Lab) -> None:
    server, pi = lab.server, lab.boards["pi-1"]
    up = pi.say(birth("pi-1"))
    assert server.receive(up, up, up) == [(TOPICS.up("pi-1"), birth("pi-1").to_bytes())]
    down = server.say("pi-1", Finished("job"))
    assert pi.receive(down, down, down) == [(TOPICS.down("pi-1", "job"), Finished("job").to_bytes())]
    assert server.receive(up) == pi.receive(down) == []


def test_chunks_pass_as_they_are(lab: Lab) -> None:
    pi, chunk = lab.boards["pi-1"], Chunk("ab" * 32, "data", 0, b"a piece").to_bytes()
    up, down = (TOPICS.up_blob("pi-1", "job"), chunk), (TOPICS.down_blob("pi-1", "job"), chunk)
    pi.connection.send_chunk(chunk, "job")
    lab.server.link.publish(*down)
    assert (pi.end.sent, lab.server.end.sent) == ([up], [down])
    assert (lab.server.receive(up), pi.receive(down)) == ([up], [down])


def test_a_message_means_nothing_on_another_s_topic_or_in_another_s_name(lab: Lab) -> None:
    server, one, two = lab.server, lab.boards["pi-1"], lab.boards["pi-2"]
    up = one.say(birth("pi-1"))
    assert server.receive((TOPICS.up("pi-2"), up[1])) == []
    assert server.receive((TOPICS.up("pi-1", "job"), up[1])) == []
    down = server.say("pi-1", Finished("job"))
    assert two.receive((TOPICS.down("pi-2", "job"), down[1]), (TOPICS.broadcast(), down[1])) == []
    # What one device signs is not the server's word to another, nor the other's word to the server.
    assert two.receive((TOPICS.down("pi-2"), two.say(birth("pi-2"))[1])) == []
    assert server.receive(two.seal_message(Death("pi-1", 1))) == []
    assert one.receive(down) != []
    assert server.receive(up) != []


def test_what_is_unsigned_changed_or_nonsense_is_ignored_and_said(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    server, pi = lab.server, lab.boards["pi-1"]
    topic, raw = pi.say(birth("pi-1"))
    with caplog.at_level(logging.WARNING):
        for at in range(0, len(raw), 7):
            assert server.receive((topic, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])) == []
        assert server.receive((topic, birth("pi-1").to_bytes()), (topic, b""), ("fedprune/1/lab/x", raw)) == []
    # Twenty of the board, and that there will be no more of it; and one on a topic that is no board's.
    assert len(caplog.records) == 22
    assert "signature" in caplog.text
    assert server.receive((topic, raw)) != []


def test_who_is_not_let_in_is_not_heard(lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with IdentityFolder.make(tmp_path / "elsewhere", "lab", clock=lambda: float(BUILD_TIME + 30 * DAY)) as foreign:
        stranger = Lab(tmp_path / "strangers", foreign).let_in("pi-9", "pi-9")
    assert lab.server.receive(stranger.say(birth("pi-9"))) == []
    assert "pi-9 is not a member" in caplog.text
    assert not lab.server.link.publish(TOPICS.down("pi-9", "job"), Finished("job").to_bytes())
    hello = lab.server.say("pi-1", Hello())
    assert stranger.receive((TOPICS.down("pi-9"), hello[1]), (TOPICS.broadcast(), hello[1])) == []


def test_what_was_said_before_a_restart_of_the_server_is_not_heard_again_and_new_things_soon_are(lab: Lab) -> None:
    pi = lab.boards["pi-1"]
    old = pi.say(birth("pi-1"))
    assert lab.server.receive(old) != []
    late = pi.say(Death("pi-1", 1))  # never arrived
    server = lab.new_server()
    assert server.receive(old) == []
    ((topic, hello),) = server.end.sent  # "I have restarted", to the board
    assert pi.receive((topic, hello)) == [(TOPICS.down("pi-1"), Hello(BUILD_TIME + 30 * DAY).to_bytes())]
    new_birth = pi.say(birth("pi-1", 2))  # what a board answers
    assert server.receive(new_birth) != []
    assert server.receive(old, new_birth) == []
    assert late[1] != new_birth[1]


def test_of_a_key_with_two_names_nothing_is_heard_again_after_a_restart_of_the_server(lab: Lab) -> None:
    key = SigningKey.make()

    def sealed_birth(name: str, epoch: int) -> Sent:
        topic = TOPICS.up(name)
        return topic, seal(key, topic, epoch, 0, birth(name).to_bytes())

    for name in ("attic", "barn"):
        lab.identity.store.approve(name, key.verifying_key.hex, 1)
    lab.now += 1.0
    old = [sealed_birth("attic", 5), sealed_birth("barn", 5)]
    assert len(lab.server.receive(*old)) == 2
    server = lab.new_server()
    assert len(server.receive(sealed_birth("attic", 6))) == 1
    assert server.receive(*old) == []
    assert len(server.receive(sealed_birth("barn", 6))) == 1


def test_a_birth_is_recognised_however_its_type_is_escaped(lab: Lab) -> None:
    key, topic = SigningKey.make(), TOPICS.up("attic")
    lab.identity.store.approve("attic", key.verifying_key.hex, 1)
    lab.now += 1.0
    plain = birth("attic").to_bytes()
    body = plain.replace(b'"birth"', b'"b\\u0069rth"')
    assert body != plain

    def epoch() -> int:
        return SignedEnvelope.parse(lab.server.say("attic", Finished("job"))[1]).epoch

    before = epoch()
    assert lab.server.receive((topic, seal(key, topic, 5, 0, body))) == [(topic, body)]
    assert epoch() > before


def test_what_was_said_before_a_restart_of_the_board_is_not_heard_again_and_new_things_soon_are(lab: Lab) -> None:
    old = lab.server.say("pi-1", Finished("old"))
    assert lab.boards["pi-1"].receive(old) != []
    pi = lab.new_board("pi-1")
    first = pi.say(birth("pi-1", 2))
    assert pi.receive(old) == []
    new_message = pi.end.sent[-1]
    assert new_message != first
    assert lab.server.receive(first, new_message) != []
    new = lab.server.say("pi-1", Finished("new"))
    assert pi.receive(new, old) == [(TOPICS.down("pi-1", "new"), Finished("new").to_bytes())]


def test_old_messages_repeated_for_ever_cost_a_message_each_ten_seconds(lab: Lab) -> None:
    pi = lab.boards["pi-1"]
    up, down = pi.say(birth("pi-1")), lab.server.say("pi-1", Finished("job"))
    assert lab.server.receive(up) != []
    assert pi.receive(down) != []
    server, pi = lab.new_server(), lab.new_board("pi-1")
    pi.say(birth("pi-1", 2))
    for _ in range(100):
        assert server.receive(up) == pi.receive(down) == []
    assert (len(server.end.sent), len(pi.end.sent)) == (1, 2)
    lab.now = 10.0
    assert server.receive(up) == pi.receive(down) == []
    assert (len(server.end.sent), len(pi.end.sent)) == (2, 3)


def test_a_revoked_board_is_heard_no_more_within_a_second_and_its_replacement_is(lab: Lab) -> None:
    server, pi = lab.server, lab.boards["pi-1"]
    assert server.receive(pi.say(birth("pi-1"))) != []
    with IdentityFolder(lab.folder / "state") as elsewhere:  # another process: `fedprune-server devices revoke`
        elsewhere.revoke("pi-1")
    lab.now = 1.0
    assert server.receive(pi.say(birth("pi-1", 2))) == []
    assert server.receive((TOPICS.up_blob("pi-1", "job"), b"the rest of an update")) == []
    assert server.shut_out == ["pi-1"]
    for topic in (TOPICS.down("pi-1", "job"), TOPICS.down_blob("pi-1", "job")):
        assert not server.link.publish(topic, Finished("job").to_bytes())
    assert server.link.publish(TOPICS.down("pi-2", "job"), Finished("job").to_bytes())
    replacement = lab.let_in("pi-1", "a new board")
    lab.now = 2.0
    assert server.receive(replacement.say(birth("pi-1", 3))) != []
    assert server.receive(pi.say(birth("pi-1", 4))) == []
    with IdentityFolder(lab.folder / "state") as elsewhere:
        elsewhere.revoke("pi-1")
    lab.now = 3.0
    assert server.link.get() == DeviceRevoked("pi-1")


def test_so_many_requests_to_join_a_second_are_looked_at(lab: Lab) -> None:
    asked = asking(lab.device_identity("pi-3", "pi-3").request(lab.make_claim(None)))
    lab.now = 100.0
    before = len(lab.server.end.sent)
    lab.server.receive(*[asked] * 300)
    assert len(lab.server.end.sent) - before == server_side.JOINS_PER_S
    lab.now = 100.5
    lab.server.receive(*[asked] * 300)
    assert len(lab.server.end.sent) - before == 1.5 * server_side.JOINS_PER_S


class Joining(End):
    dropped_count = 0
    flooding_prefix = ""


def test_strangers_that_flood_the_topic_for_joining_cost_members_nothing_and_are_named(lab: Lab) -> None:
    joining, quarantine = Joining(), Quarantine(lambda: lab.now + 1)
    server = lab.server_with(joins=joining, quarantine=quarantine)
    joining.inbox.extend((TOPICS.join_request("ab" * 16), b"x") for _ in range(30_000))
    progress = [lab.boards["pi-1"].say(RoundProgress("pi-1", "job", 1, 1, "train", n, 10)) for n in range(10)]
    assert len(server.receive(*progress)) == 10
    assert len(joining.inbox) >= 30_000 - server_side.JOINS_PER_S

    joining.dropped_count, joining.flooding_prefix = 1, TOPICS.join_request("ab" * 16).rpartition("/-/")[0]
    lab.now += 1
    server.link.get()
    assert not joining.inbox, "honest requests would wait behind those of the flood"
    assert quarantine.join_flood.flooding_client() == "ab" * 16
    assert not quarantine.sentences(), "it is no device, and can't be revoked"
    assert quarantine.rows() == {}
    lab.now += 1
    joining.inbox.append(asking(lab.device_identity("new", "pi-9").request(lab.make_claim("pi-9"))))
    server.link.get()
    answer = parse_message(server.end.sent[-1][1])
    assert isinstance(answer, JoinAnswer)
    assert answer.status == APPROVED


def test_a_board_that_speaks_right_after_it_was_let_in_is_heard(lab: Lab) -> None:
    server = lab.server_with(joins=(joining := Joining()))
    server.link.get()
    claim, device = lab.make_claim("pi-9"), lab.device_identity("new", "pi-9")
    request = device.request(claim)

    def soon(timeout: float | None = 0.0) -> Sent | None:
        """While the server waits for a message, its answer reaches the board, and the board announces itself."""
        server.end.get = waits  # type: ignore[method-assign]
        answer = parse_message(server.end.sent[-1][1])
        assert isinstance(answer, JoinAnswer)
        device.admit(answer, claim.pin)
        return Board(device, lambda: lab.now).say(birth("pi-9"))

    joining.inbox.append(asking(request))
    waits, server.end.get = server.end.get, soon  # type: ignore[method-assign]
    heard = server.link.get()
    assert isinstance(heard, tuple)
    assert parse_message(heard[1]) == birth("pi-9")


def answers(lab: Lab, board: Board, session: int, heard: int) -> list[Sent]:
    """A board greets as often as it hears a hello among what the server said since `heard`."""
    return [board.say(birth("pi-1", session)) for _ in board.receive(*lab.server.end.sent[heard:])]


@pytest.mark.parametrize("session", [6, 7])
@pytest.mark.parametrize("first", ["original", "copy"])
def test_a_copy_of_a_board_s_disk_is_noticed_and_each_of_the_two_is_heard(lab: Lab, session: int, first: str) -> None:
    server = lab.server
    shutil.copytree(lab.folder / "pi-1", lab.folder / "copy")
    original, copy = lab.another_board("pi-1", "pi-1"), lab.another_board("copy", "pi-1")
    assert server.receive(original.say(birth("pi-1", 6))) != []
    server.receive(copy.say(birth("pi-1", session)))
    for _ in range(3):
        lab.now += 10.0
        server.link.publish(TOPICS.down("pi-1"), Hello().to_bytes())  # as when a device comes back
        heard = len(server.end.sent) - 1
        boards = [(original, 6), (copy, session)]
        for board, number in boards if first == "original" else reversed(boards):
            server.receive(*answers(lab, board, number, heard))
    alternating = session != 6  # that the daemon sees
    assert server.doubled or alternating
    assert set(server.doubled) <= {"pi-1"}


def test_whoever_of_two_goes_on_in_an_epoch_that_is_over_is_noticed(lab: Lab) -> None:
    server = lab.server
    shutil.copytree(lab.folder / "pi-1", lab.folder / "copy")
    original, copy = lab.another_board("pi-1", "pi-1"), lab.another_board("copy", "pi-1")
    message = original.say(birth("pi-1", 6))
    assert server.receive(message) != []
    assert server.receive(copy.say(birth("pi-1", 7))) != []
    assert server.receive(message) == server.doubled == []  # a repetition shows nothing
    assert server.receive(original.say(RoundProgress("pi-1", "job", 1, 1, "train", 1, 2))) == []
    assert server.doubled == ["pi-1"]
    # The copy ends; what the server then says brings the other one back.
    (answer,) = answers(lab, original, 6, len(server.end.sent) - 1)
    assert server.receive(answer) != []


def test_a_board_that_starts_again_and_again_is_no_copy(lab: Lab) -> None:
    server = lab.server
    for session in range(1, 9):
        board, heard = lab.another_board("pi-1", "pi-1"), len(server.end.sent)
        assert server.receive(board.say(birth("pi-1", session))) != []
        for message in answers(lab, board, session, heard):
            assert server.receive(message) != []
        assert server.receive(board.say(birth("pi-1", session))) != []
        lab.now += 10.0
    assert server.doubled == []
    assert server.link.get() is None


def test_a_will_counts_whenever_it_was_made_and_is_nobody_else_s(lab: Lab) -> None:
    server, pi, two = lab.server, lab.boards["pi-1"], lab.boards["pi-2"]
    will = pi.seal_message(Death("pi-1", 1))
    assert server.receive(pi.say(birth("pi-1"))) != []
    assert server.receive(will) == [(TOPICS.up("pi-1"), Death("pi-1", 1).to_bytes())]
    assert server.receive(two.seal_message(Death("pi-1", 1))) == []
    assert lab.new_server().receive(will) == [(TOPICS.up("pi-1"), Death("pi-1", 1).to_bytes())]


def test_boards_that_are_there_hear_a_server_that_connects_anew(lab: Lab) -> None:
    pi, server = lab.boards["pi-1"], lab.new_server()
    for _ in range(3):
        server.end.inbox.append(ConnectionUp())
        assert isinstance(server.link.get(), ConnectionUp)
        server.link.publish(TOPICS.broadcast(), Hello().to_bytes())
        assert pi.receive(server.end.sent[-1]) == [(TOPICS.broadcast(), Hello().to_bytes())]
        server = lab.new_server()


def test_a_board_learns_the_time_from_its_server_alone(lab: Lab) -> None:
    pi = lab.boards["pi-1"]
    before = pi.identity.trusted_time.floor
    assert pi.receive((TOPICS.broadcast(), Hello(BUILD_TIME + 300 * DAY).to_bytes())) == []
    assert pi.identity.trusted_time.floor == before
    assert pi.receive(lab.server.say("pi-1", Hello(BUILD_TIME + 60 * DAY))) != []
    assert pi.identity.trusted_time.floor == BUILD_TIME + 60 * DAY


def test_a_message_doesn_t_count_whose_epoch_can_t_be_written_down(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    pi = lab.boards["pi-1"]
    up, down = pi.say(birth("pi-1")), lab.server.say("pi-1", Finished("job"))
    fresh_server, fresh_pi = lab.new_server(), Board(pi.identity, lambda: lab.now)
    with closing(sqlite3.connect(lab.folder / "state" / DATABASE_FILE)) as database:
        for what in ("INSERT", "UPDATE"):
            database.execute(
                f"CREATE TRIGGER full_{what} BEFORE {what} ON epochs BEGIN SELECT RAISE(FAIL, 'full'); END"
            )
        with pytest.raises(StorageError):  # a server that can't write ends, and continues where it was
            fresh_server.receive(up)
        for what in ("INSERT", "UPDATE"):
            database.execute(f"DROP TRIGGER full_{what}")
    with fault(1, OSError(errno.ENOSPC, "the card is full")):
        assert fresh_pi.receive(down) == []  # a board continues with what it has
    assert "the card is full" in caplog.text
    assert lab.new_server().receive(up) != []
    assert Board(pi.identity, lambda: lab.now).receive(down) != []


def test_what_was_opened_of_a_board_that_is_shut_out_meanwhile_is_dropped(lab: Lab) -> None:
    births = [lab.boards[name].say(birth(name, 6)) for name in ("pi-2", "pi-1")]
    lab.server.end.inbox.extend(births)
    assert isinstance(first := lab.server.link.get(), tuple)
    assert first[0] == births[0][0]
    with IdentityFolder(lab.identity.path.parent) as second_process:
        second_process.revoke("pi-1")
    lab.now += 2
    assert lab.server.link.get() == DeviceRevoked("pi-1")
    assert not isinstance(lab.server.link.get(), tuple)


def meet(server: Server, board: Board) -> None:
    """A board connects, and both hear what the other sends until neither has anything left to say."""
    board.say(birth(board.identity.device))
    while board.end.sent or server.end.sent:
        up, board.end.sent = board.end.sent, []
        server.receive(*up)
        down, server.end.sent = server.end.sent, []
        board.receive(*(s for s in down if s[0].startswith(TOPICS.down(board.identity.device))))


def test_after_its_keys_were_replaced_a_server_is_heard_by_boards_that_joined_again_alone(lab: Lab) -> None:
    one, two = lab.boards["pi-1"], lab.boards["pi-2"]
    claim = lab.make_claim("pi-3")
    lab.identity = lab.identity.replace()
    lab.new_server()
    for board in (one, two):
        assert lab.server.receive(board.say(birth(board.identity.device))) == []  # its key is revoked
        assert lab.answer(board.identity.request()).status == REFUSED
    assert lab.answer(lab.device_identity("pi-3", "pi-3").request(claim)).status == REFUSED  # a thief may have it
    rejoined = lab.let_in("pi-1", "again")
    meet(lab.server, rejoined)
    message = lab.server.say(rejoined.identity.device, Finished("job"))
    lab.server.end.sent.clear()
    assert rejoined.receive(message) != []
    assert not one.receive(lab.server.say("pi-1", Finished("job")))  # signed by a key that it doesn't know
    assert set(lab.identity.store.members()) == {"pi-1"}


def test_a_renewal_that_names_another_key_of_the_server_is_not_taken(lab: Lab) -> None:
    pi = lab.boards["pi-1"].identity
    request, key = pi.request(), SigningKey.make().verifying_key.hex
    genuine = lab.answer(request)
    forged = replace(genuine, server_key=key)
    text = signed_answer_bytes(
        forged.request, forged.status, forged.reason, forged.time, forged.authority, forged.certificate, key
    )
    before = pi.server
    with pytest.raises(SignatureError, match="another key"):
        pi.admit(replace(forged, signature=lab.identity.authority.sign(text).hex()), pi.pin)
    assert pi.server == before
    assert pi.admit(genuine, pi.pin) is not None


def test_members_are_known_before_they_announce_themselves_and_pay_for_what_they_have_signed(lab: Lab) -> None:
    quarantine = Quarantine(lambda: lab.now + 1)
    server, pi = lab.server_with(is_guarded=True, quarantine=quarantine), lab.boards["pi-1"]
    progress = RoundProgress("pi-1", "job", 1, 1, "train", 1, 10)
    server.receive(*(pi.say(progress) for _ in range(int(MAX_POINTS))))
    assert [*quarantine.sentences()] == ["pi-1"]
    assert quarantine.charge_message("pi-2", 100)


@pytest.mark.parametrize("kind", ["unsigned", "another board's", "said again", "an unwanted chunk"])
def test_what_a_member_has_not_signed_is_charged_to_strangers(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood in a member's name doesn't quarantine it; it is bounded, and costs other members nothing."""
    monkeypatch.setattr(quarantine_module, "MAX_STRANGER_POINTS", points := 4.0 * MAX_POINTS)
    quarantine = Quarantine(lambda: lab.now + 1)
    server, pi, other = lab.server_with(is_guarded=True, quarantine=quarantine), lab.boards["pi-1"], lab.boards["pi-2"]
    genuine = pi.say(RoundProgress("pi-1", "job", 1, 1, "train", 1, 10))
    forged = {
        "unsigned": (TOPICS.up("pi-1"), b"FPS\x01" + bytes(200)),
        "another board's": (TOPICS.up("pi-1"), other.say(RoundProgress("pi-2", "job", 1, 1, "train", 1, 10))[1]),
        "said again": genuine,
        "an unwanted chunk": (TOPICS.up_blob("pi-1"), bytes(32768)),
    }[kind]
    server.receive(genuine)
    flood = int(1.5 * points / (1 + len(forged[1]) / BYTES_PER_POINT))
    assert len(server.receive(*[forged] * flood)) <= (flood if kind == "an unwanted chunk" else 0)
    assert not quarantine.sentences()
    rows = quarantine.rows()
    assert rows.keys() == {STRANGERS}
    assert 0.3 * flood < rows[STRANGERS]["dropped"] < 0.5 * flood
    assert len(server.receive(other.say(RoundProgress("pi-2", "job", 1, 1, "train", 2, 10)))) == 1
    lab.now += 61
    assert len(server.receive(pi.say(RoundProgress("pi-1", "job", 1, 1, "train", 2, 10)))) == 1
