"""Secure aggregation with real processes: the model is the simulator's, of a fleet whose updates nobody sees."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune_export.importing import import_onnx
from fedprune_server.cli.demo import DemoFolder, run_job
from fedprune_server.simulation.digits import deal_digits, digits_model, write_device_data
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.demo_fleet import DEMO_BOARDS, demo_job
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation
from support.processes.real_site import Site, write_material

pytestmark = pytest.mark.system

SEED = 11
NAMES = ("a", "b", "c", "d", "e")

CONFIG = """
[job]
rounds = 3
devices = 4
deadline_s = 20
density = 1.0
strategy = "fedavg"
compression = "int8"
secure_aggregation = true
"""


def test_boards_that_mask_give_the_model_of_a_simulation_that_does_not(tmp_path: Path) -> None:
    job = replace(demo_job(SEED, rounds=2), strategy="plain", options={}, density=1.0, ignores_plans=True, move_limit=0)
    data = deal_digits([board.name for board in DEMO_BOARDS], seed=SEED)
    folder = DemoFolder.prepare(tmp_path / "demo", SEED)
    folder.model.write_bytes(digits_model())
    np.savez(folder.evaluation, x=data.x, y=data.y)
    np.savez(folder.calibration, x=data.calibration)
    for board in DEMO_BOARDS:
        write_device_data(folder.data(board.name), data.devices[board.name])
    record = run_job("real", replace(job, secure_aggregation=True), folder)

    devices = [VirtualDevice(b.name, b.profile(), data.devices[b.name]) for b in DEMO_BOARDS]
    model = import_onnx(digits_model(), "model")
    plain = Experiment("plain", replace(job, most_samples=1), model, devices, (data.x, data.y), data.calibration)
    simulation = Simulation(plain, BlobStore(tmp_path / "blobs", durable=False))
    simulation.run()
    assert [r.model for r in record.rounds] == [r.model for r in simulation.record().rounds]


@pytest.mark.soak
def test_a_fleet_with_identities_goes_on_whoever_is_killed(tmp_path: Path) -> None:
    write_material(tmp_path, dict.fromkeys(NAMES, 100))
    with Site(tmp_path, tmp_path, CONFIG, NAMES, 120, mosquitto=True, secure=True, may_hold=True) as site:
        site.hold(2)
        site.start_all()
        site.wait_until_held(2)
        site.kill("server")
        site.kill("c")
        site.let_go(2)
        state = site.finish()
    assert len(state.history) == 3
    for summary in state.history:
        assert len([name for name, part in summary["devices"].items() if part["progress"] == "folded"]) >= 4
    assert state.history[0]["metrics"]["loss"] > state.history[-1]["metrics"]["loss"]
