"""Finds devices that have vanished, by their silence: their MQTT wills aren't enough, since a broker may lose them.

A device sends something at least every few minutes (`alive`, if it has nothing else to send). If it is silent for a
quarter of an hour, it is asked for its birth (its announcement of itself), and counts as gone if it doesn't answer. So
does a device that doesn't answer the hello (the signed greeting) that this server broadcasts when it connects. Only the
device that has been silent the longest is checked, so that ten thousand devices cost no more than ten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

# Seconds of silence after which a device is asked for a birth: several of its `alive` messages would have been lost.
MAX_SILENCE_S = 900.0

# Seconds after a hello in which a device must answer: its pauses between two attempts to connect grow up to a minute.
HELLO_ANSWER_S = 75.0


class Presence:
    """The times at which devices were last heard. `session_of` returns the number of a device's connection, or None."""

    def __init__(self, session_of: Callable[[str], int | None]) -> None:
        self._session_of = session_of
        self._heard_at: OrderedDict[str, float] = OrderedDict()  # the longest silent device first
        # Time and connection of each hello, or request for a birth, without an answer; the earliest first.
        self._unanswered_hellos: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def note_message(self, device: str, now: float) -> None:
        self._unanswered_hellos.pop(device, None)
        if self._session_of(device) is not None:
            self._heard_at[device] = now
            self._heard_at.move_to_end(device)

    def forget(self, device: str) -> None:
        self._heard_at.pop(device, None)
        self._unanswered_hellos.pop(device, None)

    def on_broker_connect(self, now: float, devices: Iterable[str]) -> None:
        """Expect an answer of every connected device: a broker that was away may have lost wills."""
        self._heard_at.clear()
        sessions = ((name, self._session_of(name)) for name in devices)
        self._unanswered_hellos = OrderedDict((n, (now, session)) for n, session in sessions if session is not None)

    def on_broker_loss(self) -> None:
        self._heard_at.clear()
        self._unanswered_hellos.clear()

    def take_silent(self, now: float) -> list[str]:
        """Devices that have been silent for too long; each is named once until it is heard again."""
        names = []
        while self._heard_at:
            name, heard_at = next(iter(self._heard_at.items()))
            if now - heard_at < MAX_SILENCE_S:
                break
            del self._heard_at[name]
            session = self._session_of(name)
            if session is not None:
                self._unanswered_hellos[name] = now, session
                names.append(name)
        return names

    def take_gone(self, now: float) -> dict[str, int]:
        """Devices that haven't answered in time, with their connections; each is named once."""
        missing = {}
        while self._unanswered_hellos:
            name, (asked_at, session) = next(iter(self._unanswered_hellos.items()))
            if now - asked_at <= HELLO_ANSWER_S:
                break
            del self._unanswered_hellos[name]
            missing[name] = session
        return missing
