"""Detects devices that have vanished by their silence: a broker may lose their wills.

A device sends something at least every few minutes (`alive`, if it has nothing else to send). One that is silent for a
quarter of an hour is asked for a birth, and counts as gone if it doesn't answer. So do devices that don't answer the
hello that this server broadcasts when it connects. Only the device that has been silent the longest is checked, so that
ten thousand devices cost no more than ten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

# Seconds of silence after which a device is asked for a birth: several of its `alive` messages would have been lost.
QUIET_S = 900.0

# Seconds after a hello in which a device must answer: its pauses between two attempts to connect grow up to a minute.
ANSWER_S = 75.0


class Presence:
    """The times at which devices were last heard.

    Args:
        session: Returns the number of a device's connection, or None.
    """

    def __init__(
        self, session: Callable[[str], int | None], quiet_s: float = QUIET_S, answer_s: float = ANSWER_S
    ) -> None:
        self._session = session
        self._quiet_s, self._answer_s = quiet_s, answer_s
        self._heard: OrderedDict[str, float] = OrderedDict()  # the longest silent device first
        # Time and connection of each hello without an answer, the earliest first.
        self._asked: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def heard(self, device: str, now: float) -> None:
        self._asked.pop(device, None)
        if self._session(device) is not None:
            self._heard[device] = now
            self._heard.move_to_end(device)

    def left(self, device: str) -> None:
        self._heard.pop(device, None)
        self._asked.pop(device, None)

    def connected(self, now: float, devices: Iterable[str]) -> None:
        """Note that the broker is connected and every connected device is asked: the broker may have lost their wills
        meanwhile."""
        self._heard.clear()
        sessions = ((name, self._session(name)) for name in devices)
        self._asked = OrderedDict((name, (now, session)) for name, session in sessions if session is not None)

    def lost(self) -> None:
        self._heard.clear()
        self._asked.clear()

    def silent(self, now: float) -> list[str]:
        """Devices that have been silent for too long; each is named once until it is heard again."""
        names = []
        while self._heard:
            name, heard_at = next(iter(self._heard.items()))
            if now - heard_at < self._quiet_s:
                break
            del self._heard[name]
            session = self._session(name)
            if session is not None:
                self._asked[name] = now, session
                names.append(name)
        return names

    def gone(self, now: float) -> dict[str, int]:
        """Devices that haven't answered in time, with their connections; each is named once."""
        missing = {}
        while self._asked:
            name, (asked_at, session) = next(iter(self._asked.items()))
            if now - asked_at <= self._answer_s:
                break
            del self._asked[name]
            missing[name] = session
        return missing
