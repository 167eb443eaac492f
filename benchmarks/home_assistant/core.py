"""Home Assistant's core with its MQTT integration, without its pages: run by the Python of its own environment.

    build/home-assistant/bin/python benchmarks/home_assistant/core.py PORT FOLDER

It obeys lines on its standard input, and answers each with a line of JSON:

- `validate`, with a JSON list of topics and payloads after it, checks discovery messages (`schemas.py`).
- `states` lists its entities with their states.
- `turn_on ENTITY` and `turn_off ENTITY` call the service of a switch.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from homeassistant import bootstrap, config_entries, const, core, loader
from homeassistant.auth import auth_manager_from_config
from homeassistant.setup import async_setup_component
from schemas import wrong


async def main(port: int, folder: Path) -> None:
    folder.mkdir()
    (folder / "configuration.yaml").touch()
    hass = core.HomeAssistant(str(folder))
    hass.config.skip_pip = True
    loader.async_setup(hass)
    hass.config_entries = config_entries.ConfigEntries(hass, {})
    await bootstrap.async_load_base_functionality(hass)
    hass.auth = await auth_manager_from_config(hass, [{"type": "homeassistant"}], [])
    if not await async_setup_component(hass, "http", {}):  # which listens only once the core is started
        sys.exit("http can't be set up")
    data = {"broker": "127.0.0.1", "port": port, "discovery": True, "discovery_prefix": "homeassistant"}
    entry = config_entries.ConfigEntry(
        version=1, minor_version=1, domain="mqtt", title="broker", data=data, source="user"
    )
    await hass.config_entries.async_add(entry)
    if entry.state is not config_entries.ConfigEntryState.LOADED:
        sys.exit(f"the integration can't be set up: {entry.state}")
    answer({"version": const.__version__})
    while line := await hass.loop.run_in_executor(None, sys.stdin.readline):
        word, _, rest = line.strip().partition(" ")
        if word == "validate":
            answer(wrong(json.loads(rest)))
        elif word == "states":
            answer({s.entity_id: [s.state, dict(s.attributes)] for s in hass.states.async_all() if ours(s)})
        else:
            await hass.services.async_call("switch", word, {"entity_id": rest}, blocking=True)
            answer(True)


def ours(state: core.State) -> bool:
    return state.domain in ("sensor", "binary_sensor", "switch")


def answer(body: Any) -> None:
    print(json.dumps(body, default=str), flush=True)


asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
