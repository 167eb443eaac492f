"""What is asked again before its answer can be here comes twice: how long to wait is known from the connection on."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobRequest
from fedprune.wire.request_numbers import SeenRequests, with_request_number
from fedprune.wire.response_time import MAX_PATIENCE_S, ResponseTime
from fedprune.wire.transfer import PATIENCE_S, Pull

pytestmark = pytest.mark.board


@pytest.fixture
def stores(tmp_path: Path) -> tuple[BlobStore, BlobStore]:
    return BlobStore(tmp_path / "there", durable=False), BlobStore(tmp_path / "here", durable=False)


def test_an_answer_to_one_of_two_askings_says_nothing_about_the_time(stores: tuple[BlobStore, BlobStore]) -> None:
    there, here = stores
    answers = ResponseTime()
    ref = there.put(b"c" * LEAF_BYTES)
    pull = Pull(ref, here.partial(ref), answers=answers)
    pull.start(0.0)
    (want,) = pull.on_tick(PATIENCE_S + 1)
    for raw in BlobSender(there).answer(want):  # type: ignore[union-attr]
        pull.on_chunk(Chunk.parse(raw), PATIENCE_S + 1.01)
    assert pull.is_done
    assert answers.slowest_s == 0.0


def test_a_server_that_says_that_it_is_there_is_reminded_of_what_is_overdue_alone(
    stores: tuple[BlobStore, BlobStore],
) -> None:
    there, here = stores
    ref = there.put(b"d" * LEAF_BYTES)
    slow, quick = ResponseTime(), ResponseTime()
    slow.note_connection(4.0)
    quick.note_connection(0.01)
    for answers, expected in ((slow, 0), (quick, 1)):
        pull = Pull(ref, here.partial(ref), answers=answers)
        pull.start(0.0)
        assert len(pull.repeat_due(3.0)) == expected
        assert len(pull.repeat_due(100.0)) == 1


@given(st.lists(st.one_of(st.floats(0, 1e6), st.floats(0, 1e6).map(lambda x: -x - 1)), max_size=30))
@settings(max_examples=50)
def test_patience_has_bounds_and_covers_the_last_answer(took: list[float]) -> None:
    answers = ResponseTime()
    for seconds in took:
        if seconds < 0:
            answers.note_connection(-seconds - 1)
            answers.note_peer_measurement(-seconds - 1)
        else:
            answers.note_response(seconds)
            assert answers.patience(PATIENCE_S) >= min(2 * seconds, MAX_PATIENCE_S)
    assert PATIENCE_S <= answers.patience(PATIENCE_S) <= MAX_PATIENCE_S
    assert answers.patience(500.0) == 500.0


def test_numbers_of_requests_do_not_depend_on_a_seed_of_the_user_s_program() -> None:
    numbers = set()
    for _ in range(2):
        random.seed(0)
        numbers.add(with_request_number(BlobRequest("ab" * 32, "data", 0, 4)).number)
    assert len(numbers) == 2


def test_a_want_that_came_before_is_the_same_one_only_from_the_same_device_by_its_number() -> None:
    plain = BlobRequest("ab" * 32, "data", 0, 4)
    first, second = with_request_number(plain), with_request_number(plain)
    wants = SeenRequests()
    assert [wants.is_duplicate("a", w) for w in (first, second, first, plain, plain)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert not wants.is_duplicate("b", first)
    for _ in range(5000):
        wants.is_duplicate("b", with_request_number(plain))
    assert not wants.is_duplicate("a", first)  # long ago
