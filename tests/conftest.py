"""Rules for all tests: what is skipped where, and how loudly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("FEDPRUNE_DATA"):
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason="FEDPRUNE_DATA is not set: no real data here"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missing = [r.nodeid for r in terminalreporter.stats.get("skipped", []) if "FEDPRUNE_DATA" in str(r.longrepr)]
    if missing:
        terminalreporter.section("tests that need real data did not run")
        terminalreporter.line(f"{len(missing)} tests need FEDPRUNE_DATA:")
        for name in missing:
            terminalreporter.line(f"  {name}")


@pytest.fixture
def data_dir() -> Path:
    """Where the real data sets lie; only for tests marked `data`."""
    return Path(os.environ["FEDPRUNE_DATA"])
