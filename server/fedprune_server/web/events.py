"""Live pages: server-sent events about changes, polled twice a second."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fedprune.core.errors import FedpruneError
from fedprune_server.web.state.orders import OrderService
from fedprune_server.web.state.status import FleetView

LOOK_S = 0.5
"""Seconds between two polls for changes."""

BEAT_S = 15.0
MOST, MOST_OF_ONE = 200, 12
"""Open streams at a time, in total and per operator."""

NAMES, ITEMS = 200, 100
"""At most: devices named in an event, and queued items of another kind per stream."""

_LATEST = ("site", "rollouts")
_EACH = ("round", "alert", "log", "answer", "device", "coverage")


class Pending:
    """Changes that a stream has not sent yet."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._counts: dict[str, dict[str, int]] = {}
        self._begin()

    def _begin(self) -> None:
        self._latest: dict[str, tuple[str, Any]] = {}
        self._each: dict[str, list[Any]] = {}
        self._names: dict[str, None] = {}
        self._more = False

    def add(self, kind: str, what: Any) -> None:
        if kind == "counts":
            self._counts = what
            return
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

    def take(self) -> str:
        """All changes, as text of the stream."""
        events = list(self._latest.values())
        if self._names:
            names = {"names": list(self._names), "more": self._more, "counts": self._counts}
            events.append(("devices", names))
        events += [(kind, what) for kind, items in self._each.items() for what in items]
        self._begin()
        self.news.clear()
        return "".join(event(kind, what) for kind, what in events)


class Streams:
    """All open streams. An idle stream gets a keep-alive comment every `beat_s` seconds."""

    def __init__(self, beat_s: float = BEAT_S) -> None:
        self._beat_s = beat_s
        self._open: dict[Pending, str] = {}

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def entered(self, operator: str) -> Iterator[Pending | None]:
        """A stream's changes from now on; None if an operator may open no further one. Only for the event loop, where
        nothing comes between the check and the entry."""
        if len(self._open) >= MOST or sum(o == operator for o in self._open.values()) >= MOST_OF_ONE:
            yield None
            return
        pending = Pending()
        self._open[pending] = operator
        try:
            yield pending
        finally:
            self._open.pop(pending)

    def send(self, kind: str, what: Any) -> None:
        for pending in self._open:
            pending.add(kind, what)

    async def events(self, pending: Pending, *, ready: bool, allowed: Callable[[], bool]) -> AsyncIterator[str]:
        """Server-sent events of a stream, while `allowed()`, called in another thread, says that the operator is logged
        in."""
        yield event("hello", {"ready": ready})
        while await run_in_threadpool(allowed):
            try:
                await asyncio.wait_for(pending.news.wait(), self._beat_s)
            except asyncio.TimeoutError:
                yield ": still here\n\n"
                continue
            if await run_in_threadpool(allowed):
                yield pending.take()
        yield event("ended", {})


class LiveStream(Response):
    """The answer to a request for a stream: its events, or a refusal of one too many, which is decided as it begins."""

    def __init__(self, streams: Streams, operator: str, *, ready: bool, allowed: Callable[[], bool]) -> None:
        super().__init__()
        self._streams, self._operator = streams, operator
        self._ready, self._allowed = ready, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._streams.entered(self._operator) as pending:
            answer: Response
            if pending is None:
                answer = JSONResponse({"error": "too many streams are open"}, 429)
            else:
                events = self._streams.events(pending, ready=self._ready, allowed=self._allowed)
                headers = {"x-accel-buffering": "no"}
                answer = StreamingResponse(events, media_type="text/event-stream", headers=headers)
            await answer(scope, receive, send)


async def watch(streams: Streams, view: FleetView, orders: OrderService, every_s: float = LOOK_S) -> None:
    """Send changes to all streams, until it is cancelled."""
    failing = False
    while True:
        await asyncio.sleep(every_s)
        try:
            changes = await run_in_threadpool(lambda: view.changes() + orders.answers())
            if len(streams) and any(kind == "devices" for kind, _ in changes):
                streams.send("counts", await run_in_threadpool(lambda: view.counts))
            failing = False
        except FedpruneError as error:
            if not failing:
                print(f"the console can't look for changes: {error}", file=sys.stderr, flush=True)
            failing = True
            continue
        for kind, what in changes:
            streams.send(kind, what)


def event(kind: str, what: Any) -> str:
    """Text of a server-sent event. JSON contains no line breaks, so data can't begin another event."""
    return f"event: {kind}\ndata: {json.dumps(what, separators=(',', ':'))}\n\n"
