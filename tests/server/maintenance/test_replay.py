"""Which jobs can be replayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError
from fedprune_server.maintenance.replay import replay
from fedprune_server.storage.storage import Storage
from support.fakes.recorded_job import play_job


@pytest.mark.parametrize(
    ("settings", "why"),
    [({}, "without --archive can't be replayed"), ({"archive": True, "parent": "wss://above:1"}, "are its parent's")],
)
def test_what_is_not_archived_or_decided_elsewhere_is_refused(
    tmp_path: Path, settings: dict[str, object], why: str
) -> None:
    play_job(tmp_path / "state")
    with Storage.existing(tmp_path / "state") as storage:
        known = storage.settings()
    assert known is not None
    with Storage(f"sqlite:///{tmp_path / 'state' / 'server.db'}") as storage:
        storage.put_settings(known | {"server": known["server"] | settings})
    with pytest.raises(ConfigError, match=why):
        next(replay(tmp_path / "state"))
