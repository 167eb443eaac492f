"""How much of what can't be read is logged: no sender's noise hides another's."""

import logging

import pytest

from fedprune.core.errors import ProtocolError
from fedprune.wire.rejected_messages import LOG_PERIOD_S, MAX_LOGGED, RejectedMessageLog

pytestmark = pytest.mark.board


def test_each_sender_has_a_limit_of_its_own_and_strangers_share_one(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    complaints = RejectedMessageLog(logging.getLogger("test.rejected"), lambda: now[0])

    def complaint_lines(sender: str, times: int = 1) -> list[str]:
        caplog.clear()
        for n in range(times):
            complaints.note_rejection(f"topic/{sender}/{n}", ProtocolError("nonsense"), sender)
        return [r.getMessage() for r in caplog.records]

    assert len(complaint_lines("noisy", 9 * MAX_LOGGED)) == MAX_LOGGED + 1
    assert len(complaint_lines("calm")) == 1
    assert len(complaint_lines("", 9 * MAX_LOGGED)) == MAX_LOGGED + 1
    assert complaint_lines("") == []
    assert len(complaint_lines("calm")) == 1
    now[0] = LOG_PERIOD_S
    (noisy, *_) = [line for line in complaint_lines("calm") if "noisy" in line]
    assert str(8 * MAX_LOGGED) in noisy
    assert len(complaint_lines("noisy")) == 1
