"""`fedprune-device sensors` between a real broker and a board."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from support.fakes.local_interface import LocalInterface, local_interface
from support.waiting import attempts, until

pytestmark = [pytest.mark.mosquitto, pytest.mark.system]

CONFIG = """
broker = "{broker}"
board = "{board}"
period = 0.05
max_age = 60
[[channels]]
topic = "t/temperature"
name = "temperature"
[[channels]]
topic = "t/room"
path = "humidity"
[label]
topic = "t/state"
"""


def publish(url: str, topic: str, body: str, *, retain: bool = False) -> None:
    from paho.mqtt import publish as paho

    host, port = url.removeprefix("mqtt://").split(":")
    paho.single(topic, body, qos=1, retain=retain, hostname=host, port=int(port))


def samples_of(board: LocalInterface) -> list[tuple[str, Any]]:
    return [(path, load(body)["x"]) for path, _, body in board.samples]


def test_samples_are_handed_in_and_a_broker_that_restarts_is_found_again(
    start_mosquitto: Callable[..., Any], tmp_path: Path
) -> None:
    broker = start_mosquitto()
    publish(broker.url, "t/temperature", "-99", retain=True)
    publish(broker.url, "t/state", "bee", retain=True)
    config, log = tmp_path / "sensors.toml", tmp_path / "log"
    with local_interface([2, 3]) as board, log.open("w") as stderr:
        config.write_text(CONFIG.format(broker=broker.url, board=board.address))
        command = [sys.executable, "-m", "fedprune_device.cli.main", "sensors", "--config", str(config)]
        process = subprocess.Popen(command, stderr=stderr)
        try:
            until(lambda: "connected" in log.read_text(), "the connection", log.read_text)
            publish(broker.url, "t/room", json.dumps({"humidity": 40}))
            publish(broker.url, "t/temperature", "21.5")
            until(lambda: len(board.samples) > 1, "samples", log.read_text)
            assert process.poll() is None
            broker.kill()
            until(lambda: "ended" in log.read_text(), "the end of the connection", log.read_text)
            start_mosquitto(broker.port)
            for _ in attempts("values after the restart", log.read_text):  # a message may come before the subscription
                publish(broker.url, "t/temperature", "22.5")
                if samples_of(board)[-1][1].max() == 40 and 22.5 in samples_of(board)[-1][1]:
                    break
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
        path, first = samples_of(board)[0]
    assert code == 0, log.read_text()
    assert path == "/v1/samples?label=bee"
    np.testing.assert_array_equal(first, np.float32([[21.5] * 3, [40] * 3]))
    lines = [line for line in log.read_text().splitlines() if "left out" in line]
    assert len(lines) <= 2
    assert "1 retained" in "".join(lines)


def test_a_model_of_other_channels_ends_the_program_with_the_order_that_it_wants(
    start_mosquitto: Callable[..., Any], tmp_path: Path
) -> None:
    broker, config = start_mosquitto(), tmp_path / "sensors.toml"
    with local_interface([3, 128]) as board:
        config.write_text(CONFIG.format(broker=broker.url, board=board.address))
        command = [sys.executable, "-m", "fedprune_device.cli.main", "sensors", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 14
    assert "channels of the sensors" in done.stderr
