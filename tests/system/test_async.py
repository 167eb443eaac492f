"""Jobs of real processes that go by who comes when: the log leads to the same state, whatever the order was."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import Phase
from fedprune.output.tables import silent
from fedprune_server.maintenance.state_check import check
from fedprune_server.storage.storage import FILE
from support.processes.real_site import Site, write_material

pytestmark = pytest.mark.system

SAMPLES = {"quick": 60, "steady": 200, "slow": 1500}
PATIENCE_S = 90

JOBS = {
    "fedbuff": 'strategy = "fedbuff"\nrounds = 8\noptions = {buffer = 2}',
    "semi-async": 'strategy = "plain"\nrounds = 5\ndensity = 0.5\nschedule = {kind = "semi-async", window_s = 0.5}',
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
    folder = tmp_path_factory.mktemp("material")
    write_material(folder, SAMPLES)
    return folder


@pytest.fixture
def site(request: pytest.FixtureRequest, material: Path, tmp_path: Path) -> Iterator[Site]:
    with Site(
        material, tmp_path, CONFIG.format(job=JOBS[request.param]), tuple(SAMPLES), PATIENCE_S, may_hold=True
    ) as made:
        yield made


def contradictions(site: Site) -> list[str]:
    """What `check` says of a log that doesn't lead to the state."""
    return [f.what for f in check(site.state, silent, running=False) if "log" in f.what]


@pytest.mark.parametrize("site", JOBS, indirect=True)
@pytest.mark.soak
def test_the_log_leads_to_the_same_state_again(site: Site) -> None:
    site.start_all()
    assert site.finish().phase is Phase.FINISHED
    assert contradictions(site) == []

    # A log that says something else is found out.
    change_a_model(site.state / FILE)
    assert contradictions(site) != []


def change_a_model(path: Path) -> None:
    with sqlite3.connect(path) as database:
        for number, body in database.execute("select number, body from events where type = 'Closed'").fetchall():
            event: dict[str, Any] = json.loads(body)
            if event["round"] == 2:
                event["model"] = "0" * 64
                database.execute("update events set body = ? where number = ?", (json.dumps(event), number))
