"""Transfers that wait for no clock."""

import pytest

from fedprune_device.network import http_transfer


@pytest.fixture
def stall_after(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default no transfer stalls: an agent's clock goes fast, and half a second in which this machine stands still
    would be a stall. A test that wants one gives its seconds."""
    monkeypatch.setattr(http_transfer, "STALL_TIMEOUT_S", getattr(request, "param", 1e6))
