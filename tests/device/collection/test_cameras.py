from __future__ import annotations

import ctypes
import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import DataError
from fedprune_device.collection import camera
from fedprune_device.collection.camera import Camera
from fedprune_device.collection.frames import FrameSplitter, frames
from fedprune_device.data.image_decoding import MAX_BYTES, Pixels

pytestmark = pytest.mark.board


def jpeg(number: int, **options: Any) -> bytes:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (16, 12), (number % 256, 90, 160)).save(file, "JPEG", **options)
    return file.getvalue()


def split(stream: bytes, size: int) -> list[bytes]:
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    splitter = FrameSplitter()
    return [frame for piece in pieces for frame in splitter.feed(piece)]


@given(st.integers(1, 900), st.lists(st.binary(max_size=9), min_size=5, max_size=5))
def test_frames_are_found_in_pieces_of_any_size(size: int, between: list[bytes]) -> None:
    wanted = [jpeg(n, comment=b"\xff\xd8\xff\xd9", restart_marker_blocks=1) for n in range(5)]
    noise = [gap.replace(b"\xff", b"") for gap in between]  # as an AVI file's heads of its parts
    assert split(b"".join(a + b for a, b in zip(noise, wanted, strict=True)), size) == wanted


@given(st.binary(max_size=40), st.one_of(st.integers(0, 40), st.integers(-700, -1)), st.integers(100, 90_000))
def test_a_damaged_frame_costs_what_a_false_length_can_hide_at_most(noise: bytes, at: int, size: int) -> None:
    sound = [jpeg(n, comment=bytes(30_000)) for n in range(8)]  # a length is below 65,536
    damaged = sound[1][:at] + noise + sound[1][at:][1:]
    found = split(b"".join([sound[0], damaged, *sound[2:]]), size)
    assert found[0] == sound[0]
    assert found[-2:] == sound[-2:]


def test_a_frame_without_an_end_is_dropped_in_bounded_memory() -> None:
    splitter, head = FrameSplitter(), jpeg(1)[:-2]
    list(splitter.feed(head))
    for _ in range(3 * MAX_BYTES // 2**16):
        assert not list(splitter.feed(bytes(2**16)))
        assert len(splitter._rest) <= MAX_BYTES + 2**16
    assert list(splitter.feed(jpeg(2))) == [jpeg(2)]


def test_a_cameras_frame_without_its_tables_is_read(tmp_path: Path) -> None:
    """Many cameras leave out the Huffman tables, which are always the same."""
    whole, out, at = jpeg(7), bytearray(b"\xff\xd8"), 2
    while whole[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(whole[at + 2 : at + 4], "big")
        out += b"" if whole[at + 1] == 0xC4 else whole[at:end]
        at = end
    bare = bytes(out) + whole[at:]
    assert len(bare) < len(whole)
    assert list(frames(io.BytesIO(bare).read)) == [bare]
    assert (Pixels().read(bare, ("JPEG",), (3, 12, 16)) == Pixels().read(whole, ("JPEG",), (3, 12, 16))).all()


class RecordedCamera:
    """A driver whose frames are those of a recording; its memory is a file. It drops frames that have no buffer."""

    SIZE = 2**16

    def __init__(self, path: Path, recording: Iterator[bytes], pixels: int = camera.MJPEG) -> None:
        self.path, self.recording, self.pixels = path, recording, pixels
        path.write_bytes(bytes(4 * self.SIZE))
        self.queued: list[int] = []
        self.filled: list[tuple[int, int]] = []
        self.on = False

    def __call__(self, file: int, request: int, argument: Any) -> None:
        if request == camera.SET_FORMAT:
            assert argument.fmt.pix.pixelformat == camera.MJPEG
            argument.fmt.pix.pixelformat = self.pixels
        elif request == camera.REQUEST_BUFFERS:
            argument.count = min(argument.count, 3)
        elif request == camera.QUERY_BUFFER:
            argument.length, argument.m.offset = self.SIZE, argument.index * self.SIZE
        elif request == camera.QUEUE_BUFFER:
            self.queued.append(argument.index)
        elif request == camera.STREAM_ON:
            assert argument.value == 1
            self.on = True
        elif request == camera.DEQUEUE_BUFFER:
            assert self.on
            while self.queued:  # time goes by
                index, frame = self.queued.pop(0), next(self.recording, None)
                if frame is None:
                    raise OSError(19, "No such device")
                with self.path.open("r+b") as memory:
                    memory.seek(index * self.SIZE)
                    memory.write(frame)
                self.filled.append((index, len(frame)))
            argument.index, argument.bytesused = self.filled.pop(0)
        else:
            raise OSError(25, "Inappropriate ioctl for device")


def test_a_camera_gives_the_newest_frame_until_it_is_gone(tmp_path: Path) -> None:
    recording = [jpeg(n) for n in range(14)]
    driver = RecordedCamera(tmp_path / "video0", iter(recording))
    with Camera(driver.path, driver) as opened:
        assert opened.frame() == recording[3]  # after those that wait in three buffers
        assert opened.frame() == recording[7]
        assert opened.frame() == recording[11]
        with pytest.raises(DataError, match="No such device"):
            opened.frame()


def test_a_camera_without_jpeg_is_refused(tmp_path: Path) -> None:
    driver = RecordedCamera(tmp_path / "video0", iter(()), int.from_bytes(b"YUYV", "little"))
    with pytest.raises(DataError) as caught:
        Camera(driver.path, driver)
    assert caught.value.got == "YUYV"


def test_what_is_no_camera_is_refused() -> None:
    with pytest.raises(DataError):
        Camera(Path("/dev/null"))
    with pytest.raises(DataError):
        Camera(Path("/dev/no-such-camera"))


C = """
#include <linux/videodev2.h>
#include <stddef.h>
#include <stdio.h>
int main(void) {
    printf("%lu %lu %lu %lu %lu %lu ", VIDIOC_S_FMT, VIDIOC_REQBUFS, VIDIOC_QUERYBUF, VIDIOC_QBUF, VIDIOC_DQBUF,
           VIDIOC_STREAMON);
    printf("%zu %zu %zu ", offsetof(struct v4l2_format, fmt.pix.pixelformat), offsetof(struct v4l2_buffer, flags),
           offsetof(struct v4l2_buffer, m.offset));
    printf("%zu %d %d %d %d", offsetof(struct v4l2_buffer, length), V4L2_PIX_FMT_MJPEG, V4L2_BUF_FLAG_ERROR,
           V4L2_BUF_TYPE_VIDEO_CAPTURE, V4L2_MEMORY_MMAP);
}
"""


@pytest.mark.once
def test_structures_and_requests_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    if not Path("/usr/include/linux/videodev2.h").exists():
        pytest.skip("linux/videodev2.h is not installed")
    (tmp_path / "a.c").write_text(C)
    subprocess.run(["gcc", "-w", str(tmp_path / "a.c"), "-o", str(tmp_path / "a")], check=True)
    found = [int(n) for n in subprocess.run([tmp_path / "a"], capture_output=True, check=True).stdout.split()]
    buffer, pixels = camera.Buffer, camera._Pixels.pixelformat.offset
    assert found == [
        camera.SET_FORMAT, camera.REQUEST_BUFFERS, camera.QUERY_BUFFER, camera.QUEUE_BUFFER, camera.DEQUEUE_BUFFER,
        camera.STREAM_ON, camera.Format.fmt.offset + pixels, buffer.flags.offset, buffer.m.offset,
        buffer.length.offset, camera.MJPEG, camera._DAMAGED, camera._CAPTURE, camera._MMAP,
    ]  # fmt: skip
    assert ctypes.sizeof(buffer) == (camera.QUEUE_BUFFER >> 16) & 0x3FFF
