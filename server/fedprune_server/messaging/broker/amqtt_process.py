"""The process of amqtt: a broker on one port, or with a fleet's access rules on one for members and one for joining."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amqtt.broker import Broker
from amqtt.contexts import Action
from amqtt.plugins.base import BaseTopicPlugin
from paho.mqtt.client import topic_matches_sub


def main() -> None:
    """Run until the process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bind")
    parser.add_argument("--tls", nargs=3, metavar=("CERTIFICATE", "KEY", "AUTHORITY"))
    parser.add_argument("--join", metavar="BIND")
    parser.add_argument("--rules", nargs=2, metavar=("ACL", "JOIN_ACL"))
    arguments = parser.parse_args()
    binds = {"default": arguments.bind} | ({} if arguments.join is None else {"joining": arguments.join})
    tls: dict[str, object] = {}
    plugins: dict[str, dict[str, str]] = {
        "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}  # type: ignore[dict-item]
    }
    if arguments.tls is not None:
        certificate, key, authority = arguments.tls
        tls = {"ssl": True, "certfile": certificate, "keyfile": key, "cafile": authority}
        member_rules, join_rules = (Path(path).read_text(encoding="ascii") for path in arguments.rules)
        plugins[f"{AccessRules.__module__}.AccessRules"] = {"members": member_rules, "joining": join_rules}
    listeners = {name: {"type": "tcp", "bind": bind, **tls} for name, bind in binds.items()}
    # amqtt logs every client that disconnects; real problems show up in the clients.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        asyncio.run(_serve({"listeners": listeners, "plugins": plugins}))
    except Exception as error:  # noqa: BLE001 - the parent must learn why, whatever it was
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        sys.exit(str(cause) or type(cause).__name__)


async def _serve(config: dict[str, object]) -> None:
    await _ForgetfulBroker(config).start()
    await asyncio.Event().wait()


class _ForgetfulBroker(Broker):  # type: ignore[misc]  # amqtt has no types
    """amqtt without retained messages: whoever reaches a broker could fill its memory with them."""

    async def retain_message(self, *_: Any, **__: Any) -> None:
        pass


class AccessRules(BaseTopicPlugin):  # type: ignore[misc]
    """A fleet's access rules, by the common name of a client's certificate."""

    @dataclass
    class Config:
        """The rules for clients with a certificate, and without one, in Mosquitto's form."""

        members: str = ""
        joining: str = ""

    async def topic_filtering(
        self, *, session: Any = None, topic: str | None = None, action: Action | None = None
    ) -> bool | None:
        # As Mosquitto: anyone may subscribe to anything, and gets of it what it may read.
        if action == Action.SUBSCRIBE:
            return True
        certificate = session.ssl_object.getpeercert() or {}
        names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
        rules = self.context.config.members if names else self.context.config.joining
        return is_allowed(rules, names[0] if names else "", session.client_id, topic or "", action == Action.PUBLISH)


def is_allowed(rules: str, user: str, client_id: str, topic: str, writes: bool) -> bool:
    """Whether rules in Mosquitto's form let a client publish to a topic (`writes`), or get its messages."""
    section, wanted = "", "write" if writes else "read"
    for line in rules.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "user":
            section = rest
        access, _, pattern = rest.partition(" ")
        if word == "pattern":
            replaced = [value for mark, value in (("%u", user), ("%c", client_id)) if mark in pattern]
            # A name with a wildcard or level in it would reach the topics of others.
            if any(not value or set("+#/") & set(value) for value in replaced):
                continue
            pattern = pattern.replace("%u", user).replace("%c", client_id)
        elif word != "topic" or section != user:
            continue
        if wanted in access and topic_matches_sub(pattern, topic):
            return True
    return False


if __name__ == "__main__":
    main()
