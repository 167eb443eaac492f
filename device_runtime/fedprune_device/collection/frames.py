"""JPEG frames of an MJPEG stream: of a pipe, or of a recording, which may be an AVI file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedprune_device.data.image_decoding import MAX_BYTES

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_SCAN = 0xDA  # the segment before an image's coded numbers, in which the end's marker can't occur
_ALONE = (0x01, *range(0xD0, 0xDA))  # markers without a segment
_PIECE = 2**16


class FrameSplitter:
    """Finds the frames in pieces of a stream; what is between them, or damaged, is skipped."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._at, self._scans = 0, False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The frames that a piece completes."""
        self._rest += piece
        while True:
            start = self._rest.find(_START)
            if start:
                del self._rest[: start if start > 0 else max(0, len(self._rest) - len(_START) + 1)]
                self._at, self._scans = 0, False
            if start < 0:
                return
            end = self._end()
            if end is None and len(self._rest) <= MAX_BYTES:
                return
            if end is None:  # larger than any image that is taken
                end = len(self._rest)
            elif end:
                yield bytes(self._rest[:end])
            del self._rest[: end or 2]
            self._at, self._scans = 0, False

    def _end(self) -> int | None:
        """The length of the frame at the beginning: 0 if it is none, None if it isn't whole yet."""
        rest, at = self._rest, max(self._at, 2)
        while not self._scans:
            self._at = at
            if at + 4 > len(rest):
                return None
            marker, size = rest[at + 1], int.from_bytes(rest[at + 2 : at + 4], "big")
            if rest[at] != 0xFF or marker in _ALONE or (size < 2 and marker != 0xFF):
                return 0
            if marker == 0xFF:  # filling
                at += 1
                continue
            at += 2 + size
            self._scans = marker == _SCAN
        found = rest.find(_END, at)
        self._at = max(at, len(rest) - 1)
        return None if found < 0 else found + len(_END)


def frames(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The frames of a stream, whose next bytes `read` returns."""
    splitter = FrameSplitter()
    while piece := read(_PIECE):
        yield from splitter.feed(piece)
