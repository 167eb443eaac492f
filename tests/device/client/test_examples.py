"""The example program that hands a camera's samples to a board."""

import subprocess
import sys

import pytest

from support.fakes.local_interface import local_interface
from support.paths import ROOT

pytestmark = pytest.mark.board


def test_a_cameras_frames_are_handed_in_whole_and_a_damaged_one_costs_itself_alone() -> None:
    frames = [b"\xff\xd8" + bytes([n]) * 90_000 + b"\xff\xd9" for n in range(4)]
    stream = b"noise" + frames[0] + b"\xff\xd8cut off" + frames[1] + b"\0\0" + frames[2] + frames[3][:-2]
    command = [sys.executable, ROOT / "examples" / "camera_to_board.py", "--every", "0", "--shape", "3,12,16"]
    with local_interface([3, 12, 16]) as board:
        done = subprocess.run([*command, board.address], input=stream, capture_output=True, check=True)
    assert board.samples == [("/v1/samples?shape=3%2C12%2C16", "image/jpeg", frame) for frame in frames[:3]]
    assert len(done.stdout.split()) == 3
