"""The benchmark `benchmarks/flower`: its meter counts every byte once, and both sides are told the same job."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from benchmarks.flower.material import Job, write_fleet, write_material
from benchmarks.flower.meter import meter
from fedprune_device.data.array_source import load_data
from support.fakes.opened_job import read_config

pytestmark = pytest.mark.system


def test_the_meter_passes_on_and_counts_both_ways() -> None:
    said, answer = b"u" * 700_001, b"d" * 300_003
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                got = bytearray()
                while len(got) < len(said):
                    got += connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with meter(server.getsockname()[1]) as counted:
            with socket.create_connection(("127.0.0.1", counted.port)) as client:
                client.sendall(said)
                heard = bytearray()
                while more := client.recv(1 << 16):
                    heard += more
            thread.join()
        assert heard == answer
        assert (counted.up, counted.down, counted.connections) == (len(said), len(answer), 1)


def test_both_sides_are_told_the_same_job(tmp_path: Path) -> None:
    job = Job(3, rounds=2, epochs=1)
    write_material(tmp_path / "job", job)
    ours = read_config(write_fleet(tmp_path / "job", job, 1883)).job
    theirs = json.loads((tmp_path / "job" / "setting.json").read_text())
    assert (ours.recipe, ours.rounds, ours.devices) == (job.recipe, 2, 3)
    assert (theirs["recipe"], theirs["seed"]) == (ours.recipe.to_dict(), ours.seed)
    assert all(load_data(str(tmp_path / "job" / f"{n}.npz")).samples for n in job.names)
