"""Messages of sensors, as homes have them, are joined into rows or are counted as left out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import topic_matches_sub

from fedprune.core.errors import ConfigError
from fedprune_device.sensors.config import read_sensor_config
from fedprune_device.sensors.sample_collector import DropCounts, SampleCollector
from support.paths import ROOT

pytestmark = pytest.mark.board

HEAD = 'broker = "mqtt://127.0.0.1"\nboard = "127.0.0.1:80"\nperiod = 10\n'
ROOM = """
topic = "home/room"
max_age = 30
availability = ["home/room/status", "bridge"]
[[channels]]
path = "temperature"
range = [-40, 80]
[[channels]]
path = "humidity"
[label]
topic = "home/state"
values = {ON = "busy"}
"""
RECIPES = ROOT / "examples" / "sensors"


class Sensors:
    """A collector of a configuration, with a clock that only `rows` moves."""

    def __init__(self, path: Path) -> None:
        self.drops, self.now = DropCounts(), 0.0
        self.config = read_sensor_config(path)
        self.collector = SampleCollector(self.config, self.drops)

    def send(self, topic: str, body: Any, *, retained: bool = False) -> None:
        text = body if isinstance(body, (str, bytes)) else json.dumps(body)
        raw = text.encode() if isinstance(text, str) else text
        self.collector.receive(topic, raw, self.now, is_retained=retained)

    def row(self, after_s: float = 10.0) -> list[list[float]]:
        """The rows of all devices `after_s` later."""
        self.now += after_s
        return [row for sample in self.collector.collect(self.now, 1) for row in sample.rows]


@pytest.fixture
def room(tmp_path: Path) -> Sensors:
    return sensors(tmp_path, ROOM)


def sensors(folder: Path, text: str) -> Sensors:
    (folder / "sensors.toml").write_text(HEAD + text)
    return Sensors(folder / "sensors.toml")


def test_values_hold_up_to_their_age(room: Sensors) -> None:
    room.send("home/room", {"temperature": 21.5, "humidity": 40})
    room.send("home/room", {"humidity": "41.0", "battery": 90})
    assert [room.row(), room.row(20), room.row(1)] == [[[21.5, 41.0]], [[21.5, 41.0]], []]
    assert "young enough (temperature)" in room.drops.take()


@pytest.mark.parametrize(
    "body",
    ['{"temperature": null}', '{"temperature": "unavailable"}', "unknown", "offline", "", b"NaN", '"unavailable"'],
)
def test_a_sensor_that_has_no_value_ends_the_value_before(room: Sensors, body: Any) -> None:
    room.send("home/room", {"temperature": 21.5, "humidity": 40})
    room.send("home/room", body)
    assert room.row() == []
    assert "unavailable" in room.drops.take()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"temperature": 85}, "out of range"),
        ({"temperature": 10**400}, "no number"),
        ({"temperature": "21,5"}, "no number"),
        ({"temperature": [1]}, "no number"),
        ('{"temperature": 1e999}', "no number"),
        ("21.5", "no JSON object"),
        ('{"temperature"', "no JSON object"),
        ("[" * 60_000, "no JSON object"),
        (b"\xff", "no text"),
        (b"1" * 70_000, "bytes"),
    ],
)
def test_a_message_without_a_usable_value_is_counted_and_changes_nothing(room: Sensors, body: Any, reason: str) -> None:
    room.send("home/room", {"temperature": 21.5, "humidity": 40})
    room.send("home/room", body)
    assert room.row() == [[21.5, 40.0]]
    drops = room.drops.take()
    assert reason in drops
    assert "temperature" in drops


def test_a_retained_message_is_no_new_value_but_holds_what_holds_without_end(room: Sensors) -> None:
    room.send("home/state", "ON", retained=True)
    room.send("home/room", {"temperature": 1, "humidity": 1}, retained=True)
    assert room.row() == []
    room.send("home/room", {"temperature": 2, "humidity": 2})
    room.now += 1
    assert [(sample.rows, sample.label) for sample in room.collector.collect(room.now, 1)] == [([[2.0, 2.0]], "busy")]
    assert "2 retained" in room.drops.take()


@pytest.mark.parametrize(
    ("topic", "body"),
    [("home/room/status", "offline"), ("bridge", {"state": "offline"}), ("home/room/status", "Offline")],
)
def test_values_of_a_device_that_goes_offline_end_until_it_sends_again(room: Sensors, topic: str, body: Any) -> None:
    room.send("home/room", {"temperature": 21.5, "humidity": 40})
    room.send(topic, "online" if isinstance(body, str) else {"state": "online"}, retained=True)
    assert room.row() == [[21.5, 40.0]]
    room.send(topic, body, retained=True)
    assert room.row() == []
    assert "offline" in room.drops.take()
    room.send("home/room", {"temperature": 22, "humidity": 40})
    assert room.row() == [[22.0, 40.0]]


@pytest.mark.parametrize("body", [1, "1", 1.0])
def test_a_number_has_the_meaning_that_the_settings_give_to_its_text(tmp_path: Path, body: Any) -> None:
    door = sensors(
        tmp_path,
        """
        topic = "door"
        path = "open"
        max_age = 30
        channels = [{name = "door", values = {1 = 5}}]
        label.values = {1 = "open"}
        """,
    )
    door.send("door", {"open": body})
    assert [(sample.rows, sample.label) for sample in door.collector.collect(1.0, 1)] == [([[5.0]], "open")]


def test_a_state_in_another_case_has_the_meaning_that_the_settings_give_it(tmp_path: Path) -> None:
    door = sensors(tmp_path, "topic = 'door'\nmax_age = 30\nchannels = [{name = 'door', values = {ON = 0, OFF = 1}}]")
    door.send("door", "off")
    assert door.row() == [[1.0]]


def test_a_retained_value_of_an_offline_device_is_none_whichever_comes_first(tmp_path: Path) -> None:
    home = sensors(tmp_path, "topic = 'z/+'\nmax_age = inf\navailability = ['z/+/up', 'up']\nchannels = [{path = 't'}]")
    for topic in ("z/a/up", "up"):
        home.send(topic, "offline", retained=True)
        home.send("z/a", {"t": 1}, retained=True)
        assert home.row() == []
        home.send(topic, "online", retained=True)
        home.send("z/a", {"t": 2}, retained=True)
        assert home.row() == [[2.0]]


def test_samples_share_no_rows_and_span_no_gap(room: Sensors) -> None:
    samples = []
    for second in range(12):
        if second not in (4, 5, 6, 7):
            room.send("home/room", {"temperature": second, "humidity": 0})
        room.now += 10
        samples += room.collector.collect(room.now, 2)
    assert [[row[0] for row in sample.rows] for sample in samples] == [[0, 1], [2, 3], [3, 3], [8, 9], [10, 11]]
    room.send("home/room", {"temperature": 0, "humidity": 0})
    assert room.collector.collect(room.now, 2) == []
    room.collector.drop_rows()
    assert room.collector.collect(room.now, 2) == []
    assert "1 rows of samples that a gap ended" in room.drops.take()


def test_devices_behind_a_wildcard_have_rows_of_their_own_joined_with_what_all_share(tmp_path: Path) -> None:
    home = sensors(
        tmp_path,
        """
        max_age = 30
        time = "seen"
        channels = [
            {topic = "z/+", path = "t"}, {topic = "z/+/more", path = "h"}, {topic = "out", path = "t", name = "o"}
        ]
        """,
    )
    for device, t in (("a", 1), ("b", 2), ("lamp", None)):
        home.send(f"z/{device}", {"t": t, "seen": 100} if t else {"state": "ON", "seen": 100})
        home.send(f"z/{device}/more", {"h": 10 * (t or 0), "seen": 100})
    home.send("out", {"t": -5, "seen": "2024-01-31T13:45:00Z"})
    assert home.row(1) == [[1.0, 10.0, -5.0], [2.0, 20.0, -5.0]]
    for t, seen in ((7, 99), (8, 100), (9, 100.5), (7, 100.2)):
        home.send("z/a", {"t": t, "seen": seen})
    assert home.row(1) == [[9.0, 10.0, -5.0], [2.0, 20.0, -5.0]]
    assert "3 not newer than the one before" in home.drops.take()
    home.send("z/a", {"t": 3, "seen": 50})  # the device's clock was set back
    assert home.row(1)[0][0] == 3.0


LATE = [
    ("2026-11-29T10:00:00", 1, False, 1),
    ("2026-11-29T09:59:00", 2, False, 1),
    ("2090-01-01T00:00:00", 3, False, 3),
    ("2026-11-29T10:00:10", 4, False, 4),
    ("2026-11-29T09:00:11", 5, False, 5),  # the hour that comes twice
    ("2026-11-29T09:00:11", 6, False, 5),
]
RETAINED = [
    (10000, 1, True, 1),
    (20000, 2, False, 2),
    (10000, 1, True, 2),  # as after a reconnect
    (19990, 3, False, 2),  # late: the retained message has not set the newest time back
    (30000, 4, True, 4),
]


@pytest.mark.parametrize(("max_age", "messages"), [("inf", LATE), ("86400", LATE), ("inf", RETAINED)])
def test_only_newer_messages_are_taken_and_a_clock_that_was_ahead_once_ends_no_value_for_good(
    tmp_path: Path, max_age: str, messages: list[tuple[Any, float, bool, float]]
) -> None:
    meter = sensors(tmp_path, f'topic = "meter"\nmax_age = {max_age}\ntime = "at"\n[[channels]]\npath = "power"\n')
    for moment, power, is_retained, held in messages:
        meter.send("meter", {"at": moment, "power": power}, retained=is_retained)
        assert meter.row() == [[held]], moment
    assert "2 not newer" in meter.drops.take()


def test_the_recipe_of_zigbee2mqtt_reads_what_it_publishes() -> None:
    home = Sensors(RECIPES / "zigbee2mqtt.toml")
    home.send("zigbee2mqtt/kitchen/availability", {"state": "online"}, retained=True)
    home.send("zigbee2mqtt/bridge/state", {"state": "online"}, retained=True)
    body = {"battery": 100, "humidity": 44.72, "temperature": 27.34, "last_seen": "2024-01-31T12:45:00.000Z"}
    home.send("zigbee2mqtt/kitchen", body)
    home.send("zigbee2mqtt/lamp", {"state": "ON", "last_seen": "2024-01-31T12:45:00.000Z"})
    assert home.row() == [[27.34, 44.72]]
    home.send("zigbee2mqtt/bridge/state", {"state": "offline"})
    assert home.row() == []


def test_devices_whose_names_have_slashes_are_counted_and_taken_as_the_log_says(tmp_path: Path) -> None:
    recipe = (RECIPES / "zigbee2mqtt.toml").read_text()
    (tmp_path / "narrow.toml").write_text(recipe.replace("zigbee2mqtt/#", "zigbee2mqtt/+"))
    narrow, body = Sensors(tmp_path / "narrow.toml"), {"humidity": 44, "temperature": 27, "last_seen": 1.7e9}
    topics = ["zigbee2mqtt/kitchen/window", "zigbee2mqtt/kitchen/window/availability", "zigbee2mqtt/bridge/devices"]
    narrow.send(topics[0], body)
    narrow.send(topics[2], [{"friendly_name": "kitchen/window"}])
    (text,) = narrow.drops.take().split("; ")
    assert text.startswith("2 values")
    (tmp_path / "wide.toml").write_text(recipe.replace('"zigbee2mqtt/#"', text.split(" = ")[1].split(" takes")[0]))
    wide = Sensors(tmp_path / "wide.toml")
    wide.send(topics[1], {"state": "online"}, retained=True)
    wide.send(topics[0], body)
    assert (narrow.row(), wide.row(), wide.drops.take()) == ([], [[27.0, 44.0]], "")
    wide.send(topics[1], {"state": "offline"})
    assert wide.row() == []
    for topic, home in [(topics[0], narrow), *((topic, wide) for topic in topics)]:
        assert sum(topic_matches_sub(subscription, topic) for subscription in home.config.subscriptions) == 1


@pytest.mark.parametrize("recipe", ["zigbee2mqtt", "esphome"])
def test_a_label_that_is_added_to_a_recipe_as_it_shows_has_neither_time_nor_availability_of_the_channels(
    tmp_path: Path, recipe: str
) -> None:
    text = (RECIPES / f"{recipe}.toml").read_text()
    (tmp_path / "sensors.toml").write_text(re.sub(r"^# (\[label]|topic|values)", r"\1", text, flags=re.MULTILINE))
    home = Sensors(tmp_path / "sensors.toml")
    body = {"humidity": 44.72, "temperature": 27.34, "last_seen": "2024-01-31T12:45:00.000Z"}
    home.send("zigbee2mqtt/kitchen", body)
    for name in ("sensor/air_temperature", "sensor/illuminance", "binary_sensor/window"):
        home.send(f"greenhouse/{name}/state", "1")
    home.send("home/state", "ON")
    assert [sample.label for sample in home.collector.collect(1.0, 1)] == ["busy"]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("", None),
        ("steps = 4", (2, 4)),
        ("steps = 4\nlayout = ['steps', 'channels']", (4, 2)),
        ("steps = 1\nlayout = ['channels']", (2,)),
    ],
)
def test_settings_say_the_shape_of_a_sample(tmp_path: Path, text: str, shape: tuple[int, ...] | None) -> None:
    assert sensors(tmp_path, f"{text}\n{ROOM}").config.sample_shape == shape


def test_the_recipe_of_tasmota_reads_what_it_publishes() -> None:
    home = Sensors(RECIPES / "tasmota.toml")
    for device in ("washroom", "machine"):
        home.send(f"tele/{device}/LWT", "Online", retained=True)
    climate = {"Temperature": 21.5, "Humidity": 40.2, "DewPoint": 7.4}
    home.send("tele/washroom/SENSOR", {"Time": "2024-01-31T13:45:00", "AM2301": climate, "TempUnit": "C"})
    home.send("tele/machine/SENSOR", {"Time": "2024-01-31T13:45:01", "ENERGY": {"Power": 512, "Voltage": 230}})
    home.send("stat/machine/POWER", "ON")
    samples = home.collector.collect(1.0, 1)
    assert [(sample.rows, sample.label) for sample in samples] == [([[21.5, 40.2, 512.0]], "washing")]
    home.send("tele/machine/LWT", "Offline")
    assert home.row() == []


def test_the_recipe_of_esphome_reads_what_it_publishes() -> None:
    home = Sensors(RECIPES / "esphome.toml")
    home.send("greenhouse/status", "online", retained=True)
    home.send("greenhouse/sensor/air_temperature/state", "19.6", retained=True)
    home.send("greenhouse/sensor/illuminance/state", "1034.2")
    home.send("greenhouse/binary_sensor/window/state", "ON", retained=True)
    assert home.row() == []
    home.send("greenhouse/sensor/air_temperature/state", "19.7")
    assert home.row() == [[19.7, 1034.2, 1.0]]
    home.send("greenhouse/sensor/illuminance/state", "nan")
    assert home.row() == []


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("max_age = 1\nchannels = []", "channels"),
        ("max_age = 1\nchannels = [{path = 't'}]", "topic"),
        ("topic = 'a'\nchannels = [{path = 't'}]", "max_age"),
        ("topic = 'a'\nmax_age = 0\nchannels = [{path = 't'}]", "max_age"),
        ("topic = 'a/b+'\nmax_age = 1\nchannels = [{path = 't'}]", "topic"),
        ("topic = 'a/#/b/#'\nmax_age = 1\nchannels = [{path = 't'}]", "topic"),
        ("topic = 'a'\nmax_age = 1\nchannels = [{path = 't', rnage = [0, 1]}]", "rnage"),
        ("topic = 'a'\nmax_age = 1\nchannels = [{path = 't', range = [1, 0]}]", "range"),
        ("topic = 'a'\nmax_age = 1\nchannels = [{path = 't'}, {path = 't'}]", "names"),
        ("topic = 'a'\nmax_age = 1\nchannels = [{path = 't'}]\nlabel.values = {ON = 1.5}", "values.ON"),
        ("max_age = 1\nchannels = [{topic = '+', path = 't'}, {topic = '+/+', path = 'u'}]", "wildcards"),
        ("max_age = 1\navailability = '+/s'\nchannels = [{topic = 'a', path = 't'}]", "availability"),
        ("steps = 0\ntopic = 'a'\nmax_age = 1\nchannels = [{path = 't'}]", "steps"),
        ("layout = ['rows']\ntopic = 'a'\nmax_age = 1\nchannels = [{path = 't'}]", "layout"),
        ("steps = 2\nlayout = ['channels']\ntopic = 'a'\nmax_age = 1\nchannels = [{path = 't'}]", "layout"),
    ],
)
def test_settings_that_can_not_be_are_refused_by_name(tmp_path: Path, text: str, subject: str) -> None:
    with pytest.raises(ConfigError) as error:
        sensors(tmp_path, text)
    assert subject in str(error.value)
    assert "sensors.toml" in str(error.value)
