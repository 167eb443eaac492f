"""docs/pi.md: its broker lets in those who have a password, and the command line takes its service."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedprune.errors import BrokerError
from fedprune.wire.link import ConnectionUp, Link
from fedprune.wire.topics import Topics
from fedprune_device.cli import build_parser

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "pi.md").read_text()
BLOCKS = [re.sub(r"^    ", "", b, flags=re.MULTILINE) for b in re.findall(r"(?:^(?:    .*)?\n)+", PAGE, re.MULTILINE)]
LAB = Topics("lab")


def block(text: str) -> str:
    return next(b.strip() for part in BLOCKS for b in part.split("\n\n") if text in b)


@pytest.mark.mosquitto
def test_the_broker_lets_in_who_has_a_password_and_nobody_else(
    start_mosquitto: Callable[..., Any], tmp_path: Path
) -> None:
    rules = re.findall(r"^ {6}((?:pattern|user|topic) .*)$", (DOCS / "protocol.md").read_text(), re.MULTILINE)
    (tmp_path / "fedprune.acl").write_text("\n".join(rules) + "\n")
    for number, user in enumerate(("fedprune-server", "attic")):
        words = ["mosquitto_passwd", *(["-c"] if number == 0 else []), "-b", str(tmp_path / "fedprune.passwd")]
        subprocess.run([*words, user, "secret"], check=True, capture_output=True)
    settings = block("allow_anonymous").replace("/etc/mosquitto", str(tmp_path)).replace("1883", "{port} 127.0.0.1")
    url = start_mosquitto(0, settings + "\n").url

    def link(user: str, topics: list[str]) -> closing[Link]:
        made = Link(url.replace("//", f"//{user}:secret@"), user)
        made.subscribe(topics)
        made.start()
        assert made.get(5) == ConnectionUp()
        return closing(made)

    with (
        link("fedprune-server", LAB.server_subscriptions()) as server,
        link("attic", LAB.device_subscriptions("attic")) as board,
    ):
        board.publish(LAB.up("attic"), b"1")
        assert server.get(5) == (LAB.up("attic"), b"1")
    with pytest.raises(BrokerError):
        Link(url, "stranger").start(timeout=5)


@pytest.mark.board
def test_the_command_line_takes_the_service() -> None:
    line = re.search(r"ExecStart=\S+/fedprune-device (.*)", PAGE)
    assert line is not None
    arguments = build_parser().parse_args(shlex.split(line.group(1)))
    assert (arguments.patient, arguments.site, arguments.device) == (True, "lab", "attic")
    state_folder = re.search(r"^ *StateDirectory=(.*)$", PAGE, re.MULTILINE)
    assert state_folder is not None
    assert arguments.state == Path("/var/lib") / state_folder.group(1)
