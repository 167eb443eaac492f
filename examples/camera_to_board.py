"""A camera's frames as samples of a board, through its local interface.

    BOARD=unix:/var/lib/fedprune/local.sock
    ffmpeg -v error -f v4l2 -i /dev/video0 -f mjpeg - | python camera_to_board.py $BOARD --shape 3,96,96
    rpicam-vid -t 0 --codec mjpeg -o - | python camera_to_board.py $BOARD --shape 3,96,96 --every 60

It reads JPEG images, one after the other, from standard input. A frame has no label: it waits for one on the board.
A server sends a model only to boards with samples: until then `--shape` says what size of images this model takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

from fedprune_device.client import Board, BoardError

START, END = b"\xff\xd8", b"\xff\xd9"
MAX_BYTES = 8 * 2**20  # the local interface takes no larger image


def frames() -> Iterator[bytes]:
    rest = b""
    while piece := sys.stdin.buffer.read1(2**16):
        *complete, rest = (rest + piece).split(END)
        rest = rest[-MAX_BYTES:]  # a stream without an end of a frame is no reason to run out of memory
        for text in complete:
            start = text.rfind(START)  # the last one: what is before it is a frame that lost its end
            if start >= 0:
                yield text[start:] + END


def shape(text: str) -> tuple[int, int, int]:
    colours, height, width = map(int, text.split(","))
    return colours, height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("board", help="unix:/path or 127.0.0.1:PORT, as `fedprune-device run --local` has it")
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between two (default: 60)")
    parser.add_argument("--shape", type=shape, metavar="C,H,W", help="of the model's images, such as 3,96,96")
    arguments = parser.parse_args()
    board, due = Board(arguments.board), time.monotonic()
    for frame in frames():
        if time.monotonic() < due:
            continue
        due = time.monotonic() + arguments.every
        try:
            print(board.add(frame, shape=arguments.shape)["id"], flush=True)
        except BoardError as error:  # it may be starting, or be given its first model: the next frame may fit
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
