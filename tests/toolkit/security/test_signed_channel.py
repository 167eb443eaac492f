"""Nothing counts twice, whatever is repeated, reordered or restarted; and what is new does count."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from fedprune.core.errors import ProtocolError, ReplayError, SignatureError, StaleEpochError, StorageError
from fedprune.security.epoch_file import EpochFile
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import MAX_STREAMS, WINDOW_LENGTH, Opener, ReplayWindow, Sealer, stream_of
from fedprune.security.signed_envelope import HEADER_BYTES, MAX_EPOCH, SignedEnvelope, seal, unseal
from fedprune.wire.fields import MAX_MESSAGE_BYTES
from fedprune.wire.messages import Hello, parse_message
from fedprune.wire.topics import Topics

pytestmark = pytest.mark.board

KEY = SigningKey.make()


class Conversation(RuleBasedStateMachine):
    """A sender and a receiver that may restart at any moment, and a broker that repeats and reorders as it likes."""

    sent = Bundle("sent")

    @initialize()
    def begin(self) -> None:
        self.epoch = self.counter = 0
        self.window = ReplayWindow()
        self.floor = -1
        self.closed = -1  # epochs up to this one are over since the receiver's restart
        self.taken: list[tuple[int, int]] = []

    @rule(target=sent, jump=st.sampled_from([0, 0, 0, 0, 1, 7, WINDOW_LENGTH - 1, WINDOW_LENGTH, 10**15]))
    def send(self, jump: int) -> tuple[int, int]:
        number = (self.epoch, self.counter + jump)
        self.counter += jump + 1
        return number

    @rule()
    def sender_restarts(self) -> None:
        self.epoch, self.counter = self.epoch + 1, 0

    @rule()
    def receiver_restarts(self) -> None:
        self.window = ReplayWindow.after(self.floor)
        self.closed = self.floor

    @rule(number=sent)
    def deliver(self, number: tuple[int, int]) -> None:
        epoch, counter = number
        newest = max((e for e, _ in self.taken), default=-1)
        top = max((c for e, c in self.taken if e == epoch), default=-1)
        fresh = number not in self.taken and epoch >= newest and epoch > self.closed and counter > top - WINDOW_LENGTH
        if not fresh:
            over = epoch < newest or epoch <= self.closed
            with pytest.raises(ReplayError) as caught:
                self.window.accept(epoch, counter)
            assert isinstance(caught.value, StaleEpochError) == over
            return
        assert self.window.accept(epoch, counter) == (epoch > newest)
        self.taken.append(number)
        self.floor = max(self.floor, epoch)

    @invariant()
    def nothing_counted_twice(self) -> None:
        accepted_numbers = getattr(self, "taken", [])
        assert len(accepted_numbers) == len(set(accepted_numbers))


TestConversation = Conversation.TestCase


def test_a_message_may_be_overtaken_by_a_window_s_length_and_no_more() -> None:
    window = ReplayWindow()
    window.accept(1, WINDOW_LENGTH)
    window.accept(1, 1)
    with pytest.raises(ReplayError, match="too old"):
        window.accept(1, 0)


TestConversation.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


@given(st.lists(st.sampled_from([0.0, 10.0, 5e9, 1e300])))
@settings(deadline=None)
def test_epochs_only_grow_whatever_the_clock_says_and_are_on_the_disk_first(times: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, last, now = Path(folder) / "epoch", 0, [0.0]
        for at in times:
            now[0] = at
            epochs = EpochFile(path, lambda: now[0])
            for _ in range(3):
                epoch = epochs.next()
                assert epoch > last
                assert json.loads(path.read_bytes())["epoch"] >= epoch
                last = epoch


def test_epochs_cost_a_write_per_block_and_none_is_given_twice(tmp_path: Path) -> None:
    path, epoch_numbers, written = tmp_path / "epoch", set[int](), set[bytes]()
    epochs = EpochFile(path, lambda: 0.0)
    for i in range(1000):
        if i % 300 == 299:
            epochs = EpochFile(path, lambda: 0.0)  # a restart in the middle of a block
        epoch_numbers.add(epochs.next())
        written.add(path.read_bytes())
    assert len(epoch_numbers) == 1000
    assert len(written) < 10


@pytest.mark.parametrize("content", [b"", b"{}", b'{"epoch": -1}', b'{"epoch": true}'])
def test_a_damaged_epoch_is_an_error_and_not_an_old_number(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "epoch").write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        EpochFile(tmp_path / "epoch")


def test_streams_are_counted_apart_and_epochs_are_written_down_before_a_message_is_given_out(tmp_path: Path) -> None:
    clock = lambda: 0.0  # noqa: E731  a board's
    sealer = Sealer(KEY, EpochFile(tmp_path / "epoch", clock))
    written: dict[str, int] = {}
    opener = Opener(KEY.verifying_key, {}, written.__setitem__)
    mine, all_ = "fedprune/1/lab/pi-1/job/down", "fedprune/1/lab/all/-/down"
    hello = sealer.seal(all_, b"hello")
    for _ in range(3 * WINDOW_LENGTH):
        sealer.seal("fedprune/1/lab/pi-2/job/down", b"others")
    offers = [sealer.seal(mine, f"{i}".encode()) for i in range(3)]

    assert opener.open(mine, offers[2]) == b"2"
    assert opener.open(all_, hello) == b"hello"
    assert opener.open(mine, offers[0]) == b"0"
    assert written == {stream_of(mine): 3, stream_of(all_): 1}
    with pytest.raises(ReplayError, match="before"):
        opener.open(mine, offers[2])

    restarted = Opener(KEY.verifying_key, written, written.__setitem__)
    with pytest.raises(StaleEpochError):
        restarted.open(mine, offers[1])
    sealer.begin_epoch(mine)
    assert restarted.open(mine, sealer.seal(mine, b"new")) == b"new"
    assert written[stream_of(mine)] == 4


def test_an_epoch_that_can_t_be_written_down_has_not_begun(tmp_path: Path) -> None:
    sealer = Sealer(KEY, EpochFile(tmp_path / "epoch"))
    full = [True]

    def fail_when_full(_stream: str, _epoch: int) -> None:
        if full[0]:
            raise StorageError("full")

    opener = Opener(KEY.verifying_key, {}, fail_when_full)
    raw = sealer.seal("a/b/c/d/e", b"x")
    with pytest.raises(StorageError, match="full"):
        opener.open("a/b/c/d/e", raw)
    full[0] = False
    assert opener.open("a/b/c/d/e", raw) == b"x"


def test_a_sender_has_a_bounded_number_of_streams(tmp_path: Path) -> None:
    sealer = Sealer(KEY, EpochFile(tmp_path / "epoch"))
    opener = Opener(KEY.verifying_key, {}, lambda _stream, _epoch: None)
    for i in range(MAX_STREAMS):
        opener.open(f"{i}", sealer.seal(f"{i}", b""))
    with pytest.raises(ReplayError, match="too many streams"):
        opener.open("more", sealer.seal("more", b""))


TOPICS = Topics("lab")
numbers = st.integers(0, MAX_EPOCH)
topics = st.text(max_size=100)


@given(topics, numbers, numbers, st.binary(max_size=300))
@settings(deadline=None)
def test_what_is_sealed_is_opened_on_its_topic(topic: str, epoch: int, counter: int, body: bytes) -> None:
    envelope = unseal(KEY.verifying_key, topic, seal(KEY, topic, epoch, counter, body))

    assert (envelope.epoch, envelope.counter, envelope.body) == (epoch, counter, body)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_bit_of_it_can_be_changed(data: st.DataObject) -> None:
    raw = bytearray(seal(KEY, "a/b", 3, 7, b'{"v":1}'))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8

    with pytest.raises(ProtocolError):
        unseal(KEY.verifying_key, "a/b", bytes(raw))


@given(st.integers(0, HEADER_BYTES + 20))
@settings(deadline=None)
def test_nothing_of_it_can_be_left_out_or_added(end: int) -> None:
    raw = seal(KEY, "a/b", 3, 7, b"x" * 20)
    if end < len(raw):
        with pytest.raises(ProtocolError):
            unseal(KEY.verifying_key, "a/b", raw[:end])
    with pytest.raises(SignatureError):
        unseal(KEY.verifying_key, "a/b", raw + bytes(end + 1))


@given(topics, topics, st.binary(max_size=30), st.integers(0, 30))
@settings(deadline=None)
def test_it_means_nothing_on_another_topic_wherever_the_border_is(
    topic: str, second_topic: str, body: bytes, cut: int
) -> None:
    raw = seal(KEY, topic, 1, 1, body)
    if second_topic != topic:
        with pytest.raises(SignatureError):
            unseal(KEY.verifying_key, second_topic, raw)
    head, rest = raw[:HEADER_BYTES], raw[HEADER_BYTES:]
    shifted_topic = topic + rest[:cut].decode("latin-1")
    if cut and rest:
        with pytest.raises(SignatureError):
            unseal(KEY.verifying_key, shifted_topic, head + rest[cut:])


def test_another_s_key_is_not_taken_even_where_it_names_the_right_one() -> None:
    raw = seal(SigningKey.make(), "a", 1, 1, b"{}")
    with pytest.raises(SignatureError, match="signed by another key"):
        unseal(KEY.verifying_key, "a", raw)

    forged = raw[:4] + KEY.verifying_key.id + raw[12:]
    with pytest.raises(SignatureError, match="key"):
        unseal(KEY.verifying_key, "a", forged)


@given(st.binary(max_size=2 * HEADER_BYTES))
@settings(deadline=None)
def test_any_bytes_are_refused_with_an_error_of_ours(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        unseal(KEY.verifying_key, "a", raw)


def test_the_longest_message_fits_and_a_longer_one_is_not_looked_at() -> None:
    body = bytes(MAX_MESSAGE_BYTES)
    raw = seal(KEY, "a", 1, 1, body)

    assert unseal(KEY.verifying_key, "a", raw).body == body
    with pytest.raises(ProtocolError, match="too long"):
        SignedEnvelope.parse(raw + b"x")
    with pytest.raises(ProtocolError, match="too long"):
        seal(KEY, "a", 1, 1, body + b"x")


@pytest.mark.parametrize(("epoch", "counter"), [(-1, 0), (0, MAX_EPOCH + 1)])
def test_numbers_out_of_range_are_refused_by_sender_and_receiver(epoch: int, counter: int) -> None:
    with pytest.raises(ProtocolError, match="of a signed message"):
        seal(KEY, "a", epoch, counter, b"")
    raw = bytearray(seal(KEY, "a", 1, 1, b""))
    raw[12:20] = (2**63).to_bytes(8, "little")
    with pytest.raises(ProtocolError, match="epoch of a signed message"):
        SignedEnvelope.parse(bytes(raw))


def test_a_message_to_one_device_is_not_one_to_another() -> None:
    raw = seal(KEY, TOPICS.down("pi-1", "job"), 1, 0, Hello().to_bytes())

    assert parse_message(unseal(KEY.verifying_key, TOPICS.down("pi-1", "job"), raw).body) == Hello()
    for topic in (TOPICS.down("pi-2", "job"), TOPICS.broadcast(), TOPICS.up("pi-1", "job"), TOPICS.down("pi-1")):
        with pytest.raises(SignatureError):
            unseal(KEY.verifying_key, topic, raw)
