"""Processes that are killed at every flush to the disk: nothing is lost, and nothing counts twice."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.faults.kill_neighbours import DoomedNeighbours, strike
from support.faults.kill_points import BOARDS, Doomed, check, run, run_without_kills
from support.processes.postgres import Postgres
from support.processes.real_site import write_material

pytestmark = [pytest.mark.soak, pytest.mark.system, pytest.mark.mosquitto]

ROUNDS = 12


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler for what kills at a flush")
@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.soak)])
def test_whoever_is_killed_at_a_flush_loses_no_update_and_counts_none_twice(tmp_path: Path, kills: int) -> None:
    write_material(tmp_path, dict.fromkeys(BOARDS, 200))
    folders = [tmp_path / "calm", tmp_path / "site"]
    for folder in folders:
        folder.mkdir()
    rounds = ROUNDS if kills < 20 else kills
    calm, site = (Doomed(tmp_path, folder, rounds) for folder in folders)
    try:
        run_without_kills(calm)
        assert run(site, kills).total >= kills
        check(site, calm, 1)
    finally:
        calm.stop_all()
        site.stop_all()


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler for what kills at a flush")
@pytest.mark.parametrize("neighbour", [pytest.param("database", marks=pytest.mark.postgresql), "helpers"])
def test_a_job_survives_kills_of_its_database_and_of_its_helpers(tmp_path: Path, neighbour: str) -> None:
    write_material(tmp_path, dict.fromkeys(BOARDS, 200))
    for name in ("calm", "site"):
        (tmp_path / name).mkdir()
    with ExitStack() as stack:
        database = None
        if neighbour == "database":
            database = Postgres()
            stack.callback(database.close)
            database.start()
        url = None if database is None else database.database()
        calm = DoomedNeighbours(tmp_path, tmp_path / "calm", 150)
        site = DoomedNeighbours(tmp_path, tmp_path / "site", 150, url, workers=1 if database else 2)
        stack.callback(calm.stop_all)
        stack.callback(site.stop_all)
        run_without_kills(calm, strike(site, 10, seed=0, database=database).rounds + 1)
        check(site, calm, 1)
