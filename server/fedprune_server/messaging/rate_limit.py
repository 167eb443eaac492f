"""Drops the messages of devices in quarantine before they are read."""

from __future__ import annotations

from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.messaging.transport import DroppedMessage, Item, Relay, Wire


class RateLimitedLink(Relay):
    """A connection without the messages that a quarantine drops. Signatures are checked behind it, if messages are
    signed, because each check costs as much as dropping a dozen messages here; then its sender is charged behind it."""

    def __init__(self, link: Wire, quarantine: Quarantine, *, is_signed: bool = False) -> None:
        super().__init__(link)
        self._quarantine, self._is_signed = quarantine, is_signed

    def get(self, timeout: float | None = 0.0) -> Item | DroppedMessage | None:
        event = self._quarantine.next_event()
        if event is not None:
            return event
        item = self._link.get(timeout)
        if isinstance(item, tuple):
            device, is_chunk = _device_level(item[0]), item[0].endswith("/blob")
            is_verified = not self._is_signed
            if not self._quarantine.charge_message(device, len(item[1]), chunk=is_chunk, is_verified=is_verified):
                return DroppedMessage()
        return item


def _device_level(topic: str) -> str:
    """The topic's level that names the device. Its text is a sender's, and need not be a valid name."""
    levels = topic.split("/", 4)
    return levels[3] if len(levels) > 3 else ""
