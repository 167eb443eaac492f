"""The access control that docs/protocol.md recommends, on a real broker."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedprune.wire.link import BrokerLink
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import Topics
from support.paths import ROOT

pytestmark = pytest.mark.mosquitto

LAB = Topics("lab")


@pytest.fixture
def url(start_mosquitto: Callable[..., Any], tmp_path: Path) -> Iterator[str]:
    rules = re.findall(r"^ {4}((?:pattern|user|topic) .*)$", (ROOT / "docs" / "protocol.md").read_text(), re.MULTILINE)
    assert len(rules) == 6
    (tmp_path / "acl").write_text("\n".join(rules) + "\n")
    settings = f"listener {{port}} 127.0.0.1\nallow_anonymous true\nacl_file {tmp_path}/acl\n"
    return start_mosquitto(0, settings).url.replace("//", "//{}:x@")


def connect(url: str, user: str, topics: list[str]) -> closing[BrokerLink]:
    link = BrokerLink(url.format(user), user)
    link.subscribe(topics)
    link.start()
    assert link.get(5) == ConnectionUp()
    return closing(link)


def test_a_device_can_t_speak_for_another_or_for_the_server_nor_listen_to_another(url: str) -> None:
    with (
        connect(url, "fedprune-server", [*LAB.server_subscriptions(), "fedprune/1/lab/+/+/down/#"]) as server,
        connect(url, "pi-2", LAB.device_subscriptions("pi-2")) as victim,
        connect(url, "pi-1", [*LAB.device_subscriptions("pi-2"), *LAB.server_subscriptions()]) as rogue,
    ):
        for topic in (LAB.up("pi-2"), LAB.down("pi-2"), LAB.down("pi-1"), LAB.broadcast(), LAB.up_blob("pi-2", "job")):
            rogue.publish(topic, b"false")
        assert rogue.flush(5)
        server.publish(LAB.down("pi-2"), b"secret")

        assert victim.get(5) == (LAB.down("pi-2"), b"secret")
        assert server.get(0.3) is None
        assert rogue.get(0.3) is None
