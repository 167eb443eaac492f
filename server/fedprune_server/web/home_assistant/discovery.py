"""Topics and payloads by which Home Assistant finds a fleet.

Home Assistant makes an entity of every retained message at `PREFIX/COMPONENT/NODE/OBJECT/config`; see
https://www.home-assistant.io/integrations/mqtt/#mqtt-discovery. The entities of a board, or of a job, share one state
topic with a JSON object, of which each shows a part by a template. All templates are constants: what boards or jobs
are called appears in names and values alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedprune import __version__
from fedprune.core.metrics import Metric, leading

ROOT = "fedprune-states"
"""First level of the topics with states, which no topic of the boards' own broker has."""

ONLINE, OFFLINE = "online", "offline"
ON, OFF = "ON", "OFF"
BOARDS, JOBS = "boards", "jobs"

_UNSAFE = re.compile(r"[^A-Za-z0-9-]")
_MEASURED = "measured"


class Message(NamedTuple):
    topic: str
    payload: str


@dataclass(frozen=True)
class Entity:
    """An entity of a board or a job.

    Attributes:
        component: Home Assistant's kind of entity.
        key: Its name in topics, unique among the entities of a board or job.
        settings: What the discovery message has besides device, availability and the state's topic.
        connected: Whether it is unavailable while the board is offline.
    """

    component: str
    key: str
    settings: Mapping[str, Any]
    connected: bool = False


_BOARD = (
    Entity("sensor", "state", {"name": "State", "value_template": "{{ value_json.state }}", "icon": "mdi:chip"}),
    Entity(
        "binary_sensor",
        "online",
        {
            "name": "Connection",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "value_template": "{{ 'ON' if value_json.online else 'OFF' }}",
        },
    ),
    Entity(
        "sensor",
        "temperature",
        {
            "name": "Temperature",
            "device_class": "temperature",
            "unit_of_measurement": "°C",
            "state_class": "measurement",
            "entity_category": "diagnostic",
            "suggested_display_precision": 0,
            "value_template": "{{ value_json.temperature_c }}",
        },
        connected=True,
    ),
)

_JOB = (
    Entity(
        "sensor", "phase", {"name": "Phase", "value_template": "{{ value_json.phase }}", "icon": "mdi:progress-clock"}
    ),
    Entity("sensor", "round", {"name": "Round", "value_template": "{{ value_json.round }}", "icon": "mdi:counter"}),
)

_PAUSE = Entity(
    "switch",
    "pause",
    {"name": "Pause", "value_template": "{{ 'ON' if value_json.paused else 'OFF' }}", "icon": "mdi:pause-circle"},
)


def identifier(name: str) -> str:
    """A name in the letters that discovery topics allow: every other one becomes its code between underscores, so that
    different names stay different."""
    return _UNSAFE.sub(lambda found: f"_{ord(found[0]):x}_", name)


@dataclass(frozen=True)
class Discovery:
    """Topics and payloads of one site.

    Attributes:
        prefix: Home Assistant's discovery prefix.
        pause: Whether jobs have a switch that pauses them.
    """

    site: str
    prefix: str
    pause: bool

    @property
    def status(self) -> str:
        """The topic that says whether states are kept up to date, for all entities: `ONLINE` or `OFFLINE`."""
        return f"{self._root}/status"

    @property
    def commands(self) -> str:
        """The subscription to the switches of all jobs."""
        return self.command("+")

    def command(self, job: str) -> str:
        """The topic of a job's switch, by the job's identifier."""
        return f"{self.state(JOBS, job)}/pause/set"

    def state(self, kind: str, name: str) -> str:
        """The topic with the state of a board or a job, by its kind and identifier; `+` for those of all."""
        return f"{self._root}/{kind}/{name}"

    def board(self, row: Mapping[str, Any]) -> list[Message]:
        """The messages that announce a board and its state, given its row of the console."""
        found = leading(row["metrics"])
        versions = {"sw_version": row["versions"]["fedprune"]} if "fedprune" in row["versions"] else {}
        about = {"name": row["name"], "model": row["profile"], **versions}
        state = {
            "state": row["state"],
            "online": bool(row["online"]),
            "job": row["job"],
            "samples": row["samples"],
            "density": row["density"],
            "temperature_c": row["temperature_c"],
            **_measurement(found),
        }
        return self._messages(BOARDS, row["name"], about, (*_BOARD, *_measured(found)), state)

    def job(self, row: Mapping[str, Any]) -> list[Message]:
        """The messages that announce a job and its state, given its record of the console."""
        found = leading(row["metrics"])
        about = {"name": f"Job {row['name']}", "model": row["strategy"], "sw_version": __version__}
        state = {
            "phase": row["phase"],
            "round": row["round"],
            "rounds": row["rounds"],
            "paused": bool(row["paused"]),
            **_measurement(found),
        }
        entities = (*_JOB, *_measured(found), *((_PAUSE,) if self.pause else ()))
        messages = self._messages(JOBS, row["name"], about, entities, state)
        # An earlier start may have published the switch, which would now do nothing.
        gone = [] if self.pause else [Message(self._config(JOBS, identifier(row["name"]), _PAUSE), "")]
        return [*gone, *messages]

    def removal(self, kind: str, name: str) -> list[Message]:
        """The messages that remove a board or a job by its identifier: empty messages in place of all that
        could have been published of it."""
        metric = Entity("sensor", _MEASURED, {})
        entities = (*_BOARD, metric) if kind == BOARDS else (*_JOB, metric, _PAUSE)
        topics = [self._config(kind, name, entity) for entity in entities]
        return [Message(topic, "") for topic in (*topics, self.state(kind, name))]

    @property
    def _root(self) -> str:
        return f"{ROOT}/{identifier(self.site)}"

    def _node(self, kind: str, name: str) -> str:
        return f"fedprune_{identifier(self.site)}_{kind}_{name}"

    def _config(self, kind: str, name: str, entity: Entity) -> str:
        return f"{self.prefix}/{entity.component}/{self._node(kind, name)}/{entity.key}/config"

    def _messages(
        self,
        kind: str,
        full_name: str,
        about: Mapping[str, Any],
        entities: tuple[Entity, ...],
        state: Mapping[str, Any],
    ) -> list[Message]:
        name = identifier(full_name)
        topic, node = self.state(kind, name), self._node(kind, name)
        device = {"identifiers": [node], "manufacturer": "fedprune", **about}
        found = []
        for entity in entities:
            available = [{"topic": self.status}]
            if entity.connected:
                template = "{{ 'online' if value_json.online else 'offline' }}"
                available.append({"topic": topic, "value_template": template})
            body = {
                **entity.settings,
                "unique_id": f"{node}_{entity.key}",
                "state_topic": topic,
                "availability": available,
                "availability_mode": "all",
                "device": device,
                "origin": {"name": "fedprune", "sw_version": __version__},
            }
            if entity is _PAUSE:
                body["command_topic"] = self.command(name)
            if entity.key in ("state", "phase"):
                body["json_attributes_topic"] = topic
            found.append(Message(self._config(kind, name, entity), _json(body)))
        return [*found, Message(topic, _json(state))]


def _measured(found: tuple[Metric, float] | None) -> tuple[Entity, ...]:
    """The entity of the metric by which a model is judged; none before it has been measured."""
    if found is None:
        return ()
    metric = found[0]
    settings = {
        "name": metric.title[:1].upper() + metric.title[1:],
        "state_class": "measurement",
        "icon": "mdi:target",
        "suggested_display_precision": 1 if metric.share else 3,
        "value_template": "{{ value_json.measured }}",
    }
    return (Entity("sensor", _MEASURED, settings | ({"unit_of_measurement": "%"} if metric.share else {})),)


def _measurement(found: tuple[Metric, float] | None) -> dict[str, float | None]:
    if found is None:
        return {_MEASURED: None}
    return {_MEASURED: round(100 * found[1], 2) if found[0].share else found[1]}


def _json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
