"""What a broker drops is noticed by requests that come again and again, and what is only slow or in pieces is not."""

from pathlib import Path

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.lost_pieces import STUCK_S, LostPieces
from fedprune.wire.messages import BlobRequest
from fedprune.wire.transfer import Pull

pytestmark = pytest.mark.board

LONGEST = 5_000
"""Bytes of a message that a broker with a low limit lets through."""


def transfer(folder: Path, size: int, *, passes: int, from_s: float = 0.0) -> tuple[list[float], bool]:
    """When pieces counted as lost in 120 s of a transfer, and whether it ended.

    Args:
        passes: The broker drops longer messages.
        from_s: It does so from this time on.
    """
    source, target = BlobStore(folder / "source"), BlobStore(folder / "target")
    ref = source.put(bytes(range(256)) * (size // 256))
    pull, sender, pieces = Pull(ref, target.partial(ref)), BlobSender(source), LostPieces()
    noticed: list[float] = []
    wants = pull.start(0.0)
    for now in (n / 2 for n in range(240)):
        follow_ups: list[BlobRequest] = []
        for want in wants:
            noticed += [now] if pieces.note_request(want, now) else []
            answer = sender.answer(want)
            for raw in answer if not isinstance(answer, BlobRequest) else ():
                if len(raw) <= passes or now < from_s:
                    follow_ups += pull.on_chunk(Chunk.parse(raw), now)
        wants = [*follow_ups, *pull.on_tick(now)]
    return noticed, pull.is_done


def test_pieces_that_are_longer_than_the_broker_allows_are_noticed_once_they_are_not_only_slow(tmp_path: Path) -> None:
    noticed, done = transfer(tmp_path, 3_000_000, passes=LONGEST)
    assert not done
    assert len(noticed) == 1
    assert STUCK_S <= noticed[0] <= 80


def test_a_broker_that_begins_to_drop_in_the_middle_is_noticed_as_soon(tmp_path: Path) -> None:
    noticed, done = transfer(tmp_path, 30_000_000, passes=LONGEST, from_s=1.0)
    assert not done
    assert noticed
    assert STUCK_S <= noticed[0] <= 81


def test_a_transfer_that_works_is_not_noticed(tmp_path: Path) -> None:
    assert transfer(tmp_path, 3_000_000, passes=2**20) == ([], True)


def test_chunks_that_shrink_until_they_get_through_are_not_noticed(tmp_path: Path) -> None:
    assert transfer(tmp_path, 3_000_000, passes=40_000) == ([], True)
