"""Real boards that come and go as their server says, also while their broker is killed, and lose no part of a round."""

from pathlib import Path

import pytest

from support.processes.real_site import Site, job_config, write_material

pytestmark = pytest.mark.system

BOARDS = tuple(f"board-{i}" for i in range(6))
RECIPE = {"epochs": 20, "lr": 0.02}
JOB = job_config("turns", rounds=25, devices=1, participation=0.5, deadline_s=8, recipe=RECIPE)
CONFIG = f"{JOB}[server]\nconnected = 4\n"


# At every push `tests/server/devices/test_pace_steering.py` and `tests/server/engine/test_pace.py` send boards away.
@pytest.mark.soak
@pytest.mark.mosquitto
def test_boards_take_turns_and_a_killed_broker_costs_no_part(tmp_path: Path) -> None:
    write_material(tmp_path, dict.fromkeys(BOARDS, 300))
    with Site(tmp_path, tmp_path, CONFIG, BOARDS, 120, mosquitto=True, secure=True) as site:
        site.start_all()

        def left() -> set[str]:
            return {name for name in BOARDS if "come back in" in (site.folder / f"{name}.log").read_text()}

        def reached(number: int) -> bool:
            state = site.saved_state()
            return state is not None and state.round >= number

        site.wait_for(lambda: len(left()) >= 2, "boards are sent away")
        site.kill("broker")
        site.wait_for(lambda: reached(20), "rounds go on")
        state = site.finish_complete()  # every board has come back, and was told that the job is finished
    assert len({n for summary in state.history for n in summary["devices"]}) >= 4
    assert "taken for gone" not in site.logs_in_full()
