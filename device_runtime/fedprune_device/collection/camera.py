"""A camera by Video4Linux2: frames as it compresses them, in JPEG.

The structures and requests are those of `linux/videodev2.h`.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedprune.core.closing import Closing
from fedprune.core.errors import DataError, remedy

_WIDTH, _HEIGHT = 640, 480  # asked for; the camera gives what it has
_BUFFERS = 4
_SILENT_S = 10.0
_CAPTURE, _MMAP, _DAMAGED = 1, 1, 0x40
_U8, _U32 = ctypes.c_uint8, ctypes.c_uint32
MJPEG = int.from_bytes(b"MJPG", "little")


class _Pixels(ctypes.Structure):
    _fields_ = [
        *((name, _U32) for name in ("width", "height", "pixelformat", "field", "bytesperline", "sizeimage")),
        *((name, _U32) for name in ("colorspace", "priv", "flags", "encoding", "quantization", "transfer")),
    ]


class _Formats(ctypes.Union):
    _fields_ = [("pix", _Pixels), ("raw", _U8 * 200), ("_pointer", ctypes.c_void_p)]


class Format(ctypes.Structure):
    """`struct v4l2_format`."""

    _fields_ = [("type", _U32), ("fmt", _Formats)]


class BufferRequest(ctypes.Structure):
    """`struct v4l2_requestbuffers`."""

    _fields_ = [("count", _U32), ("type", _U32), ("memory", _U32), ("capabilities", _U32), ("flags", _U8 * 4)]


class _Place(ctypes.Union):
    _fields_ = [("offset", _U32), ("userptr", ctypes.c_ulong), ("planes", ctypes.c_void_p), ("fd", ctypes.c_int32)]


class Buffer(ctypes.Structure):
    """`struct v4l2_buffer`."""

    _fields_ = [
        *((name, _U32) for name in ("index", "type", "bytesused", "flags", "field")),
        ("timestamp", ctypes.c_long * 2),
        ("timecode", _U32 * 4),
        *((name, _U32) for name in ("sequence", "memory")),
        ("m", _Place),
        *((name, _U32) for name in ("length", "reserved2", "request")),
    ]


def _request(number: int, size: int, *, reads: bool = True) -> int:
    return (3 if reads else 1) << 30 | size << 16 | ord("V") << 8 | number


SET_FORMAT = _request(5, ctypes.sizeof(Format))
REQUEST_BUFFERS = _request(8, ctypes.sizeof(BufferRequest))
QUERY_BUFFER = _request(9, ctypes.sizeof(Buffer))
QUEUE_BUFFER = _request(15, ctypes.sizeof(Buffer))
DEQUEUE_BUFFER = _request(17, ctypes.sizeof(Buffer))
STREAM_ON = _request(18, 4, reads=False)


class Camera(Closing):
    """An open camera, which streams until `close`.

    Raises `DataError` if it can't be used, sends no JPEG, or, in `frame`, is gone.
    """

    def __init__(self, path: Path, ioctl: Callable[[int, int, Any], object] = fcntl.ioctl) -> None:
        self._path, self._ioctl, self._stack = path, ioctl, ExitStack()
        self._buffers: list[mmap.mmap] = []
        with self._stack:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                self._stack.callback(os.close, self._file)
                self._start()
            except OSError as error:
                raise self._failed(error) from error
            self._stack = self._stack.pop_all()

    def close(self) -> None:
        """Stop; closing the file ends the stream."""
        self._stack.close()

    def frame(self) -> bytes:
        """The next frame, after those that have waited."""
        try:
            for _ in self._buffers:
                self._next()
            return self._next()
        except OSError as error:
            raise self._failed(error) from error

    def _start(self) -> None:
        wanted = Format(type=_CAPTURE)
        wanted.fmt.pix.width, wanted.fmt.pix.height, wanted.fmt.pix.pixelformat = _WIDTH, _HEIGHT, MJPEG
        self._ioctl(self._file, SET_FORMAT, wanted)
        if wanted.fmt.pix.pixelformat != MJPEG:
            got = int(wanted.fmt.pix.pixelformat).to_bytes(4, "little").decode("ascii", "replace")
            raise DataError(
                f"frames of {self._path}", expected="MJPG", got=got,
                hint="Pipe them through ffmpeg: docs/board-data.md#cameras",
            )  # fmt: skip
        request = BufferRequest(count=_BUFFERS, type=_CAPTURE, memory=_MMAP)
        self._ioctl(self._file, REQUEST_BUFFERS, request)
        for index in range(request.count):
            buffer = Buffer(index=index, type=_CAPTURE, memory=_MMAP)
            self._ioctl(self._file, QUERY_BUFFER, buffer)
            memory = mmap.mmap(self._file, buffer.length, offset=buffer.m.offset, prot=mmap.PROT_READ)
            self._buffers.append(self._stack.enter_context(memory))
            self._ioctl(self._file, QUEUE_BUFFER, buffer)
        if not self._buffers:
            raise DataError(f"buffers of {self._path}", expected="at least one", got=0)
        self._ioctl(self._file, STREAM_ON, ctypes.c_int(_CAPTURE))

    def _next(self) -> bytes:
        while True:
            if not select.select([self._file], [], [], _SILENT_S)[0]:
                raise DataError(f"{self._path} sends no frames", expected=f"one within {_SILENT_S:g} s")
            buffer = Buffer(type=_CAPTURE, memory=_MMAP)
            self._ioctl(self._file, DEQUEUE_BUFFER, buffer)
            frame = bytes(self._buffers[buffer.index][: buffer.bytesused])
            damaged = buffer.flags & _DAMAGED
            self._ioctl(self._file, QUEUE_BUFFER, buffer)
            if frame and not damaged:
                return frame

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"can't read {self._path}: {error.strerror or error}", hint=remedy(error))
