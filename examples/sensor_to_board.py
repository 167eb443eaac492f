"""A sensor's MQTT messages as samples of a board, through its local interface.

    python sensor_to_board.py mqtts://ann:secret@broker.local/hall/motor unix:/var/lib/fedprune/local.sock

A message is a row of numbers in JSON, one for each channel: `[0.1, -1, 2]`, or `{"x": [0.1, -1, 2], "label": "bee"}`.
A sample is as many rows as the model's input [steps, channels] has steps, with the last row's label, if it has one.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.parse import unquote, urlsplit

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from fedprune_device.client import Board, BoardError


class Sensor:
    """Collects rows until they are a sample. Samples share no rows, so that none is trained and tested on."""

    def __init__(self, board: Board, topic: str) -> None:
        self.board, self.topic = board, topic
        self.rows: list[list[float]] = []
        self.steps = self.channels = 0

    def on_connect(self, client: mqtt.Client, *_: Any) -> None:
        self.rows.clear()  # no sample spans a gap
        client.subscribe(self.topic, qos=1)

    def on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        try:
            self.add(json.loads(message.payload))
        except (ValueError, TypeError, KeyError, BoardError) as error:  # malformed; or the board is starting
            self.rows.clear()
            print(f"left out: {error}", file=sys.stderr)

    def add(self, body: Any) -> None:
        row, label = (body["x"], body.get("label")) if isinstance(body, dict) else (body, None)
        if not self.rows:  # the next round's model may take another shape
            shape = self.board.status()["input"]
            if shape is None:
                raise ValueError("the board doesn't know yet what its model takes")
            self.steps, self.channels = shape
        if len(row) != self.channels:
            raise ValueError(f"expected {self.channels} numbers, got {len(row)}")
        self.rows.append([float(number) for number in row])
        if len(self.rows) == self.steps:
            sample, self.rows = self.rows, []
            print(self.board.add(sample, label)["id"], flush=True)


def main(broker: str, board: str) -> None:
    url = urlsplit(broker)
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    if url.username is not None:
        client.username_pw_set(unquote(url.username), unquote(url.password or ""))
    if url.scheme == "mqtts":
        client.tls_set()
    sensor = Sensor(Board(board), url.path.removeprefix("/"))
    client.on_connect, client.on_message = sensor.on_connect, sensor.on_message
    client.connect(url.hostname or "localhost", url.port or (8883 if url.scheme == "mqtts" else 1883))
    client.loop_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
