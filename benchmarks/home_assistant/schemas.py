"""Discovery messages checked by the schemas of Home Assistant's MQTT integration: run by the Python of its environment.

    build/home-assistant/bin/python benchmarks/home_assistant/schemas.py < MESSAGES

It reads a JSON list of topics and payloads, and writes a JSON list of what is wrong. There are two schemas: the one for
discovery drops keys that it doesn't know, the one for configuration files refuses them.
"""

from __future__ import annotations

import importlib
import json
import sys

import voluptuous as vol
from homeassistant.components.mqtt.discovery import TOPIC_MATCHER


def wrong(messages: list[tuple[str, str]]) -> list[str]:
    """What is wrong with messages, given their topics and payloads."""
    return [problem for topic, payload in messages if (problem := _wrong(topic, payload))]


def _wrong(topic: str, payload: str) -> str:
    found = TOPIC_MATCHER.match(topic.removeprefix("homeassistant/"))
    if found is None:
        return f"{topic}: not a topic of a discovery message"
    platform = importlib.import_module(f"homeassistant.components.mqtt.{found['component']}")
    try:
        platform.DISCOVERY_SCHEMA(json.loads(payload))
        platform.PLATFORM_SCHEMA_MODERN(json.loads(payload))
    except vol.Invalid as error:
        return f"{topic}: {error}"
    return ""


if __name__ == "__main__":
    print(json.dumps(wrong(json.load(sys.stdin))))
