"""A broker that dies and comes back, reported by log, metrics, console, webhook and doctor."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes.real_site import write_material
from support.processes.watched_site import Hook, Watched, doctor, shown

pytestmark = pytest.mark.system

DEADLINE_S = 14.0
CONFIG = f"""
[job]
name = "leaves"
rounds = 100000
devices = 2
density = 0.5
deadline_s = {DEADLINE_S}
"""


def rounds(site: Watched) -> int:
    """The round that the server has saved."""
    return 0 if (saved := site.saved()) is None else saved.round


@pytest.mark.mosquitto
def test_a_broker_that_dies_is_told_everywhere_and_so_is_its_return(tmp_path: Path) -> None:
    write_material(tmp_path, {"north": 60})
    config = CONFIG.replace("devices = 2", "devices = 1")
    with Watched(tmp_path, tmp_path, config, ("north",), 90, mosquitto=True) as site:
        site.start_all()
        site.wait_for(lambda: rounds(site) > 1, "a round goes by")
        ann = site.operator()
        site.stop("broker")
        what = "there is no connection to the broker"
        site.wait_for(lambda: f"alert: {what}. To do: see" in site.log(), "the log reports it")
        site.wait_for(
            lambda: what in shown(ann).get("broker", "") and Hook.posted("opened", "broker") == [what],
            "console and webhook, too",
        )
        assert site.counted("broker") == 1
        assert doctor(site.state)[1]["broker"]["todo"]
        site.start("broker")
        site.wait_for(lambda: f"the alert is over: {what}" in site.log(), "it is over")
        site.wait_for(
            lambda: "broker" not in shown(ann) and Hook.posted("resolved", "broker") == [what],
            "console and webhook report the end",
        )
