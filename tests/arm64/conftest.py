"""What the tests of boards with Arm processors share: wheels for them, fetched as a kit fetches them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedprune_flash import wheelhouse


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.arm64)


@pytest.fixture(autouse=True)
def sbin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mosquitto is, which is not on everybody's path."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture(scope="session")
def own_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fedprune's own wheel, built from this checkout."""
    return wheelhouse.build_wheel(tmp_path_factory.mktemp("wheel"))
