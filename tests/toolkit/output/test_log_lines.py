"""The server's log: a record is one line whatever is in it, and says what it is about."""

import io
import json
import logging
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.output.log_lines import JSON, TEXT, log_context, log_to_stdout

log = logging.getLogger("fedprune.server")


def log_output(form: str, *messages: str, verbose: bool = False) -> str:
    stream = io.StringIO()
    with log_to_stdout(verbose=verbose, form=form, stream=stream):
        for message in messages:
            log.warning("%s", message)
    return stream.getvalue()


@given(st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_no_message_begins_a_line_of_its_own(text: str) -> None:
    plain = log_output(TEXT, text)
    assert plain.count("\n") == 1
    assert plain[:-1].isprintable()
    assert len(plain.splitlines()) == 1
    raw = log_output(JSON, text)
    assert raw.isascii()
    assert len(raw.splitlines()) == 1
    assert json.loads(raw)["message"] == text


@pytest.mark.parametrize("form", [TEXT, JSON])
def test_a_traceback_cannot_pass_for_a_record(form: str) -> None:
    stream = io.StringIO()
    with log_to_stdout(verbose=False, form=form, stream=stream):
        try:
            raise ValueError('no\n12:00:00 all is well\n{"level": "info"}')
        except ValueError:
            log.exception("failed")
    first, *continuation_lines = stream.getvalue().splitlines()
    assert "failed" in first
    assert all(line.startswith("    ") for line in continuation_lines)
    assert (form == JSON) == (not continuation_lines)


def test_a_record_says_what_it_is_about_and_threads_do_not_mix() -> None:
    stream = io.StringIO()

    def elsewhere() -> None:
        with log_context(device="other"):
            log.info("there")

    with log_to_stdout(verbose=False, form=JSON, stream=stream):
        with log_context(job="leaves", round=3, trace_id=None):
            with log_context(device="pi"):
                log.info("within")
                thread = threading.Thread(target=elsewhere)
                thread.start()
                thread.join()
            log.info("after")
        log.info("outside")
    rows = {r["message"]: r for r in map(json.loads, stream.getvalue().splitlines())}
    contexts = {m: {k: r[k] for k in ("job", "round", "device", "trace_id") if k in r} for m, r in rows.items()}
    assert contexts == {
        "within": {"job": "leaves", "round": 3, "device": "pi"},
        "there": {"device": "other"},
        "after": {"job": "leaves", "round": 3},
        "outside": {},
    }
    assert {"at", "level", "logger"} <= rows["outside"].keys()
