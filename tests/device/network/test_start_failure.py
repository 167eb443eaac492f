"""A board that can't start ends with the error that keeps it from starting, whatever becomes of the report."""

import logging
from pathlib import Path

import pytest

from fedprune.core.errors import DataError
from fedprune_device.network import start_failure
from fedprune_device.network.membership import MembershipOptions
from fedprune_device.storage.directory_owner import DirectoryOwner


def test_a_report_that_fails_in_any_way_is_logged_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    DirectoryOwner("a", "yard").claim(state)
    options = MembershipOptions("no broker", None, None, "yard", "a", state, None, insecure=True)
    with caplog.at_level(logging.WARNING, logger="fedprune.device"):
        start_failure.report_start_failure(options, DataError("no samples"), "toy", None)
    assert "no broker" in caplog.text
