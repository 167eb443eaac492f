"""A real fleet in a real Home Assistant: every discovery message checked by its schemas, and the session recorded.

    make home-assistant

A server with an identity and three boards run a job; the console shows them at a Mosquitto of their own, whose every
message `mosquitto_sub -v` records. Home Assistant's core with its MQTT integration is at the same broker: it makes
entities, its switch pauses the job and lets it go on, and it forgets a board that is revoked. At the end the server is
killed. Writes `benchmarks/results/home_assistant.json` and its page.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from benchmarks.mosquitto import mosquitto, needed
from benchmarks.synthetic_nets import setting, write
from fedprune.core.closing import Closing
from support.processes.machine import free_port
from support.processes.real_site import Site, write_material

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "home-assistant" / "bin" / "python"
BOARDS = ("attic", "cellar", "yard.2")
CONFIG = """
[job]
name = "leaves"
rounds = 100000
devices = 2
density = 0.5
"""
PATIENCE_S = 90.0
SWITCH = "switch.job_leaves_pause"


class Home(Site):
    """A site whose console is in Home Assistant."""

    console = 0
    home = 0

    def command(self, name: str) -> list[str]:
        if name != "server":
            return super().command(name)
        where = f"mqtt://127.0.0.1:{self.home}"
        return [*super().command(name), "--console", str(self.console), "--home-assistant", where]


class HomeAssistant(Closing):
    """The process of `core.py`."""

    def __init__(self, python: Path, port: int, folder: Path) -> None:
        command = [str(python), str(Path(__file__).with_name("core.py")), str(port), str(folder)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._log = folder.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=environment,
            )
        self.version = self._answer()["version"]

    def ask(self, line: str) -> Any:
        self._process.stdin.write(line + "\n")
        return self._answer()

    def states(self) -> dict[str, str]:
        return {name: state for name, (state, _) in self.ask("states").items()}

    def warnings(self) -> list[str]:
        return self._log.read_text().splitlines()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"Home Assistant has ended: {self.warnings()[-5:]}")
        return json.loads(line)


class Recording(Closing):
    """What `mosquitto_sub -v` hears, line by line."""

    def __init__(self, port: int, path: Path) -> None:
        topics = [word for topic in ("homeassistant/#", "fedprune-states/#") for word in ("-t", topic)]
        self._path = path
        with path.open("wb") as file:
            command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(port), "-v", *topics]
            self._process = subprocess.Popen(command, stdout=file)

    def lines(self) -> list[tuple[str, str]]:
        return [
            (topic, payload)
            for line in self._path.read_text().splitlines()
            for topic, _, payload in [line.partition(" ")]
        ]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=PYTHON, help="of Home Assistant's environment")
    python = parser.parse_args().python
    if not python.exists():
        sys.exit(f"no {python}: make home-assistant installs it")
    os.environ["FEDPRUNE_SERVER_HOME_ASSISTANT_PAUSE"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        result, lines = run(python, Path(folder))
    write("home_assistant", result, page(result, lines))


def run(python: Path, folder: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The session's result, and all messages that the broker passed on."""
    write_material(folder, dict.fromkeys(BOARDS, 400))
    (binary, version), steps = needed("home_assistant"), dict[str, dict[str, str]]()
    with mosquitto(binary) as broker, Home(folder, folder, CONFIG, BOARDS, PATIENCE_S, secure=True) as site:
        site.console, site.home = free_port(), broker.port
        recorded, state = folder / "session", folder / "home"
        with Recording(broker.port, recorded) as recording, HomeAssistant(python, broker.port, state) as home:
            site.start_all()
            steps["Three boards train"] = wait(home, trains)
            home.ask(f"turn_on {SWITCH}")
            steps["The switch is turned on"] = wait(home, lambda s: s[SWITCH] == "on")
            home.ask(f"turn_off {SWITCH}")
            steps["The switch is turned off"] = wait(home, lambda s: s[SWITCH] == "off")
            site.processes["cellar"].kill()
            steps["A board loses its power"] = wait(home, lambda s: s["binary_sensor.cellar_connection"] == "off")
            command = [
                sys.executable,
                "-m",
                "fedprune_server.cli.main",
                "devices",
                "revoke",
                "yard.2",
                "--state",
                site.state,
            ]
            subprocess.run(command, check=True, capture_output=True)
            steps["A board is revoked"] = wait(home, lambda s: not any("yard_2" in name for name in s))
            site.processes["server"].kill()
            steps["The server is killed"] = wait(home, lambda s: s[SWITCH] == "unavailable")
            lines = recording.lines()
            messages = [(t, p) for t, p in lines if t.startswith("homeassistant/") and p not in ("", "(null)")]
            wrong = home.ask(f"validate {json.dumps(messages)}")
            broken = [(messages[0][0], json.dumps(json.loads(messages[0][1]) | {"unit_of_measure": "%"}))]
            if not home.ask(f"validate {json.dumps(broken)}"):
                raise RuntimeError("a message with an unknown key passes the schemas")
            result = {
                **setting(), "mosquitto": version, "home_assistant": home.version, "messages": len(messages),
                "refused": wrong, "warnings": home.warnings(), "states": steps, "audit": audit(site.state),
            }  # fmt: skip
            return result, lines


def trains(states: dict[str, str]) -> bool:
    """Whether all boards are connected and something has been measured."""
    online = [states.get(f"binary_sensor.{name}_connection") for name in ("attic", "cellar", "yard_2")]
    measured = [states.get(f"sensor.{name}_accuracy", "unknown") for name in ("attic", "job_leaves")]
    return set(online) == {"on"} and not {"unknown", "unavailable"} & set(measured)


def wait(home: HomeAssistant, reached: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """Home Assistant's states, once they are as they should be."""
    until = time.monotonic() + PATIENCE_S
    while not reached(states := home.states()):
        if time.monotonic() > until:
            raise RuntimeError(f"it never came to that: {states}")
        time.sleep(0.2)
    return states


def audit(state: Path) -> list[tuple[str, str, str]]:
    with sqlite3.connect(state / "console.db") as database:
        query = "SELECT operator, action, outcome FROM audit WHERE outcome != 'ordered' ORDER BY number"
        return [tuple(row) for row in database.execute(query)]


def page(result: dict[str, Any], heard: list[tuple[str, str]]) -> str:
    """The result for people, and the session in short."""
    if result["refused"]:
        verdict = "**Refused:** " + "; ".join(result["refused"])
    else:
        verdict = (
            "All pass its schema for discovery, and its schema for configuration files, which refuses unknown keys."
        )
    names = sorted({name for states in result["states"].values() for name in states})
    versions = f"Mosquitto {result['mosquitto']} and Home Assistant {result['home_assistant']}"
    lines = [
        "# A fleet in Home Assistant",
        "",
        f"{result['date']}, {result['cpu']}, {result['cores']} cores, Python {result['python']}; fedprune",
        f"{result['fedprune']}, {versions} (core and MQTT integration). Written by `make home-assistant`.",
        "",
        f"{result['messages']} discovery messages were sent. {verdict} A message with a key misspelt is refused.",
        f"Home Assistant logged {len(result['warnings'])} warnings and errors.",
        "",
        "## Entities",
        "",
        "States of Home Assistant's entities after each step. A dash is an entity that doesn't exist.",
        "",
        f"| | {' | '.join(result['states'])} |",
        f"|---|{'---|' * len(result['states'])}",
        *(f"| `{n}` | {' | '.join(states.get(n, '-') for states in result['states'].values())} |" for n in names),
        "",
        "The audit log of the console:",
        "",
        "| operator | order | outcome |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in result["audit"]),
        "",
        "## Session",
        "",
        "What `mosquitto_sub -v -t 'homeassistant/#' -t 'fedprune-states/#'` heard, in the order in which it came: the",
        "first and the last message of each topic, and all of the switch, of pauses and of the server's status.",
        "`(null)` is an empty message.",
        "",
        "```text",
        *(f"{topic} {payload}" for topic, payload in shortened(heard)),
        "```",
    ]
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:1883", "\n".join(lines)) + "\n"


def shortened(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    first, last = {}, {}
    for i, (topic, _) in enumerate(lines):
        first.setdefault(topic, i)
        last[topic] = i
    kept = {*first.values(), *last.values()}
    kept |= {i for i, (topic, _) in enumerate(lines) if topic.endswith(("/set", "/status"))}
    jobs = [i for i, (topic, _) in enumerate(lines) if topic == "fedprune-states/default/jobs/leaves"]
    paused = ['"paused":true' in lines[i][1] for i in jobs]
    kept |= {b for a, b, was, now in zip(jobs, jobs[1:], paused, paused[1:], strict=False) if was != now}
    return [lines[i] for i in sorted(kept)]


if __name__ == "__main__":
    main()
