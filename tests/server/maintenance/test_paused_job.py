"""A job that was paused is so after a restart, in both databases, and its log says so."""

from pathlib import Path

import pytest

from fedprune.coordination import Phase, make_coordinator
from fedprune.coordination import events as on
from fedprune.output.tables import ignore_progress
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.maintenance.finding import Severity
from fedprune_server.maintenance.state_check import check_state
from support.fakes.opened_job import open_job
from support.fakes.recorded_job import JOB, play_job


def die_after_order(state: Path, database: str | None, *, paused: bool) -> None:
    """A server that is told to pause, or to go on, and is killed once that is on the disk."""
    with StateFolder(state, database) as folder:
        opened = open_job(folder, ServerConfig(job=JOB))
        assert opened.state.paused is not paused, "the start before has read what was ordered then"
        coordinator = make_coordinator(opened.job, opened.model.architecture, opened.state)
        event = on.Paused(paused)
        coordinator.handle(event, 100.0)
        folder.storage.save(coordinator.state, [event], 100.0)


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def test_a_pause_survives_restarts_and_the_log_leads_to_it(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    database = request.getfixturevalue("postgres").database() if kind == "postgresql" else None
    (tmp_path / "calm").mkdir()
    calm = play_job(tmp_path / "calm" / "state")
    state = tmp_path / "state"
    play_job(state, events=9, database=database)
    die_after_order(state, database, paused=True)
    for _ in range(2):  # whatever comes, and whenever it is started again
        paused_state = play_job(state, database=database)
        assert (paused_state.paused, paused_state.phase) == (True, Phase.WAITING)
        assert len(paused_state.history) < JOB.rounds
    die_after_order(state, database, paused=False)
    end = play_job(state, database=database)
    assert (end.paused, end.phase) == (False, Phase.FINISHED)
    assert [r["model"] for r in end.history] == [r["model"] for r in calm.history]
    findings = list(check_state(state, ignore_progress, running=False))
    assert [str(f) for f in findings if f.severity is Severity.WRONG or "log" in f.message] == []
