"""`fedprune-device` that notes in a file what it sends and what it is told is accepted, before it does anything else.

python noted_device.py NOTES ARGUMENTS...: a line of JSON each.
"""

import json
import os
import sys
from typing import Any

from fedprune.core.errors import ProtocolError
from fedprune.wire.link import BrokerLink
from fedprune.wire.messages import Accepted, UpdateAnnouncement, parse_message
from fedprune.wire.queues import Event


def _note(descriptor: int, topic: str, payload: bytes) -> None:
    if not topic.endswith(("/up", "/down")):
        return
    try:
        message = parse_message(payload)
    except ProtocolError:
        return
    entry: list[Any] = []
    if isinstance(message, UpdateAnnouncement):
        entry = ["sent", message.round, message.attempt, message.weights.sha256]
    elif isinstance(message, Accepted):
        entry = ["accepted", message.round, message.attempt, message.weights]
    if entry:
        os.write(descriptor, json.dumps(entry).encode() + b"\n")


def main(path: str) -> int:
    """Run the device's command line."""
    notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    publish, get = BrokerLink.publish, BrokerLink.get

    def noted_publish(link: BrokerLink, topic: str, payload: bytes, qos: int = 1) -> bool:
        _note(notes, topic, payload)
        return publish(link, topic, payload, qos)

    def noted_get(link: BrokerLink, timeout: float | None = 0.0) -> tuple[str, bytes] | Event | None:
        item = get(link, timeout)
        if isinstance(item, tuple):
            _note(notes, *item)
        return item

    BrokerLink.publish, BrokerLink.get = noted_publish, noted_get  # type: ignore[method-assign]
    from fedprune_device.cli.main import main as run

    return int(run(sys.argv[2:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
