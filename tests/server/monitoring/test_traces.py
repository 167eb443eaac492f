"""Spans of a played job: a tree whose parts lie within their parents."""

from collections import Counter
from collections.abc import Callable

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.output.log_lines import current_log_context, log_context
from fedprune_server.monitoring.traces import Traces
from fedprune_server.observation.observer import Observer, ServerEnding
from support.fakes.shown_jobs import show


@pytest.fixture
def traces_and_spans() -> tuple[Traces, InMemorySpanExporter]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Traces(provider.get_tracer("test")), exporter


def test_a_round_is_a_tree_of_spans(
    traces_and_spans: tuple[Traces, InMemorySpanExporter], play_two_rounds: Callable[[Observer], State]
) -> None:
    observer, exporter = traces_and_spans
    play_two_rounds(observer)
    with log_context(job="toy"):
        assert "trace_id" in current_log_context(), "of the round that is under way"
        show(observer, ServerEnding())
        assert "trace_id" not in current_log_context()
    spans = {s.context.span_id: s for s in exporter.get_finished_spans()}
    rounds = [s for s in spans.values() if s.name == "round"]
    assert sorted(s.attributes["fedprune.round"] for s in rounds) == [1, 2]
    first = next(s for s in rounds if s.attributes["fedprune.round"] == 1)
    assert first.attributes["fedprune.counted"] == 3
    mine = [s for s in spans.values() if s.context.trace_id == first.context.trace_id]
    names = Counter(s.name for s in mine)
    devices = {"device": 3, "extract": 3, "train": 3, "pull": 3, "aggregate": 3}
    assert names == {"round": 1, "score": 1, "close": 1, "evaluate": 1, **devices}
    for span in mine:
        assert span.attributes["fedprune.job"] == "toy"
        above = parent(span, spans)
        if span.name == "round":
            assert above is None
            continue
        assert above is not None
        assert above.name == ("device" if span.name in ("extract", "train", "pull", "aggregate") else "round")
        assert above.start_time <= span.start_time <= span.end_time <= above.end_time
        if span.name in devices:
            assert span.attributes["fedprune.device"] in "abc"


def parent(span: ReadableSpan, spans: dict[int, ReadableSpan]) -> ReadableSpan | None:
    return None if span.parent is None else spans[span.parent.span_id]


def test_a_refusal_is_an_error_and_ends_what_is_open(traces_and_spans: tuple[Traces, InMemorySpanExporter]) -> None:
    observer, exporter = traces_and_spans
    show(observer, do.Score(1, "m", {}, ("a",)), do.SendOffer("a", 1, 1, {}), at=1.0)
    show(observer, on.OfferRefused("a", 1, 1, "disk full"), at=3.0)
    show(observer, do.Finish("m"), at=4.0)
    ended = {s.name: s for s in exporter.get_finished_spans()}
    assert set(ended) == {"train", "device", "score", "round"}
    assert [ended[name].status.description for name in ("train", "device", "score")] == ["disk full"] * 2 + [None]
