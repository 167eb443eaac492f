"""Live news for browsers, as server-sent events: what changed, gathered for half a second, so that ten thousand
devices that report at once are one event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fedprune_server.web.state.model import Model

GATHER_S = 0.5
BEAT_S = 15.0
MOST, MOST_OF_ONE = 200, 12
"""Streams that are open at the same time, of all and of one operator."""

NAMES, ITEMS = 200, 100
"""Devices that an event names, and lines and the like that wait for a stream, at most."""

_LATEST = ("site", "rollouts")
_EACH = ("round", "alert", "log", "answer", "device", "coverage")


class Pending:
    """What a stream hasn't told yet."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.ended = False
        self._begin()

    def _begin(self) -> None:
        self._latest: dict[str, tuple[str, Any]] = {}
        self._each: dict[str, list[Any]] = {}
        self._names: dict[str, None] = {}
        self._more = False

    def add(self, kind: str, what: Any) -> None:
        """Something has changed."""
        if kind == "devices":
            for name in what:
                if len(self._names) >= NAMES and name not in self._names:
                    self._more = True
                    break
                self._names[name] = None
        elif kind == "job":
            self._latest[f"job {what['name']}"] = kind, what
        elif kind in _LATEST:
            self._latest[kind] = kind, what
        elif kind in _EACH:
            items = self._each.setdefault(kind, [])
            items.append(what)
            del items[:-ITEMS]
        self.news.set()

    def take(self, model: Model) -> str:
        """All that waits, as text of the stream."""
        events = list(self._latest.values())
        if self._names:
            names = {"names": list(self._names), "more": self._more, "counts": model.counts}
            events.append(("devices", names))
        events += [(kind, what) for kind, items in self._each.items() for what in items]
        self._begin()
        self.news.clear()
        return "".join(event(kind, what) for kind, what in events)


class Streams:
    """All open streams.

    Args:
        model: Says what changes.
        gather_s: For how long changes are gathered.
        beat_s: How often a stream that has nothing to tell shows that it is open.
    """

    def __init__(self, model: Model, gather_s: float = GATHER_S, beat_s: float = BEAT_S) -> None:
        self._model = model
        self._gather_s, self._beat_s = gather_s, beat_s
        self._open: dict[Pending, str] = {}
        model.listen(self._tell)

    def __len__(self) -> int:
        return len(self._open)

    def full(self, operator: str) -> bool:
        """Whether there is no room for another stream of an operator."""
        return len(self._open) >= MOST or sum(o == operator for o in self._open.values()) >= MOST_OF_ONE

    async def stream(self, operator: str, allowed: Callable[[], bool]) -> AsyncIterator[str]:
        """What changes from now on, as text of a stream, until it isn't allowed any more.

        Args:
            operator: Whose stream it is.
            allowed: Whether that one is still logged in; asked now and then.
        """
        pending = Pending()
        self._open[pending] = operator
        try:
            yield event("hello", {"ready": self._model.ready})
            while allowed():
                try:
                    await asyncio.wait_for(pending.news.wait(), self._beat_s)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"
                    continue
                await asyncio.sleep(self._gather_s)
                if allowed():
                    yield pending.take(self._model)
            yield event("ended", {})
        finally:
            self._open.pop(pending, None)

    def _tell(self, kind: str, what: Any) -> None:
        for pending in self._open:
            pending.add(kind, what)


def event(kind: str, what: Any) -> str:
    """An event as text of a stream: JSON has no line ends, so nothing in it can begin another one."""
    return f"event: {kind}\ndata: {json.dumps(what, separators=(',', ':'))}\n\n"
