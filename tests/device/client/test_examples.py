"""The example programs that hand a camera's and a sensor's samples to a board."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fedprune_device.client import Board
from support.fakes.local_interface import local_interface
from support.paths import ROOT

pytestmark = pytest.mark.board


def test_a_cameras_frames_are_handed_in_whole_and_a_damaged_one_costs_itself_alone() -> None:
    frames = [b"\xff\xd8" + bytes([n]) * 90_000 + b"\xff\xd9" for n in range(4)]
    stream = b"noise" + frames[0] + b"\xff\xd8cut off" + frames[1] + b"\0\0" + frames[2] + frames[3][:-2]
    command = [sys.executable, ROOT / "examples" / "camera_to_board.py"]
    with local_interface([3, 12, 16]) as board:
        done = subprocess.run([*command, board.address, "--every", "0"], input=stream, capture_output=True, check=True)
    assert board.samples == [("/v1/samples", "image/jpeg", frame) for frame in frames[:3]]
    assert len(done.stdout.split()) == 3


def test_a_sensors_rows_are_samples_and_none_spans_a_malformed_one() -> None:
    with local_interface([2, 3]) as board:
        sensor = runpy.run_path(str(ROOT / "examples" / "sensor_to_board.py"))["Sensor"](Board(board.address), "t")
        bodies = ([1, 2, 3], {"x": [4, 5, 6], "label": "bee"}, [0, 0, 0], [1, 2], [7, 8, 9], [10, 11, 12])
        for body in bodies:
            sensor.on_message(None, None, SimpleNamespace(payload=json.dumps(body).encode()))
    assert [(path, json.loads(body)) for path, _, body in board.samples] == [
        ("/v1/samples?label=bee", {"x": [[1, 2, 3], [4, 5, 6]]}),
        ("/v1/samples", {"x": [[7, 8, 9], [10, 11, 12]]}),
    ]
