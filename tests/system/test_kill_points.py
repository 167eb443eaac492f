"""Processes that are killed at every flush to the disk: nothing is lost, and nothing counts twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.faults.kill_points import BOARDS, Doomed, check, run, undisturbed
from support.processes.real_site import write_material

pytestmark = [pytest.mark.soak, pytest.mark.system, pytest.mark.mosquitto]

KILLS = 60  # and as many rounds


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler for what kills at a flush")
def test_whoever_is_killed_at_a_flush_loses_no_update_and_counts_none_twice(tmp_path: Path) -> None:
    write_material(tmp_path, dict.fromkeys(BOARDS, 200))
    folders = [tmp_path / "calm", tmp_path / "site"]
    for folder in folders:
        folder.mkdir()
    calm, site = (Doomed(tmp_path, folder, KILLS) for folder in folders)
    try:
        undisturbed(calm)
        done = run(site, KILLS)
        assert done.total >= KILLS
        check(site, calm, 1)
    finally:
        calm.stop_all()
        site.stop_all()
