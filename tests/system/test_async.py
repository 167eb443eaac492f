"""Jobs of real processes that go by who comes when: the log leads to the same state, whatever the order was."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import Phase, State
from fedprune.output.tables import ignore_progress
from fedprune_server.maintenance.state_check import check_state
from fedprune_server.storage.folder_layout import DATABASE_FILE
from support.processes.real_site import Site, write_material

pytestmark = pytest.mark.system

SAMPLES = {"quick": 60, "steady": 200, "slow": 1500}
PATIENCE_S = 90

JOBS = {
    "plain": 'strategy = "plain"\nrounds = 3\ndensity = 0.5',
    "fedasync": 'strategy = "fedasync"\nrounds = 12',
    "fedbuff": 'strategy = "fedbuff"\nrounds = 8\noptions = {buffer = 2}',
    "semi-async": 'strategy = "plain"\nrounds = 5\ndensity = 0.5\nschedule = {kind = "semi-async", window_s = 0.5}',
    "in-step": 'strategy = "plain"\nrounds = 5\ndensity = 0.5\nparticipation = 0.6\n'
    "over_selection = 0.5\nin_flight = 2",
    "pr-fl": 'strategy = "pr-fl"\nrounds = 6\noptions = {window_s = 0.4, interval = 2, floor = 0.3, patience = 1}',
}
CONFIG = """
[job]
name = "asynchronous"
devices = 3
deadline_s = 60
{job}

[job.recipe]
epochs = 20
lr = 0.02
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier, and samples: the slow board has many."""
    return write_material(tmp_path_factory.mktemp("material"), SAMPLES)


@pytest.fixture
def site(request: pytest.FixtureRequest, material: Path, tmp_path: Path) -> Iterator[Site]:
    with Site(
        material, tmp_path, CONFIG.format(job=JOBS[request.param]), tuple(SAMPLES), PATIENCE_S, may_hold=True
    ) as made:
        yield made


def finish(site: Site) -> State:
    state = site.finish()
    assert state.phase is Phase.FINISHED
    return state


def wait_for_round(site: Site, number: int) -> None:
    """Wait for a round that is held: it closes with two updates, and but one may be under way from the one before."""

    def there() -> bool:
        state = site.saved_state()
        return state is not None and state.round >= number

    site.wait_for(there, f"round {number}")
    state = site.saved_state()
    assert state is not None
    assert state.round == number


def contradictions(site: Site) -> list[str]:
    """What `check` says of a log that doesn't lead to the state."""
    return [f.message for f in check_state(site.state, ignore_progress, running=False) if "log" in f.message]


@pytest.mark.parametrize(
    "site",
    ["semi-async", *(pytest.param(job, marks=pytest.mark.soak) for job in ("plain", "fedasync", "in-step", "pr-fl"))],
    indirect=True,
)
@pytest.mark.soak
def test_the_log_leads_to_the_same_state_again(site: Site) -> None:
    site.start_all()
    finish(site)
    assert contradictions(site) == []

    # A log that says something else is found out.
    with sqlite3.connect(site.state / DATABASE_FILE) as database:
        for number, body in database.execute("select number, body from events where type = 'Closed'").fetchall():
            event: dict[str, Any] = json.loads(body)
            if event["round"] == 2:
                event["model"] = "0" * 64
                database.execute("update events set body = ? where number = ?", (json.dumps(event), number))
    assert contradictions(site) != []


# At every push `test_crashes.py` kills processes of a job in rounds, and `test_kill_points.py` at a flush.
@pytest.mark.soak
@pytest.mark.parametrize("site", ["fedbuff"], indirect=True)
def test_kills_are_survived_and_the_log_still_leads_to_the_same_state(site: Site) -> None:
    site.hold(2, 3, 5)
    site.start_all()
    for number, victim in ((2, "slow"), (3, "server"), (5, "quick")):
        wait_for_round(site, number)
        site.kill(victim)
        site.let_go(number)
    assert [h["round"] for h in finish(site).history] == list(range(1, 9))
    assert contradictions(site) == []
