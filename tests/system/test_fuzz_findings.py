"""What the fuzzer has found: each of these inputs once ended in another exception than ours, or in too much memory."""

import io
import json
import resource
import struct
import tracemalloc
import zipfile
import zlib
from contextlib import suppress

import numpy as np
import pytest

from fedprune.core.errors import FedpruneError, ProtocolError
from support.faults.parser_target import Target
from support.faults.parsers_of_boards import board_targets
from support.faults.parsers_of_files import file_targets, npz, zip_bytes
from support.faults.parsers_of_messages import wire_targets
from support.faults.parsers_of_setup import setup_targets

TARGETS = {t.name: t for t in (*file_targets(), *board_targets(), *setup_targets())}
DEEP = b"[" * 100_000
HUGE = 10**400


def seed_with(target: Target, **changes: object) -> bytes:
    """The first sound input, with other values under these keys."""
    return json.dumps({**json.loads(target.seeds[0]), **changes}).encode()


def bad_deflate() -> bytes:
    """An archive of which one array's packed bytes are damaged."""
    raw = bytearray(npz(x=np.zeros((2, 4), np.float32), y=np.array([0, 1])))
    start = 30 + len("x.npy") + struct.unpack_from("<H", raw, 28)[0]
    raw[start : start + 8] = b"\xff" * 8
    return bytes(raw)


def changed_zip(at: int, value: bytes) -> bytes:
    """An archive with other bytes in its first entry's record, counted from the record's beginning."""
    raw = bytearray(zip_bytes({"app/__init__.py": b"x" * 10}))
    record = raw.index(b"PK\x01\x02")
    raw[record + at : record + at + len(value)] = value
    return bytes(raw)


FOUND: list[tuple[str, bytes]] = [
    ("settings.sweep", b'config = "' + b"a" * 300 + b'"'),
    ("state.job", DEEP),
    ("state.rollout", seed_with(TARGETS["state.rollout"], now=HUGE)),
    ("state.record of a run", DEEP),
    ("state.record of a run", seed_with(TARGETS["state.record of a run"], groups=[["w", float("inf")]])),
    ("data.labelled", bad_deflate()),
    ("samples.to predict", bad_deflate()),
    ("samples.to predict", b"\x93NUMPY\x01\x00\x14\x00{'descr': (((\n    \n "),  # an array whose header is no Python
    ("wheel.unpacked", changed_zip(42, b"\xff\xff\xff\xff")),
    ("wheel.unpacked", changed_zip(6, b"\x80\x00")),
    ("wheel.unpacked", zip_bytes({"app": b"x", "app/x.py": b"x"})),
    ("wheel.metadata", changed_zip(6, b"\x80\x00")),
    ("wheel.file name", b"a-" + b"1" * 5000 + b"-py3-none-any.whl"),
    ("kept.serving", seed_with(TARGETS["kept.serving"], offset=[HUGE, 0])),
]


@pytest.mark.parametrize(("name", "raw"), FOUND, ids=[f"{name} {number}" for number, (name, _) in enumerate(FOUND)])
def test_what_was_found_is_refused_in_words(name: str, raw: bytes) -> None:
    with pytest.raises(FedpruneError) as refused:
        TARGETS[name].parse(raw)

    assert 10 < len(str(refused.value)) < 4000


def test_a_slots_record_with_an_infinite_number_is_damaged() -> None:
    target = TARGETS["kept.slot's record"]
    with pytest.raises(target.errors):
        target.parse(target.frame(seed_with(target, version=float("inf"))))


def test_a_line_of_an_index_with_an_infinite_number_is_left_out() -> None:
    TARGETS["samples.index"].parse(b'["a", Infinity, 17, "%s"]\n' % (b"0" * 64))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030149")),  # a curve that nobody has
        (bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d0205")),  # a kind of key that nobody has
        (b"\x06\x03\x55\x04\x03\x0c", b"\x06\x03\x55\x04\x03\x01"),  # a name that is no text
    ],
)
def test_a_certificate_is_read_whole_before_anything_of_it_is_used(old: bytes, new: bytes) -> None:
    target = next(t for t in wire_targets() if t.name == "join.certificate's content")
    assert old in target.seeds[0]
    with pytest.raises(ProtocolError, match="a certificate in PEM"):
        target.parse(target.frame(target.seeds[0].replace(old, new)))


@pytest.mark.parametrize("name", ["samples.npz", "samples.to predict", "data.labelled", "samples.data"])
def test_archives_that_would_fill_the_memory_are_not_unpacked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedprune.core.zip_limits.MAX_INFLATED_BYTES", 2**20)
    raw = npz(x=np.zeros((64, 3, 256, 256), np.float32), y=np.zeros(64, np.int64))
    assert len(raw) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(FedpruneError, match="when it is unpacked"):
            TARGETS[name].parse(raw)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("name", ["samples.npz", "samples.to predict", "data.labelled", "data.npz"])
def test_what_zipfile_unpacks_without_bound_is_refused(name: str, method: int) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros((100, 100)))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x.npy", array.getvalue())
        archive.writestr("y.npy", array.getvalue())
    with pytest.raises(FedpruneError, match="deflate"):
        TARGETS[name].parse(file.getvalue())


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A picture that says that it is so large, with chunks before its pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [
        (b"IHDR", head),
        *chunks,
        (b"IDAT", zlib.compress(bytes((3 * width + 1) * min(height, 8)))),
        (b"IEND", b""),
    ]
    body = b"".join(len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("name", ["local.image", "data.image folder"])
def test_pictures_that_would_fill_the_memory_are_not_decoded(name: str) -> None:
    """40,000 by 40,000 pixels in a few kilobytes; and a small picture with 64 MB of text in it."""
    large = png(40_000, 40_000)
    wordy = png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(64 * 2**20))))
    assert max(len(large), len(wordy)) < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(FedpruneError, match=r"(?i)size|bomb|exceeds"):
            TARGETS[name].parse(large)
        with suppress(FedpruneError):
            TARGETS[name].parse(wordy)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; Pillow's own memory


def test_metadata_that_is_longer_than_it_says_is_not_unpacked_whole() -> None:
    """The archive says ten bytes, and 64 MB follow."""
    raw = bytearray(zip_bytes({"a-1.dist-info/METADATA": bytes(64 * 2**20)}))
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (10).to_bytes(4, "little")
    assert len(raw) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(FedpruneError):
            TARGETS["wheel.metadata"].parse(bytes(raw))
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()
