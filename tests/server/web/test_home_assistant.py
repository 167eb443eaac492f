"""Jobs and boards in Home Assistant: what is published of them, and what its switches may do."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from fedprune.core.errors import ConfigError
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.web.auth.accounts import HOME_ASSISTANT, Accounts
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.home_assistant.bridge import MOST, HomeAssistantBridge
from fedprune_server.web.home_assistant.broker_client import Arrival
from fedprune_server.web.home_assistant.discovery import BOARDS, JOBS, Discovery, Message, identifier
from fedprune_server.web.observer import check_console
from fedprune_server.web.process import ConsoleProcess, ConsoleSettings
from fedprune_server.web.state.records import PublishedJob
from fedprune_server.web.state.status import FILE, FleetView, StatusWriter, encoded
from support.fakes.console_browser import PASSWORD, Trial, trial
from support.fakes.console_fleet import ConsoleFleet
from support.paths import ROOT
from support.processes.machine import find_mosquitto, free_port, listens

TOPIC = re.compile(r"homeassistant/(\w+)/([a-zA-Z0-9_-]+)/([a-zA-Z0-9_-]+)/config")
"""Home Assistant's own pattern of a topic with all its levels (`TOPIC_MATCHER` of its integration)."""

PYTHON = Path(os.environ.get("FEDPRUNE_HOME_ASSISTANT", ROOT / "build/home-assistant/bin/python"))

HOSTILE = 'a"b}{{ states.x }}/#+\u2028\n.\\'


@dataclass
class FakeClient:
    """A broker's client that keeps what is retained."""

    connected: bool = True
    connections: int = 1
    retained: dict[str, str] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    waiting: list[Arrival] = field(default_factory=list)
    unsubscribed: list[str] = field(default_factory=list)
    address: str = "mqtts://home.example:8883"

    def publish(self, topic: str, payload: str) -> bool:
        self.sent.append(Message(topic, payload))
        if payload:
            self.retained[topic] = payload
        else:
            self.retained.pop(topic, None)
        return True

    def unsubscribe(self, topics: Iterable[str]) -> None:
        self.unsubscribed += topics

    def arrivals(self) -> Iterable[Arrival]:
        while self.waiting:
            yield self.waiting.pop(0)

    def says(self, topic: str, payload: str, *, retained: bool = False) -> None:
        self.waiting.append(Arrival(topic, payload.encode(), retained))


@dataclass
class Home:
    here: Trial
    client: FakeClient
    bridge: HomeAssistantBridge
    discovery: Discovery
    now: list[float]

    def turn(self, turns: int = 1) -> list[Message]:
        """What some turns, a second each, send."""
        self.client.sent.clear()
        for _ in range(turns):
            self.now[0] += 1.0
            self.bridge.turn()
        return list(self.client.sent)

    def configs(self) -> dict[str, dict[str, Any]]:
        return {t: json.loads(p) for t, p in self.client.retained.items() if t.startswith("homeassistant/")}

    def state(self, kind: str, name: str) -> dict[str, Any]:
        return dict(json.loads(self.client.retained[self.discovery.state(kind, identifier(name))]))


def home(folder: Path, *, devices: int = 5, pause: bool = True, allowed: str = "all", **said: Any) -> Home:
    here, client, now = trial(folder, devices, allowed=allowed), FakeClient(**said), [0.0]
    discovery = Discovery("lab", "homeassistant", pause)
    view = FleetView(folder / FILE, allowed)
    bridge = HomeAssistantBridge(discovery, view, here.console.orders, client, lambda: now[0])
    return Home(here, client, bridge, discovery, now)


def rendered(config: dict[str, Any], state: str) -> str:
    return jinja2.Template(config["value_template"]).render(value_json=json.loads(state))


def test_boards_and_jobs_are_entities_that_show_their_state(tmp_path: Path) -> None:
    here = home(tmp_path)
    here.turn()
    configs = here.configs()
    assert all(TOPIC.fullmatch(topic) for topic in configs)
    assert len({c["unique_id"] for c in configs.values()}) == len(configs) == 5 * 4 + 4
    row = here.here.fleet.rows["board-0000"]
    node = "fedprune_lab_boards_board-0000"
    shown = {
        key: rendered(config, here.client.retained[config["state_topic"]])
        for key in ("state", "online", "temperature", "measured")
        if (config := configs[f"homeassistant/{'binary_' if key == 'online' else ''}sensor/{node}/{key}/config"])
    }
    assert shown == {
        "state": row["state"],
        "online": "ON" if row["online"] else "OFF",
        "temperature": str(row["temperature_c"]),
        "measured": str(round(100 * row["measured"], 2)),
    }
    switch = configs["homeassistant/switch/fedprune_lab_jobs_trial/pause/config"]
    assert rendered(switch, here.client.retained[switch["state_topic"]]) == "OFF"
    assert switch["command_topic"] == "fedprune-states/lab/jobs/trial/pause/set"
    assert here.client.retained[here.discovery.status] == "online"
    assert all(c["availability"][0] == {"topic": here.discovery.status} for c in configs.values())


def test_a_board_that_is_offline_has_no_temperature(tmp_path: Path) -> None:
    here = home(tmp_path)
    here.turn()
    config = here.configs()["homeassistant/sensor/fedprune_lab_boards_board-0000/temperature/config"]
    (_, own) = config["availability"]
    for online in (True, False):
        row = {**here.here.fleet.rows["board-0000"], "online": online}
        here.here.write(rows={"board-0000": encoded(row)})
        here.turn()
        state = here.client.retained[own["topic"]]
        assert rendered(own, state) == ("online" if online else "offline")


def test_only_what_has_changed_is_sent_and_all_of_it_after_each_connection(tmp_path: Path) -> None:
    here = home(tmp_path)
    assert len(here.turn()) == len(here.client.retained)
    assert here.turn(3) == []
    here.here.write(rows={"board-0001": encoded({**here.here.fleet.rows["board-0001"], "state": "pulling"})})
    (message,) = here.turn()
    assert message.topic == "fedprune-states/lab/boards/board-0001"
    assert here.state(BOARDS, "board-0001")["state"] == "pulling"
    before = dict(here.client.retained)
    here.client.connected = False
    here.here.write(rows={"board-0001": encoded({**here.here.fleet.rows["board-0001"], "state": "folded"})})
    assert here.turn() == []
    here.client.retained.clear()
    here.client.connected, here.client.connections = True, 2
    here.turn()
    assert here.client.retained.keys() == before.keys()
    assert here.state(BOARDS, "board-0001")["state"] == "folded"


def test_a_server_that_hangs_is_offline(tmp_path: Path) -> None:
    here = home(tmp_path)
    here.here.writer.write(at=0.0)
    here.turn()
    assert here.client.retained[here.discovery.status] == "offline"


@pytest.mark.parametrize("gone", ["revoked", "deleted"])
def test_a_board_that_leaves_the_fleet_leaves_home_assistant(tmp_path: Path, gone: str) -> None:
    here = home(tmp_path)
    here.turn()
    row = {**here.here.fleet.rows["board-0002"], "status": "revoked"}
    here.here.write(rows={"board-0002": None if gone == "deleted" else encoded(row)})
    sent = here.turn(2)
    assert {m.payload for m in sent} == {""}
    assert [m.topic for m in sent][4:] == ["fedprune-states/lab/boards/board-0002"], "which entities read until they go"
    assert not any("board-0002" in topic for topic in here.client.retained)
    assert sum("board-0001" in topic for topic in here.client.retained) == 5
    assert here.turn() == []


def test_what_left_while_the_server_was_off_is_removed_at_its_start(tmp_path: Path) -> None:
    here = home(tmp_path)
    for topic in ("fedprune-states/lab/boards/gone", "fedprune-states/lab/boards/board-0001"):
        here.client.says(topic, "{}", retained=True)
    here.client.retained["homeassistant/sensor/fedprune_lab_boards_gone/state/config"] = "{}"
    here.turn(150)
    assert not any("gone" in topic for topic in here.client.retained)
    assert sum("board-0001" in topic for topic in here.client.retained) == 5
    assert here.client.unsubscribed == ["fedprune-states/lab/boards/+", "fedprune-states/lab/jobs/+"]


def test_a_waiting_stranger_is_not_shown(tmp_path: Path) -> None:
    here = home(tmp_path, devices=14)
    here.turn()
    assert here.here.fleet.rows["board-0013"]["status"] == "waiting"
    assert not any("board-0013" in topic for topic in here.client.retained)


def test_no_more_boards_than_a_house_can_have_are_shown(tmp_path: Path) -> None:
    here = home(tmp_path)
    fleet = ConsoleFleet(MOST + 200, 1)
    here.here.write(rows={n: encoded({**r, "status": "member"}) for n, r in fleet.rows.items()})
    here.turn(30)
    states = sum(t.startswith("fedprune-states/lab/") for t in here.client.retained)
    assert states == MOST + 2  # and a job and the status


def test_the_switch_gives_an_operator_s_order(tmp_path: Path) -> None:
    here = home(tmp_path)
    topic = here.discovery.command("trial")
    here.client.says(topic, "ON")
    here.client.says(topic, "OFF")
    here.client.says(topic, "TOGGLE")
    here.client.says(here.discovery.command("other"), "ON")
    here.client.says(topic, "ON", retained=True)
    here.turn()
    assert [(o.order, o.job, o.operator) for o in here.here.orders] == [
        ("pause", "trial", HOME_ASSISTANT),
        ("resume", "trial", HOME_ASSISTANT),
    ]
    here.here.answer(1, True, "job trial is paused")
    (second, first) = here.here.console.audit.page().items
    assert (first["operator"], first["address"], first["action"]) == (HOME_ASSISTANT, here.client.address, "pause")
    assert (first["outcome"], second["outcome"]) == ("done: job trial is paused", "ordered")
    job = here.here.fleet.job("trial")
    here.here.write(PublishedJob(**{**vars(job), "paused": True}))
    here.turn()
    assert here.state(JOBS, "trial")["paused"] is True


def test_a_flood_of_commands_is_limited_as_an_operator_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = home(tmp_path)
    for _ in range(200):
        here.client.says(here.discovery.command("trial"), "ON")
    here.turn(20)
    assert len(here.here.orders) == 60
    assert capsys.readouterr().err.count("an order was refused: more than 60 orders in a minute") == 1


def test_without_the_setting_there_is_no_switch(tmp_path: Path) -> None:
    here = home(tmp_path, pause=False)
    here.client.retained["homeassistant/switch/fedprune_lab_jobs_trial/pause/config"] = "of an earlier start"
    here.turn()
    assert not any("/switch/" in topic for topic in here.client.retained)
    assert here.turn() == []


@pytest.mark.parametrize("name", [HOME_ASSISTANT, "Home-Assistant"])
def test_no_account_has_the_name_of_the_switches_operator(tmp_path: Path, name: str) -> None:
    with (
        ConsoleDatabase(tmp_path / "console.db") as database,
        pytest.raises(ConfigError, match="operator of Home Assistant's switches"),
    ):
        Accounts(database).add(name, "operator", PASSWORD)


def test_the_address_with_its_password_is_not_stored() -> None:
    config = ServerConfig(console="8470", home_assistant="mqtts://ha:secret@home.example")
    assert "secret" not in json.dumps(config.server_settings())


@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=2, unique=True))
def test_different_names_have_different_topics(names: list[str]) -> None:
    one, other = map(identifier, names)
    assert one != other
    assert re.fullmatch(r"[a-zA-Z0-9_-]+", one)


def test_a_hostile_name_breaks_neither_topics_nor_templates(tmp_path: Path) -> None:
    row = {**ConsoleFleet(1, 1).rows["board-0000"], "name": HOSTILE, "profile": HOSTILE, "state": HOSTILE}
    messages = Discovery("lab", "homeassistant", True).board(row)
    plain = Discovery("lab", "homeassistant", True).board({**row, "name": "a"})
    assert [t.count("/") for t, _ in messages] == [t.count("/") for t, _ in plain]
    for (topic, payload), (_, expected) in zip(messages[:-1], plain[:-1], strict=True):
        assert TOPIC.fullmatch(topic)
        config, other = json.loads(payload), json.loads(expected)
        assert config["device"]["name"] == HOSTILE
        templates = [k for k in config if k.endswith("template")]
        assert [config[k] for k in templates] == [other[k] for k in templates]
        assert not {"+", "#"} & set(config["state_topic"] + config["unique_id"])


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"home_assistant": "mqtt://127.0.0.1", "console": "off"}, "console as well"),
        ({"home_assistant": "mqtt://ha:secret@home.example"}, "home_assistant_insecure"),
        ({"home_assistant": "https://ha:secret@home.example"}, "mqtt://"),
        ({"home_assistant_prefix": "home/#"}, "home_assistant_prefix"),
        ({"home_assistant": "mqtt://[::1]", "home_assistant_pause": True, "console_orders": "look"}, "console_orders"),
    ],
)
def test_settings_that_cannot_work_are_refused(said: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**{"console": "8470", **said})
    assert named in str(caught.value)
    assert "secret" not in str(caught.value)
    ServerConfig(console="8470", home_assistant="mqtt://ha:secret@home.example", home_assistant_insecure=True)


@pytest.mark.mosquitto
@pytest.mark.system
def test_the_console_s_process_is_at_the_broker_and_its_will_is_published(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "broker.conf").write_text(
        f"listener {port} 127.0.0.1\nuser root\nallow_anonymous false\npassword_file {tmp_path / 'users'}\n"
    )
    (tmp_path / "users").write_text(f"fleet:{mosquitto_hash(PASSWORD)}\n")
    heard: dict[str, bytes] = {}
    user = paho.Client(CallbackAPIVersion.VERSION2)
    user.username_pw_set("fleet", PASSWORD)
    user.on_connect = lambda client, *_: client.subscribe("#", 1)
    user.on_message = lambda _client, _user, message: heard.__setitem__(message.topic, message.payload)
    ConsoleFleet(3, 1).publish(writer := StatusWriter(tmp_path / FILE))
    settings = ConsoleSettings(
        "127.0.0.1", 0, str(tmp_path), None, None, False, "all", (), False, os.getpid(),
        f"mqtt://fleet:{quote(PASSWORD)}@127.0.0.1:{port}", None, "homeassistant", True, "lab",
    )  # fmt: skip
    process = ConsoleProcess(settings)
    broker = subprocess.Popen([find_mosquitto(), "-c", tmp_path / "broker.conf"], stderr=subprocess.DEVNULL)
    try:
        until(lambda: listens(port))
        user.connect("127.0.0.1", port)
        user.loop_start()
        until(lambda: process.turn(0.0) or heard.get("fedprune-states/lab/status") == b"online")
        until(lambda: "fedprune-states/lab/boards/board-0002" in heard)
        user.publish("fedprune-states/lab/jobs/trial/pause/set", "ON", 1)
        with ConsoleDatabase(tmp_path / "console.db") as database:
            (order,) = until(lambda: database.rows("SELECT operator, address, kind FROM orders"))
        assert order == {"operator": HOME_ASSISTANT, "address": f"mqtt://127.0.0.1:{port}", "kind": "pause"}
        assert process.pid is not None
        os.kill(process.pid, 9)
        until(lambda: heard.get("fedprune-states/lab/status") == b"offline")
    finally:
        process.stop()
        user.loop_stop()
        broker.kill()
        broker.wait()
        writer.close()


def mosquitto_hash(password: str) -> str:
    """A password as a file of Mosquitto's has it: PBKDF2 with SHA-512."""
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), b"salt of test", 101)
    return f"$7$101${base64.b64encode(b'salt of test').decode()}${base64.b64encode(digest).decode()}"


def until(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    raise TimeoutError


def test_authorities_that_are_none_are_known_before_the_console_starts(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    said = {"home_assistant": "mqtts://home.example", "home_assistant_ca": tmp_path / "ca.pem"}
    with pytest.raises(ConfigError, match="home_assistant_ca"):
        check_console(ServerConfig(console="8470", **said))


@pytest.mark.soak  # its package is of 400 MB
def test_home_assistant_s_own_schemas_take_every_message(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip(f"Home Assistant is not installed: no {PYTHON} (`make build/home-assistant/installed`)")
    here = home(tmp_path, devices=30)
    row = {**here.here.fleet.rows["board-0000"], "name": HOSTILE, "metrics": {"rmse": 0.5}, "versions": {}}
    here.here.write(rows={HOSTILE: encoded(row)})
    here.turn()
    messages = [(t, p) for t, p in here.client.retained.items() if t.startswith("homeassistant/")]
    assert len(messages) > 100
    assert refused(messages) == []
    topic, payload = messages[0]
    assert (
        len(
            refused(
                [(topic, payload.replace("state_topic", "states_topic")), ("homeassistant/sensor/a.b/config", "{}")]
            )
        )
        == 2
    )


def refused(messages: list[tuple[str, str]]) -> list[str]:
    command = [PYTHON, ROOT / "benchmarks" / "home_assistant" / "schemas.py"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, input=json.dumps(messages), capture_output=True, text=True, check=True, env=environment
    )
    return list(json.loads(done.stdout))


def test_the_flow_for_node_red_holds_together_and_reads_what_is_published(tmp_path: Path) -> None:
    flow = json.loads((ROOT / "examples" / "node-red" / "fleet.json").read_text())
    nodes = {n["id"]: n for n in flow}
    assert len(nodes) == len(flow)
    (tab,) = (n["id"] for n in flow if n["type"] == "tab")
    placed = [n for n in flow if n["type"] not in ("tab", "mqtt-broker")]
    for node in placed:
        assert node["z"] == tab
        targets = [target for output in node["wires"] for target in output]
        assert all(nodes[target] in placed for target in targets), node["id"]
        assert len(node["wires"]) == node.get("outputs", len(node["wires"])), node["id"]
        if node["type"].startswith("mqtt "):
            assert nodes[node["broker"]]["type"] == "mqtt-broker"
    here = Discovery("default", "homeassistant", True)
    (boards,) = (n for n in placed if n["type"] == "mqtt in")
    assert boards["topic"] == here.state(BOARDS, "+")
    assert {n["topic"] for n in placed if n["type"] == "inject"} == {here.command("leaves")}
    assert {n["payload"] for n in placed if n["type"] == "inject"} == {"ON", "OFF"}
    (command,) = (n for n in placed if n["type"] == "mqtt out")
    assert command["retain"] == "false", "retained commands are ignored"
    row = ConsoleFleet(1, 1).rows["board-0000"]
    state = json.loads(here.board(row)[-1].payload)
    read = [n["property"] for n in placed if n["type"] == "switch"]
    assert all(path.startswith("payload.") and path.removeprefix("payload.") in state for path in read)
