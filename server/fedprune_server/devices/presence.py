"""Who is still there: a broker may not tell when a device vanishes, so silence does.

A device says something at least every few minutes (`alive`, where it has nothing else to say). One that is silent for
a quarter of an hour is asked for a birth, and gone if it doesn't answer; so are those that don't answer the hello that
this server says as it connects. Nothing is looked at but who has been silent the longest, so that ten thousand devices
cost no more than ten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

QUIET_S = 900.0
"""A device that has said nothing for so long is asked whether it is there."""

ANSWER_S = 75.0
"""Devices that haven't answered a hello by then are gone: their pauses between two attempts go up to a minute."""


class Presence:
    """When devices were heard last; `session` gives the number of a device's connection, or None."""

    def __init__(
        self, session: Callable[[str], int | None], quiet_s: float = QUIET_S, answer_s: float = ANSWER_S
    ) -> None:
        self._session = session
        self._quiet_s, self._answer_s = quiet_s, answer_s
        self._heard: OrderedDict[str, float] = OrderedDict()  # who was silent the longest first
        self._asked: OrderedDict[str, tuple[float, int]] = OrderedDict()  # when, and the connection that was meant

    def heard(self, device: str, now: float) -> None:
        self._asked.pop(device, None)
        if self._session(device) is not None:
            self._heard[device] = now
            self._heard.move_to_end(device)

    def left(self, device: str) -> None:
        self._heard.pop(device, None)
        self._asked.pop(device, None)

    def connected(self, now: float, devices: Iterable[str]) -> None:
        """The broker is connected, and all devices that were connected are asked: it may have lost their death
        messages.
        """
        self._heard.clear()
        sessions = ((name, self._session(name)) for name in devices)
        self._asked = OrderedDict((name, (now, session)) for name, session in sessions if session is not None)

    def lost(self) -> None:
        self._heard.clear()
        self._asked.clear()

    def silent(self, now: float) -> list[str]:
        """Devices to ask; each once until it is heard again."""
        names = []
        while self._heard:
            name, at = next(iter(self._heard.items()))
            if now - at < self._quiet_s:
                break
            del self._heard[name]
            session = self._session(name)
            if session is not None:
                self._asked[name] = now, session
                names.append(name)
        return names

    def gone(self, now: float) -> dict[str, int]:
        """Devices that haven't answered in time, with their connections; each once."""
        found = {}
        while self._asked:
            name, (at, session) = next(iter(self._asked.items()))
            if now - at <= self._answer_s:
                break
            del self._asked[name]
            found[name] = session
        return found
