"""The power fails at every write of a board that joins, speaks and listens: it becomes a member, and hears all once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.join_claim import JoinClaim
from fedprune.security.keys import VerifyingKey
from fedprune.security.signed_channel import Opener, Sealer
from fedprune.security.trusted_time import BUILD_TIME
from fedprune.wire.fleet_messages import JoinAnswer, JoinRequest
from fedprune.wire.messages import Birth, Hello, parse_message
from fedprune.wire.topics import Topics
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from support.faults.power_cuts import EACH_KIND, CutError, cuts, power

TOPICS = Topics("lab")
UP, DOWN = TOPICS.up("attic"), TOPICS.down("attic")
DAY = 24 * 3600


class Server:
    """Its disk never fails: what the board loses is the question here."""

    def __init__(self, folder: Path) -> None:
        self.identity = IdentityFolder.make(folder, "lab", clock=lambda: float(BUILD_TIME + DAY))
        self.claim: JoinClaim = JoinClaim.parse(self.identity.make_claim("attic", DAY).text)
        self.sealer = Sealer(self.identity.key, self.identity.epochs)
        self.opener: Opener | None = None
        self.heard: list[bytes] = []

    def answer(self, request: JoinRequest) -> JoinAnswer:
        answer = EnrollmentService(self.identity).answer(request)
        assert isinstance(answer, JoinAnswer)
        key = self.identity.store.key_of("attic")
        if key is not None and (self.opener is None or self.opener.key.hex != key):
            self.opener = Opener(VerifyingKey.from_hex(key), {}, lambda *_: None)
        return answer

    def hear(self, raw: bytes) -> None:
        assert self.opener is not None
        self.heard.append(self.opener.open(UP, raw))
        self.sealer.begin_epoch(DOWN)  # a birth


class Life:
    """A board from its first start on, each part of which the power may end."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.server = server
        self.taken: list[bytes] = []
        self.sent: list[bytes] = []

    def parts(self) -> Iterator[Callable[[], None]]:
        """What is done under power, with the server's answers in between."""
        identities: list[DeviceIdentity] = []
        request: list[JoinRequest] = []
        raw: list[bytes] = []

        def start() -> None:
            identities.append(DeviceIdentity(self.folder, "lab", "attic", clock=lambda: 0.0))
            if not identities[0].has_joined:
                request.append(identities[0].request(self.server.claim))

        yield start
        if request:
            answer = self.server.answer(request[0])
            yield lambda: self._admit(identities[0], answer)

        def speak() -> None:
            sealer = Sealer(identities[0].key, identities[0].epochs)
            raw.append(sealer.seal(UP, Birth("attic", len(self.sent) + 1, "", 1, "").to_bytes()))
            self.sent.append(raw[0])

        yield speak
        self.server.hear(raw[0])
        hello = self.server.sealer.seal(DOWN, Hello(BUILD_TIME + (2 + len(self.sent)) * DAY).to_bytes())
        yield lambda: self._listen(identities[0], hello)

    def _admit(self, identity: DeviceIdentity, answer: JoinAnswer) -> None:
        assert identity.admit(answer, self.server.claim.pin) is not None

    def _listen(self, identity: DeviceIdentity, raw: bytes) -> None:
        opener = Opener(identity.server, identity.server_epochs(), identity.store_server_epoch)
        message = parse_message(opener.open(DOWN, raw))
        self.taken.append(raw)
        assert isinstance(message, Hello)
        identity.trusted_time.note_time(message.time or 0)

    def live(self, at: int = 0, kind: str = "before") -> list[str]:
        """Live all parts; with `at`, the power fails at that operation. Returns the operations that there were."""
        done: list[str] = []
        for step in self.parts():
            with power(max(0, at - len(done)), kind) as supply:
                step()
            done += supply.names
            if at and len(done) >= at:
                break
        return done


def lives(folder: Path) -> tuple[Life, Server]:
    folder.mkdir()
    server = Server(folder / "server")
    return Life(folder / "board", server), server


def test_there_is_something_to_cut(tmp_path: Path) -> None:
    life, server = lives(tmp_path / "x")
    assert len(life.live()) > 30
    server.identity.close()


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_board_joins_and_hears_everything_at_most_once_wherever_the_power_fails(tmp_path: Path, kind: str) -> None:
    undisturbed, server = lives(tmp_path / "whole")
    operations = undisturbed.live() + undisturbed.live()
    server.identity.close()
    for at, how in cuts(kind, operations):
        life, server = lives(tmp_path / f"{at}")
        left = at
        try:
            left -= len(life.live(at, how))
            if left > 0:
                life.live(left, how)
        except CutError:
            pass
        life.live()
        life.live()
        identity = DeviceIdentity(life.folder, "lab", "attic")
        assert identity.has_joined
        assert server.identity.store.key_of("attic") == identity.key.verifying_key.hex
        assert identity.trusted_time.floor > BUILD_TIME + DAY
        assert len(set(server.heard)) == len(server.heard)
        # What was taken once is refused by every later life of the board.
        opener = Opener(identity.server, identity.server_epochs(), lambda *_: None)
        for raw in life.taken:
            with pytest.raises(Exception, match=r"epoch|before"):
                opener.open(DOWN, raw)
        server.identity.close()
