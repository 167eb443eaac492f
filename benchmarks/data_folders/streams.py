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
        messages: Of each minute: topic, text or object, and whether the broker had retained it.
        rows: The rows that hold, one for each minute with values that are young enough.
        config: The sensors' file, without its head.
    """

    name: str
    messages: Sequence[Sequence[tuple[Any, ...]]]
    rows: Sequence[Sequence[float]]
    config: str = _ZIGBEE


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
    first, second = [21.5, 40], [20, 41.5]

    def room(name: str, *bodies: Any, rows: Sequence[Sequence[float]]) -> Stream:
        """A message of the room in each minute, or none."""
        return Stream(name, [[] if body is None else [(topic, body)] for body in bodies], rows)

    yield room("Zigbee2MQTT: an object of several values", warm, cool, rows=[first, second])
    yield room("a value that repeats until the next message", warm, None, rows=[first] * 2)
    old = "a sensor that stops: values are too old after 150 s"
    yield room(old, warm, None, None, None, None, rows=[first] * 3)
    yield room("values in messages of their own", {"temperature": 21.5}, {"humidity": 40}, rows=[first])
    for word in ("unavailable", "unknown", None, "NaN", ""):
        silent = {"temperature": word, "humidity": 40}
        yield room(f"{json.dumps(word)} in place of a number", warm, silent, cool, rows=[first, second])
    yield Stream("a retained message of unknown age", [[(topic, warm, True)], [(topic, cool)]], [second])
    state = f"{topic}/availability"
    gone: list[Any] = [[(topic, warm)], [(state, {"state": "offline"})], [(state, "online"), (topic, cool)]]
    yield Stream("availability: offline, then online", gone, [first, second])
    hot = "a value out of range: 85 °C of a DS18B20 that has lost power"
    yield room(hot, warm, {"temperature": 85, "humidity": 40}, rows=[first] * 2)
    yield room("numbers as texts", {"temperature": "21.5", "humidity": "40"}, rows=[first])
    yield room("a decimal comma in a text", {"temperature": "21,5", "humidity": 40}, rows=[])
    yield room("a message that is no JSON", warm, '{"temperature": 2', rows=[first] * 2)
    late = {**warm, "last_seen": "2024-03-01T10:02:00Z"}, {**cool, "last_seen": "2024-03-01T10:01:00Z"}
    timed = _ZIGBEE.replace("[[channels]]\n", '[[channels]]\ntime = "last_seen"\n')
    yield Stream("messages out of order, by their own times", [[(topic, body)] for body in late], [first] * 2, timed)
    yard, plug = "tele/yard/SENSOR", "tele/plug/SENSOR"
    heat = {"Time": "2024-03-01T10:00:00", "AM2301": {"Temperature": 4.5}}
    yield Stream(
        "Tasmota: objects in objects, from two devices",
        [[(yard, heat), (plug, {"ENERGY": {"Power": 60}})]],
        [[4.5, 60]],
        f'[[channels]]\ntopic = "{yard}"\npath = "AM2301.Temperature"\n'
        f'[[channels]]\ntopic = "{plug}"\npath = "ENERGY.Power"\n',
    )
    yield Stream(
        "ESPHome: a number is the message",
        [[("porch/sensor/t/state", "4.5"), ("porch/sensor/h/state", " 80\n")], [("porch/sensor/t/state", "nan")]],
        [[4.5, 80]],
        "".join(f'[[channels]]\nname = "{name}"\ntopic = "porch/sensor/{name}/state"\n' for name in "th"),
    )
    yield Stream(
        "several devices by a wildcard, each with rows of its own",
        [[("zigbee2mqtt/attic", warm), ("zigbee2mqtt/cellar", cool)], [("zigbee2mqtt/attic", cool)]],
        [first, second, second, second],
        f'topic = "zigbee2mqtt/+"\n{_ROOM}',
    )
    door = "stat/door/POWER"
    yield Stream(
        "states: ON and OFF",
        [[(door, "ON")], [(door, "OFF")]],
        [[1], [0]],
        f'[[channels]]\nname = "door"\ntopic = "{door}"\n',
    )
    yield room("an object without the field", {"linkquality": 90}, rows=[])
