"""Exports a job's rounds as OpenTelemetry spans, made of the events and commands of the job's coordinator.

    round N  >  score, close, evaluate
             >  device (one for each that is asked)  >  extract, train (offered to announced), pull (to stored),
                                                        aggregate

In an asynchronous job a device's span belongs to the round in which the device was asked, even if it ends after that
round's span.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Status, StatusCode, Tracer

from fedprune import __version__
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.state import Progress, outcome
from fedprune.output.log_lines import mark_job
from fedprune_server.monitoring.round_parts import DEVICE_PARTS, finished_part, started_part
from fedprune_server.observation.observer import RoundEnded, ServerEnding, TurnEvent, handle_each
from fedprune_server.observation.snapshot import JobSnapshot

log = logging.getLogger("fedprune.server")

# Open spans of devices, at most: each takes memory, and that of a device that never answers stays open. In a larger
# fleet the other devices have none.
MAX_OPEN_SPANS = 20_000

_DEVICE = "device"


class Traces:
    """Makes spans of the rounds of a server's jobs."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._jobs: dict[str, _JobTraces] = {}

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        job = self._jobs.get(snapshot.name)
        if job is None:
            job = self._jobs[snapshot.name] = _JobTraces(self._tracer, snapshot.name)
        handle_each(events, lambda event: job.note(event.payload, event.happened_at))


class _JobTraces:
    """The spans of one job."""

    def __init__(self, tracer: Tracer, job: str) -> None:
        self._tracer, self._job = tracer, job
        self._round: Span | None = None
        self._round_number = 0
        # By the span's name and the device's: `device` and its parts. Parts of the whole round have no device.
        self._open_spans: dict[tuple[str, str], Span] = {}

    def note(self, event: object, now: float) -> None:
        match event:
            case do.Score():
                self._begin_round(event.round, now)
            case do.Extract():
                if self._round is None or event.basis.round > self._round_number:
                    self._begin_round(event.basis.round, now)
                self._begin_device(event.part.device, event.basis.round, event.part.attempt, now)
            case do.SendOffer():
                self._begin_device(event.device, event.round, event.attempt, now)
            case do.Finish():
                for span_name, name in list(self._open_spans):
                    self._end(span_name, name, now)
                self._finish_round(now)
        if (timed_part := started_part(event)) is not None:
            may_repeat = isinstance(event, (do.SendOffer, do.PullUpdate, do.FoldUpdate))
            self._begin(*timed_part, now, restart=not may_repeat)
        elif (timed_part := finished_part(event)) is not None:
            self._end(*timed_part, now)
        match event:
            case on.Folded():
                self._end(_DEVICE, event.device, now, outcome="folded")
            case on.UpdateRejected() | on.OfferRefused():
                for name in (*DEVICE_PARTS, _DEVICE):
                    self._end(name, event.device, now, reason=event.reason)
            case RoundEnded():
                self._end_round(event.summary, now)
            case ServerEnding():  # a span can't be continued by another process, which begins its own
                for key in list(self._open_spans):
                    self._open_spans.pop(key).end()
                self._finish_round(None)

    def _end_round(self, summary: Mapping[str, Any], now: float) -> None:
        """End the round's span, and those of devices that it didn't wait for."""
        counted_updates = 0
        for name, device_part in summary["devices"].items():
            counted_updates += device_part["progress"] == Progress.FOLDED.value
            result = outcome(device_part["progress"], device_part.get("kind", ""))
            for span_name in (*DEVICE_PARTS, _DEVICE):
                self._end(span_name, name, now, reason=device_part["reason"], outcome=result)
        if self._round is not None and summary["round"] == self._round_number:
            self._round.set_attribute("fedprune.counted", counted_updates)
            self._round.set_attribute("fedprune.asked", len(summary["devices"]))
            self._round.set_attribute("fedprune.model", str(summary["model"]))
            for metric, value in summary["metrics"].items():
                if isinstance(value, (int, float)):
                    self._round.set_attribute(f"fedprune.metric.{metric}", value)
            self._finish_round(now)

    def _begin_round(self, number: int, now: float) -> None:
        if self._round is not None and number == self._round_number:
            return
        self._finish_round(now)
        self._round_number = number
        attributes: dict[str, Any] = {"fedprune.job": self._job, "fedprune.round": number}
        self._round = self._tracer.start_span("round", attributes=attributes, start_time=_ns(now))
        mark_job(self._job, trace_id=f"{self._round.get_span_context().trace_id:032x}")

    def _finish_round(self, now: float | None) -> None:
        for round_part in ("score", "close", "evaluate"):
            if now is not None:
                self._end(round_part, "", now)
        if self._round is not None:
            self._round.end(None if now is None else _ns(now))
        self._round = None
        mark_job(self._job, trace_id=None)

    def _begin_device(self, name: str, number: int, attempt: int, now: float) -> None:
        if (_DEVICE, name) in self._open_spans or len(self._open_spans) >= MAX_OPEN_SPANS:
            return
        attributes = {"fedprune.device": name, "fedprune.attempt": attempt}
        self._open_spans[_DEVICE, name] = self._start_span(_DEVICE, self._round, number, now, attributes)

    def _begin(self, span_name: str, name: str, now: float, *, restart: bool = True) -> None:
        if (span_name, name) in self._open_spans:
            if not restart:
                return
            self._end(span_name, name, now)
        parent = self._open_spans.get((_DEVICE, name)) if name else self._round
        if parent is not None:
            self._open_spans[span_name, name] = self._start_span(
                span_name, parent, self._round_number, now, {"fedprune.device": name} if name else {}
            )

    def _start_span(
        self, name: str, parent: Span | None, number: int, now: float, further_attributes: Mapping[str, Any]
    ) -> Span:
        context = None if parent is None else trace.set_span_in_context(parent)
        attributes: dict[str, Any] = {"fedprune.job": self._job, "fedprune.round": number, **further_attributes}
        return self._tracer.start_span(name, context, attributes=attributes, start_time=_ns(now))

    def _end(self, span_name: str, name: str, now: float, *, reason: str = "", outcome: str = "") -> None:
        span = self._open_spans.pop((span_name, name), None)
        if span is None:
            return
        if outcome:
            span.set_attribute("fedprune.outcome", outcome)
        if reason:
            span.set_status(Status(StatusCode.ERROR, reason[:500]))
        span.end(_ns(now))


@contextmanager
def span_tracer(url: str | None, exporter: Callable[[], Any] | None = None) -> Iterator[Tracer]:
    """A tracer that exports spans to a collector, by OTLP over HTTP or with another `exporter`.

    `url` is such as `http://127.0.0.1:4318`; None for what OpenTelemetry's environment variables say.
    """
    if exporter is None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        endpoint = None if url is None else f"{url.rstrip('/')}/v1/traces"
        exporter = partial(OTLPSpanExporter, endpoint=endpoint, timeout=5)
    resource = Resource.create({"service.name": "fedprune-server", "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter()))
    try:
        yield provider.get_tracer("fedprune", __version__)
    finally:
        provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
