"""The process of the embedded broker: amqtt, listening on one TCP port, with a count of the bytes that pass.

It is started by `fedprune_server.messaging.broker.embedded.EmbeddedBroker` and talks to it over its standard streams:
one JSON line when it listens or can't, then the traffic so far as a JSON line for each line that it reads. It ends with
its parent, however that one ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import threading
import warnings
from typing import IO, Any

from fedprune.core.parent_death import set_parent_death_signal
from fedprune.wire.topics import EVERYONE

KINDS = ("up", "up/blob", "down", "down/blob", "other")
"""What traffic is counted by: the channel of a topic."""


def kind(topic: str) -> str:
    """The channel of a topic, or `other`."""
    parts = topic.split("/", 5)
    if len(parts) == 6 and parts[3] == EVERYONE and parts[5].startswith("down/"):
        return "down/blob"
    if len(parts) == 6 and parts[0] == "fedprune" and parts[5].startswith("up/"):
        return "up/blob"
    return parts[5] if len(parts) == 6 and parts[0] == "fedprune" and parts[5] in KINDS else "other"


def main() -> None:
    """Run until the parent asks for the end, or ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--tls", nargs=3, metavar=("CERTIFICATE", "KEY", "AUTHORITY"))
    arguments = parser.parse_args()
    _end_with(arguments.parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A terminal or a service manager may send them to the whole group. The parent handles them: it first takes in
        # the boards' remaining messages, then ends this process.
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep what libraries print out of the replies
    # amqtt logs every client that disconnects; real problems show up in the clients.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        asyncio.run(_serve(_listener(arguments), replies))
    except Exception as error:  # noqa: BLE001 - the parent must learn why, whatever it was
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        code = cause.errno if isinstance(cause, OSError) else None
        print(json.dumps({"error": str(cause) or type(cause).__name__, "errno": code}), file=replies)
        sys.exit(1)


def _listener(arguments: argparse.Namespace) -> dict[str, object]:
    listener: dict[str, object] = {"type": "tcp", "bind": f"{arguments.host}:{arguments.port}"}
    if arguments.tls is not None:
        certificate, key, authority = arguments.tls
        listener |= {"ssl": True, "certfile": certificate, "keyfile": key, "cafile": authority}
    return listener


async def _serve(listener: dict[str, object], replies: IO[str]) -> None:
    from amqtt.broker import Broker

    broker = Broker(
        {
            "listeners": {"default": listener},
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True},
                "fedprune_server.messaging.broker.traffic.TrafficPlugin": {},
            },
        }
    )
    await broker.start()
    counts = broker.plugins_manager.get_plugin("TrafficPlugin").counts
    print(json.dumps({"ready": True}), file=replies)
    threading.Thread(target=_answer, args=(counts, replies), daemon=True).start()
    await asyncio.Event().wait()


def _answer(counts: dict[str, dict[str, int]], replies: IO[str]) -> None:
    """Answer each line of standard input with the traffic so far; when the input ends, end the process."""
    for _ in sys.stdin:
        print(json.dumps(counts), file=replies)
    os._exit(0)


def _end_with(parent: int) -> None:
    """Make sure that this process doesn't outlive its parent, even one that is killed.

    Linux also sends the death signal when only the thread that started this process ends, so the handler checks whether
    the parent is really gone.
    """

    def look(_signal: int, _frame: Any) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGUSR1, look)
    set_parent_death_signal(signal.SIGUSR1)
    look(0, None)  # it may have gone before the signal was asked for


if __name__ == "__main__":
    main()
