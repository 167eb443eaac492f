"""Messages of sensors over MQTT, as gateways and firmwares publish them, and the rows that they mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune_device.sensors.config import read_sensor_config
from fedprune_device.sensors.sample_collector import DropCounts, SampleCollector

_HEAD = 'broker = "mqtt://127.0.0.1"\nboard = "127.0.0.1:80"\nperiod = 60\nmax_age = 150\n'
_ROOM = '[[channels]]\npath = "temperature"\nrange = [-40, 80]\n[[channels]]\npath = "humidity"\n'
_ZIGBEE = f'topic = "zigbee2mqtt/room"\navailability = "zigbee2mqtt/room/availability"\n{_ROOM}'


@dataclass(frozen=True)
class Stream:
    """Messages, one a minute or several, and the rows that a board should get.

    Attributes:
        name: What it is, in a reader's words.
        config: The sensors' file, without its head.
        messages: Of each minute: topic, text or object, and whether the broker had retained it.
        rows: The rows that hold, one for each minute with values that are young enough.
    """

    name: str
    config: str
    messages: Sequence[Sequence[tuple[Any, ...]]]
    rows: Sequence[Sequence[float]]


def read_stream(stream: Stream, folder: Path) -> tuple[list[list[float]], str]:
    """The rows that a board gets, and what is said of the rest."""
    file = folder / "sensors.toml"
    file.write_text(_HEAD + stream.config)
    drops = DropCounts()
    collector = SampleCollector(read_sensor_config(file), drops)
    rows: list[list[float]] = []
    for minute, messages in enumerate(stream.messages):
        for topic, body, *retained in messages:
            text = body if isinstance(body, str) else json.dumps(body)
            collector.receive(topic, text.encode(), 60.0 * minute, is_retained=bool(retained))
        rows += [row for sample in collector.collect(60.0 * minute, 1) for row in sample.rows]
    return rows, drops.take()


def streams() -> Iterator[Stream]:
    """All kinds of streams."""
    topic = "zigbee2mqtt/room"
    warm, cool = {"temperature": 21.5, "humidity": 40, "battery": 90}, {"temperature": 20, "humidity": 41.5}
    yield Stream(
        "Zigbee2MQTT: an object of several values",
        _ZIGBEE,
        [[(topic, warm)], [(topic, cool)]],
        [[21.5, 40], [20, 41.5]],
    )
    yield Stream("a value that repeats until the next message", _ZIGBEE, [[(topic, warm)], []], [[21.5, 40]] * 2)
    yield Stream(
        "a sensor that stops: values are too old after 150 s",
        _ZIGBEE,
        [[(topic, warm)], [], [], [], []],
        [[21.5, 40]] * 3,
    )
    yield Stream(
        "values in messages of their own",
        _ZIGBEE,
        [[(topic, {"temperature": 21.5})], [(topic, {"humidity": 40})]],
        [[21.5, 40]],
    )
    for word in ("unavailable", "unknown", None, "NaN", ""):
        yield Stream(
            f"{json.dumps(word)} in place of a number",
            _ZIGBEE,
            [[(topic, warm)], [(topic, {"temperature": word, "humidity": 40})], [(topic, cool)]],
            [[21.5, 40], [20, 41.5]],
        )
    yield Stream("a retained message of unknown age", _ZIGBEE, [[(topic, warm, True)], [(topic, cool)]], [[20, 41.5]])
    yield Stream(
        "availability: offline, then online",
        _ZIGBEE,
        [
            [(topic, warm)],
            [(f"{topic}/availability", {"state": "offline"})],
            [(f"{topic}/availability", "online"), (topic, cool)],
        ],
        [[21.5, 40], [20, 41.5]],
    )
    yield Stream(
        "a value out of range: 85 °C of a DS18B20 that has lost power",
        _ZIGBEE,
        [[(topic, warm)], [(topic, {"temperature": 85, "humidity": 40})]],
        [[21.5, 40]] * 2,
    )
    yield Stream("numbers as texts", _ZIGBEE, [[(topic, {"temperature": "21.5", "humidity": "40"})]], [[21.5, 40]])
    yield Stream("a decimal comma in a text", _ZIGBEE, [[(topic, {"temperature": "21,5", "humidity": 40})]], [])
    yield Stream(
        "a message that is no JSON", _ZIGBEE, [[(topic, warm)], [(topic, '{"temperature": 2')]], [[21.5, 40]] * 2
    )
    late = _ZIGBEE.replace("[[channels]]\n", '[[channels]]\ntime = "last_seen"\n')
    yield Stream(
        "messages out of order, by their own times",
        late,
        [
            [(topic, {**warm, "last_seen": "2024-03-01T10:02:00Z"})],
            [(topic, {**cool, "last_seen": "2024-03-01T10:01:00Z"})],
        ],
        [[21.5, 40]] * 2,
    )
    tasmota = '[[channels]]\ntopic = "tele/yard/SENSOR"\npath = "AM2301.Temperature"\n[[channels]]\n'
    yield Stream(
        "Tasmota: objects in objects, from two devices",
        f'{tasmota}topic = "tele/plug/SENSOR"\npath = "ENERGY.Power"\n',
        [
            [
                ("tele/yard/SENSOR", {"Time": "2024-03-01T10:00:00", "AM2301": {"Temperature": 4.5}}),
                ("tele/plug/SENSOR", {"ENERGY": {"Power": 60}}),
            ]
        ],
        [[4.5, 60]],
    )
    yield Stream(
        "ESPHome: a number is the message",
        '[[channels]]\nname = "t"\ntopic = "porch/sensor/t/state"\n[[channels]]\nname = "h"\n'
        'topic = "porch/sensor/h/state"\n',
        [[("porch/sensor/t/state", "4.5"), ("porch/sensor/h/state", " 80\n")], [("porch/sensor/t/state", "nan")]],
        [[4.5, 80]],
    )
    yield Stream(
        "several devices by a wildcard, each with rows of its own",
        f'topic = "zigbee2mqtt/+"\n{_ROOM}',
        [[("zigbee2mqtt/attic", warm), ("zigbee2mqtt/cellar", cool)], [("zigbee2mqtt/attic", cool)]],
        [[21.5, 40], [20, 41.5], [20, 41.5], [20, 41.5]],
    )
    yield Stream(
        "states: ON and OFF",
        '[[channels]]\nname = "door"\ntopic = "stat/door/POWER"\n',
        [[("stat/door/POWER", "ON")], [("stat/door/POWER", "OFF")]],
        [[1], [0]],
    )
    yield Stream("an object without the field", _ZIGBEE, [[(topic, {"linkquality": 90})]], [])
