"""Keeps pages live: server-sent events name the topics of changes, which are polled twice a second.

A page loads its content again when one of its topics is named. A topic is a kind of record in `status.db`, or a kind
and a name, such as `job:leaves`. For rows of devices it is `devices` or `devices:attic`, for the audit log `audit`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fedprune.core.errors import FedpruneError
from fedprune_server.web.audit import Audit
from fedprune_server.web.state.fleet_view import ANY_DEVICE, DEVICE_TOPIC, FleetView

# Pause between two polls for changes: the server writes its status as often.
POLL_INTERVAL_S = 0.5

# Proxies close a connection on which nothing comes for a minute, by default.
KEEP_ALIVE_S = 15.0
# Open streams at a time, in total and per operator: each page in each tab holds one open.
MAX_STREAMS, MAX_STREAMS_OF_OPERATOR = 200, 12

# Devices that an event names; of more it says that any may have changed, and a page reads its table once.
MAX_DEVICES = 200


class PendingTopics:
    """Topics that a stream has not sent yet."""

    def __init__(self) -> None:
        self.has_topics = asyncio.Event()
        self._topics: set[str] = set()

    def add(self, topics: Collection[str]) -> None:
        self._topics.update(topics)
        devices = {topic for topic in self._topics if topic.startswith(DEVICE_TOPIC)}
        if len(devices) > MAX_DEVICES:
            self._topics = (self._topics - devices) | {ANY_DEVICE}
        self.has_topics.set()

    def take_event(self) -> str:
        """All topics, as text of the stream."""
        topics, self._topics = sorted(self._topics), set()
        self.has_topics.clear()
        return event_text("changed", topics)


class Streams:
    """All open streams. An idle stream gets a keep-alive comment every `beat_s` seconds."""

    def __init__(self, beat_s: float = KEEP_ALIVE_S) -> None:
        self._beat_s = beat_s
        self._pending_topics: dict[PendingTopics, str] = {}

    def __len__(self) -> int:
        return len(self._pending_topics)

    @contextmanager
    def enter(self, operator: str) -> Iterator[PendingTopics | None]:
        """Enter a stream, and yield its changes from now on; None if the operator may open no further one. Only for the
        event loop, where nothing runs between the check and the entry."""
        operators = list(self._pending_topics.values())
        if len(operators) >= MAX_STREAMS or operators.count(operator) >= MAX_STREAMS_OF_OPERATOR:
            yield None
            return
        pending = PendingTopics()
        self._pending_topics[pending] = operator
        try:
            yield pending
        finally:
            self._pending_topics.pop(pending)

    def send(self, topics: Collection[str]) -> None:
        for pending in self._pending_topics:
            pending.add(topics)

    async def events(
        self, pending: PendingTopics, *, ready: bool, is_logged_in: Callable[[], bool]
    ) -> AsyncIterator[str]:
        """Server-sent events of a stream, until `is_logged_in`, which is called in another thread, says no."""
        yield event_text("hello", {"ready": ready})
        while await run_in_threadpool(is_logged_in):
            try:
                await asyncio.wait_for(pending.has_topics.wait(), self._beat_s)
            except asyncio.TimeoutError:
                yield ": still here\n\n"
                continue
            if await run_in_threadpool(is_logged_in):
                yield pending.take_event()
        yield event_text("ended", {})


class LiveStream(Response):
    """The answer to a request for a stream: its events, or a refusal if too many are open.

    That is decided when the answer begins, not when it is made, since a request may end before.
    """

    def __init__(self, streams: Streams, operator: str, *, ready: bool, is_logged_in: Callable[[], bool]) -> None:
        super().__init__()
        self._streams, self._operator = streams, operator
        self._ready, self._is_logged_in = ready, is_logged_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._streams.enter(self._operator) as pending:
            answer: Response
            if pending is None:
                answer = JSONResponse({"error": "too many streams are open"}, 429)
            else:
                events = self._streams.events(pending, ready=self._ready, is_logged_in=self._is_logged_in)
                headers = {"x-accel-buffering": "no"}
                answer = StreamingResponse(events, media_type="text/event-stream", headers=headers)
            await answer(scope, receive, send)


async def send_changes(streams: Streams, view: FleetView, audit: Audit, every_s: float = POLL_INTERVAL_S) -> None:
    """Send topics of changes to all streams, until it is cancelled."""
    is_failing, topics = False, set[str]()
    while True:
        await asyncio.sleep(every_s)
        try:
            for poll in (view.changes, audit.changes):
                topics |= await run_in_threadpool(poll)
            is_failing = False
        except FedpruneError as error:
            if not is_failing:
                print(f"the console can't look for changes: {error}", file=sys.stderr, flush=True)
            is_failing = True
            continue
        if topics:
            streams.send(topics)
            topics = set()


def event_text(name: str, data: Any) -> str:
    """Text of a server-sent event. JSON contains no line breaks, so data can't begin another event."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
