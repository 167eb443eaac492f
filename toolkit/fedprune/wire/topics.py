"""MQTT topics: fedprune/1/{site}/{device}/{job}/{channel}.

- Channels are `up` and `down` for messages, `up/blob` and `down/blob` for chunks.
- The job is `-` for messages that belong to no job, the device is `all` for broadcasts.
- A board that is not yet a member asks on `join` and is answered on `joined`; the nonce of its request stands for
  the device.
- Servers of one identity find each other on `servers`, which no device reads or writes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fedprune.core.errors import ProtocolError, Subject
from fedprune.core.validation import ErrorClass

# First levels of every topic; the number is the protocol's version.
TOPIC_PREFIX = "fedprune/1"

NO_JOB = "-"
EVERYONE = "all"
TOPIC_CHANNELS = ("up", "up/blob", "down", "down/blob")

JOIN, JOINED = "join", "joined"
SERVERS = "servers"

_NONCE = re.compile(r"[0-9a-f]{32}")
# No slash, plus sign or hash, which MQTT reserves; no "." and "..", because names are also folders.
NAME_PATTERN = r"(?!\.{1,2}(?![\s\S]))[A-Za-z0-9_.-]{1,64}"
NAME_DESCRIPTION = "a name of 1 to 64 letters, digits, _ . or -"
_NAME = re.compile(NAME_PATTERN)


class TopicParts(NamedTuple):
    """The parts of a topic."""

    device: str
    job: str
    channel: str


class Topics:
    """The topics of one site."""

    def __init__(self, site: str) -> None:
        self.site = check_topic_name(site, "site")
        self._prefix = f"{TOPIC_PREFIX}/{site}"

    def up(self, device: str, job: str = NO_JOB) -> str:
        """Messages of a device to the server."""
        return self._topic(device, job, "up")

    def up_blob(self, device: str, job: str = NO_JOB) -> str:
        """Chunks of a device to the server."""
        return self._topic(device, job, "up/blob")

    def down(self, device: str, job: str = NO_JOB) -> str:
        """Messages of the server to a device."""
        return self._topic(device, job, "down")

    def down_blob(self, device: str, job: str = NO_JOB) -> str:
        """Chunks of the server to a device."""
        return self._topic(device, job, "down/blob")

    def broadcast(self) -> str:
        """Messages of the server to all devices."""
        return f"{self._prefix}/{EVERYONE}/{NO_JOB}/down"

    def server_subscriptions(self) -> list[str]:
        return [f"{self._prefix}/+/+/up", f"{self._prefix}/+/+/up/blob"]

    def device_subscriptions(self, device: str) -> list[str]:
        device_prefix = f"{self._prefix}/{check_device(device)}/+"
        # One wildcard for all jobs: jobs begin and end while the device stays connected.
        return [f"{device_prefix}/down", f"{device_prefix}/down/blob", self.broadcast()]

    def join_request(self, nonce: str) -> str:
        """Requests to join; the nonce is also the MQTT client id, by which brokers keep others out."""
        return f"{self._prefix}/{check_nonce(nonce)}/{NO_JOB}/{JOIN}"

    def join_answer(self, nonce: str) -> str:
        """Answers to a request to join."""
        return f"{self._prefix}/{check_nonce(nonce)}/{NO_JOB}/{JOINED}"

    def join_subscription(self) -> str:
        """The subscription of a server that admits devices."""
        return f"{self._prefix}/+/{NO_JOB}/{JOIN}"

    def servers(self) -> str:
        """Queries and answers of this site's servers."""
        return f"{self._prefix}/{EVERYONE}/{NO_JOB}/{SERVERS}"

    def parse_join(self, topic: str) -> str:
        """The nonce in the topic of a request of this site. Raises `ProtocolError` if it is another topic."""
        levels = topic.split("/", 5)
        if len(levels) != 6 or "/".join(levels[:3]) != self._prefix or levels[4:] != [NO_JOB, JOIN]:
            raise ProtocolError("topic", expected=f"{self._prefix}/<nonce>/{NO_JOB}/{JOIN}", got=repr(topic[:200]))
        return check_nonce(levels[3])

    def parse(self, topic: str) -> TopicParts:
        """The parts of a topic of this site. Raises `ProtocolError` if it is another topic."""
        levels = topic.split("/", 5)  # no further: a channel may contain a slash
        if len(levels) != 6 or "/".join(levels[:3]) != self._prefix:
            raise ProtocolError("topic", expected=f"{self._prefix}/<device>/<job>/<channel>", got=repr(topic[:200]))
        device, job, channel = levels[3:]
        if channel not in TOPIC_CHANNELS:
            raise ProtocolError("channel of a topic", expected=", ".join(TOPIC_CHANNELS), got=repr(channel[:80]))
        return TopicParts(check_topic_name(device, "device"), job if job == NO_JOB else check_job(job), channel)

    def _topic(self, device: str, job: str, channel: str) -> str:
        if job != NO_JOB:
            check_job(job)
        return f"{self._prefix}/{check_device(device)}/{job}/{channel}"


def check_nonce(value: object) -> str:
    """`value`, if it is the nonce of a request to join: 32 hex digits. Raises `ProtocolError` if it is not."""
    if not isinstance(value, str) or not _NONCE.fullmatch(value):
        raise ProtocolError("nonce", expected="32 hex digits", got=repr(value)[:80])
    return value


def check_topic_name(value: object, what: Subject, *, error: ErrorClass = ProtocolError) -> str:
    """`value`, if it is a name: 1 to 64 letters, digits, `_`, `.` or `-`, but neither `.` nor `..`. Raises `error`,
    which names `what`."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise error(what, expected=NAME_DESCRIPTION, got=repr(value)[:80])
    return value


def to_name(text: str) -> str:
    """A text as a valid name: cut to 64 characters, with dashes in place of forbidden ones."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:64]


def check_device(value: object, what: Subject = "device", *, error: ErrorClass = ProtocolError) -> str:
    """`value`, if it is a name that a device may have: any but `all`. Raises `error` if it is not."""
    if value == EVERYONE:
        raise error(what, expected="a device's own name", got=repr(value))
    return check_topic_name(value, what, error=error)


def check_job(value: object, what: Subject = "job", *, error: ErrorClass = ProtocolError) -> str:
    """`value`, if it is a name that a job may have: any but `-`. Raises `error` if it is not."""
    if value == NO_JOB:
        raise error(what, expected=f"{NAME_DESCRIPTION}, other than '{NO_JOB}'", got=repr(value))
    return check_topic_name(value, what, error=error)
