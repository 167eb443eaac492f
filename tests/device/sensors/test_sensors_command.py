"""`fedprune-device sensors` between a real broker and a board."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def sensors_program(config: Path, log: Path) -> Iterator[None]:
    """The program while the body runs; it has a connection when the body begins."""
    command = [sys.executable, "-m", "fedprune_device.cli.main", "sensors", "--config", str(config)]
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            until(lambda: "connected" in log.read_text(), "the connection", log.read_text)
            yield
        finally:
            process.send_signal(signal.SIGTERM)


def test_a_board_without_a_model_gets_samples_of_the_settings_and_then_those_that_its_model_takes(
    start_mosquitto: Callable[..., Any], tmp_path: Path
) -> None:
    broker, config, log = start_mosquitto(), tmp_path / "sensors.toml", tmp_path / "log"
    with local_interface(None) as board:
        config.write_text("steps = 3" + CONFIG.format(broker=broker.url, board=board.address))
        with sensors_program(config, log):
            publish(broker.url, "t/room", json.dumps({"humidity": 40}))
            publish(broker.url, "t/temperature", "21.5")
            until(lambda: len(board.samples) > 1, "samples", log.read_text)
            assert samples_of(board)[-1][1].shape == (2, 3)
            board.shape = [4, 2]
            until(lambda: samples_of(board)[-1][1].shape == (4, 2), "samples for the model", log.read_text)
    warnings = [line for line in log.read_text().splitlines() if "Correct the settings" in line]
    assert len(warnings) == 1
    assert "[4, 2]" in warnings[0]
    assert "[2, 3]" in warnings[0]


def test_a_board_that_can_not_be_reached_is_told_from_one_without_a_model(
    start_mosquitto: Callable[..., Any], tmp_path: Path
) -> None:
    broker, config, log = start_mosquitto(), tmp_path / "sensors.toml", tmp_path / "log"
    away = f"unix:{tmp_path}/none.sock"
    with local_interface(None) as board:
        for address, problem in ((away, f"the board at {away} can't be reached"), (board.address, "Set steps")):
            config.write_text(CONFIG.format(broker=broker.url, board=address))
            with sensors_program(config, log):
                until(lambda text=problem: text in log.read_text(), problem, log.read_text)
            report = log.read_text().splitlines()[-1]
            assert "left out" in report
            assert problem in report


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
