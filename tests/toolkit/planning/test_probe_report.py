"""Probe reports come over the network: they are checked, never trusted."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ProfileError
from fedprune.planning.probe_report import ProbeReport

pytestmark = pytest.mark.board

REPORT = ProbeReport(
    cores=4,
    memory_total=1_900_000_000,
    memory_available=1_500_000_000,
    seconds=3.2,
    onnxruntime="1.31.1",
    board="Raspberry Pi 4 Model B Rev 1.5",
    clock_hz=1_800_000_000,
    train_rate=1.1e10,
    infer_rate=1.4e10,
    temperature_c=61.5,
    throttled=False,
)


def test_a_report_survives_json_types() -> None:
    assert ProbeReport.from_dict(REPORT.to_dict()) == REPORT


BAD = [("memory_available", 2_000_000_000), ("board", "x" * 201), ("unit", "npu"), ("cores", -1), ("cores", None)]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:20])
def test_a_bad_measurement_is_named(name: str, value: Any) -> None:
    with pytest.raises(ProfileError, match=f"probe report: {name}"):
        ProbeReport.from_dict({**REPORT.to_dict(), name: value})


def test_a_missing_measurement_is_named() -> None:
    with pytest.raises(ProfileError, match="probe report: cores"):
        ProbeReport.from_dict({n: v for n, v in REPORT.to_dict().items() if n != "cores"})


@pytest.mark.parametrize("body", [None, []])
def test_what_is_no_table_is_refused(body: object) -> None:
    with pytest.raises(ProfileError):
        ProbeReport.from_dict(body)


@given(st.sampled_from(sorted(REPORT.to_dict())), st.none() | st.integers() | st.floats() | st.text() | st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_value_is_refused_or_kept(name: str, value: Any) -> None:
    try:
        report = ProbeReport.from_dict({**REPORT.to_dict(), name: value})
    except ProfileError:
        return
    assert ProbeReport.from_dict(report.to_dict()) == report
