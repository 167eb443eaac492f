from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError
from fedprune.wire.messages import Offer, parse

pytestmark = pytest.mark.board

REF = BlobRef.of(b"abc")
DIGEST = "ab" * 32
PLAIN = Offer("j", 1, 0, 7, DIGEST, DIGEST, (4, 8), 10, REF, REF, REF, {})


def altered(**values: Any) -> bytes:
    return json.dumps({**json.loads(PLAIN.to_bytes()), **values}).encode()


def test_an_address_of_blobs_is_checked_and_comes_in_one_form() -> None:
    told = parse(altered(blobs_at="https://Models.example:443/lab/"))
    assert told == replace(PLAIN, blobs_at="https://models.example/lab")
    for wrong in ("http://models.example", "https://models.example?x", 7, ""):
        with pytest.raises(ProtocolError, match="offer: field blobs_at"):
            parse(altered(blobs_at=wrong))


def test_of_graphs_in_blocks_the_one_that_is_left_is_pulled() -> None:
    other = BlobRef("3" * 64, 9, "4" * 64)
    blocked = replace(PLAIN, blocked={"16": other})
    assert parse(blocked.to_bytes()) == blocked
    assert (PLAIN.graphs, blocked.graphs) == ((REF, REF), (REF, REF, other))
    assert other in blocked.blobs()
    with pytest.raises(ProtocolError, match="blocked"):
        parse(altered(blocked={str(i): REF.to_dict() for i in range(9)}))


def test_slabs_are_a_list_of_blobs_and_pulled_in_the_weights_place() -> None:
    other = BlobRef("3" * 64, 9, "4" * 64)
    sliced = replace(PLAIN, slabs=(REF, other))
    assert parse(sliced.to_bytes()) == sliced
    assert sliced.blobs() == PLAIN.blobs()
    for slabs in ([], [REF.to_dict()] * 33, {}, [1], "x"):
        with pytest.raises(ProtocolError, match="slabs"):
            parse(altered(slabs=slabs))


def test_weights_that_can_be_decoded_from_something_shorter_are_not_pulled() -> None:
    short, base = BlobRef("3" * 64, 9, "4" * 64), "5" * 64
    coded = replace(PLAIN, weights=BlobRef("6" * 64, 9, "7" * 64), coded=short, held=base)
    assert coded.shorter({base}.__contains__) == (REF, REF, short)
    assert coded.shorter(set().__contains__) == coded.blobs()
    assert coded.shorter({base, coded.weights.sha256}.__contains__) == coded.blobs()
    assert PLAIN.shorter({base}.__contains__) == PLAIN.blobs()
