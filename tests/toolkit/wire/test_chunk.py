import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.core.errors import ProtocolError
from fedprune.wire.chunk import HEADER_STRUCT, Chunk, leaves_per_chunk
from fedprune.wire.topics import Topics

pytestmark = pytest.mark.board

DIGEST = "ab" * 32


@given(st.from_regex(r"[0-9a-f]{64}", fullmatch=True), st.sampled_from(["data", "leaves"]), st.integers(0, 2**32 - 1),
       st.binary(min_size=1, max_size=100))  # fmt: skip
def test_what_was_sent_is_what_is_read(sha256: str, blob_part: str, first: int, payload: bytes) -> None:
    chunk = Chunk(sha256, blob_part, first, payload)

    assert Chunk.parse(chunk.to_bytes()) == chunk
    assert len(chunk.to_bytes()) == HEADER_STRUCT.size + len(payload) == 44 + len(payload)


@given(
    st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: Chunk(DIGEST, "data", 0, b"x").to_bytes()[:44] + b)
)
@settings(max_examples=300)
def test_any_bytes_raise_nothing_but_protocol_errors(raw: bytes) -> None:
    try:
        chunk = Chunk.parse(raw)
    except ProtocolError:
        return
    assert chunk.to_bytes() == raw


@pytest.mark.parametrize(("limit", "leaves"), [(48 * 1024, 1), (256 * 1024, 7), (2**28, 32)])
def test_chunks_stay_below_a_broker_s_packet_limit(limit: int, leaves: int) -> None:
    assert leaves_per_chunk(limit) == leaves
    topic = Topics("s" * 64).down_blob("d" * 64, "j" * 64)
    chunk = Chunk(DIGEST, "data", 0, bytes(leaves * LEAF_BYTES)).to_bytes()

    packet = 1 + 4 + 2 + len(topic) + 2 + len(chunk)  # type, length, topic, packet id, payload
    assert packet <= limit


@given(first=st.integers(0, 50), size=st.integers(1, 6 * LEAF_BYTES), wanted_leaves=st.sets(st.integers(0, 60)))
def test_runs_are_the_wanted_leaves_with_what_is_consecutive_in_one(
    first: int, size: int, wanted_leaves: set[int]
) -> None:
    chunk = Chunk(DIGEST, "data", first, bytes(size - 1) + b"x")
    leaves = dict(chunk.leaves())

    runs = list(chunk.runs(wanted_leaves))

    read_leaves: dict[int, bytes] = {}
    for start, payload in runs:
        read_leaves |= {
            start + at // LEAF_BYTES: bytes(payload[at : at + LEAF_BYTES]) for at in range(0, len(payload), LEAF_BYTES)
        }
    assert read_leaves == {i: bytes(leaf) for i, leaf in leaves.items() if i in wanted_leaves}
    assert all(start - 1 not in read_leaves for start, _ in runs)


@pytest.mark.parametrize(
    ("at", "byte"),
    [(0, b"X"), (3, b"\2"), (4, b"\2"), (5, b"\1"), (7, b"\1")],
    ids=["magic", "version", "part", "pad", "pad"],
)
def test_a_wrong_header_is_refused(at: int, byte: bytes) -> None:
    raw = bytearray(Chunk(DIGEST, "data", 0, b"x").to_bytes())
    raw[at : at + 1] = byte

    with pytest.raises(ProtocolError, match="chunk"):
        Chunk.parse(bytes(raw))
