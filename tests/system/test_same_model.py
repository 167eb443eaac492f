"""The simulator and real processes over a real broker give the same global model, bit for bit."""

from dataclasses import replace

import pytest

from fedprune.blobs import BlobStore
from fedprune_export.importing import import_onnx
from fedprune_server.demo_fleet import BOARDS, fleet_job
from fedprune_server.demo_run import DemoFolder, run_job
from fedprune_server.digits import deal, digits_model
from fedprune_server.simulation import Simulation
from fedprune_server.virtual_device import VirtualDevice

pytestmark = pytest.mark.system

SEED = 11


@pytest.mark.parametrize("scorer", ["magnitude", "curvature"])
def test_daemon_with_device_processes_and_simulator_give_the_same_models(tmp_path, scorer):
    job = fleet_job(SEED, rounds=2)
    job = replace(job, scorer=scorer, warmup_rounds=1, recipe=replace(job.recipe, epochs=1))
    record = run_job("real", job, DemoFolder.prepare(tmp_path / "demo", SEED))

    data = deal([b.name for b in BOARDS], seed=SEED)
    devices = [VirtualDevice(b.name, b.profile(), data.devices[b.name]) for b in BOARDS]
    simulation = Simulation(
        job,
        import_onnx(digits_model(), "model"),
        devices,
        (data.x, data.y),
        BlobStore(tmp_path / "blobs", durable=False),
        calibration=data.calibration,
    )
    simulation.run()

    virtual = simulation.record("virtual")
    assert [r.model for r in record.rounds] == [r.model for r in virtual.rounds]
    assert [r.local for r in record.rounds] == [r.local for r in virtual.rounds]
    assert record.devices == virtual.devices
    assert record.channels == virtual.channels
