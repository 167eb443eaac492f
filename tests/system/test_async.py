"""Asynchronous jobs of real processes: in whatever order boards deliver, the log gives the same models again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.blobs import BlobStore
from fedprune.coordination import Phase, State
from fedprune.errors import StorageError
from fedprune_server.replay import Step, replay
from fedprune_server.state_folder import BLOBS
from fedprune_server.storage import FILE, Storage

pytestmark = pytest.mark.system

SAMPLES = {"quick": 60, "steady": 200, "slow": 1500}
PATIENCE_S = 90

JOBS = {
    "plain": 'strategy = "plain"\nrounds = 3\ndensity = 0.5',
    "fedasync": 'strategy = "fedasync"\nrounds = 12',
    "fedbuff": 'strategy = "fedbuff"\nrounds = 12\noptions = {buffer = 2}',
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

[model]
path = "model.onnx"

[evaluation]
data = "evaluation.npz"

[server]
archive = true
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier, and samples: the slow board has many."""
    folder = tmp_path_factory.mktemp("material")
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = random.standard_normal(shape) / np.sqrt(shape[-1])
        return numpy_helper.from_array(values.astype(np.float32), name)

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["a"]),
            helper.make_node("Gemm", ["a", "w2", "b2"], ["logits"], transB=1),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [weight("w1", 32, 8), weight("b1", 32), weight("w2", 3, 32), weight("b2", 3)],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    truth = random.standard_normal((8, 3))
    for name, count in {**SAMPLES, "evaluation": 200}.items():
        x = random.standard_normal((count, 8)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=(x @ truth).argmax(1))
    return folder


class Site:
    """A server with its own broker, and three boards, each a process."""

    def __init__(self, material: Path, folder: Path, job: str) -> None:
        self.material = material
        self.folder = folder
        self.state = folder / "server"
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        text = CONFIG.format(job=JOBS[job])
        for name in ("model.onnx", "evaluation.npz"):
            text = text.replace(f'"{name}"', json.dumps(str(material / name)))
        (folder / "fleet.toml").write_text(text)

    def start(self, name: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(self.command(name), stdout=log, stderr=log, env=environment)

    def command(self, name: str) -> list[str]:
        if name == "server":
            run = ["run", "--config", str(self.folder / "fleet.toml"), "--state", str(self.state)]
            return [sys.executable, "-m", "fedprune_server.cli", *run, "--port", str(self.port), "--until-finished"]
        url = f"mqtt://127.0.0.1:{self.port}"
        return [
            *(sys.executable, "-m", "fedprune_device.cli", "run", "--broker", url, "--device", name, "--no-probe"),
            *("--data", str(self.material / f"{name}.npz"), "--state", str(self.folder / name), "--threads", "1"),
            *("--profile", "raspberry-pi-4b", "--until-finished", "--patient"),
        ]

    def start_all(self) -> None:
        self.start("server")
        wait_for(lambda: listens(self.port), "the broker listens", self)
        for name in SAMPLES:
            self.start(name)

    def stop_all(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()
        self.start(name)

    def saved(self) -> State | None:
        try:
            with Storage.existing(self.state) as storage:
                return storage.load()
        except StorageError:
            return None  # not yet

    def wait_for_round(self, number: int) -> None:
        def there() -> bool:
            state = self.saved()
            return state is not None and state.round >= number

        wait_for(there, f"round {number}", self)

    def finish(self) -> State:
        for name in ("server", *SAMPLES):
            try:
                code = self.processes[name].wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} doesn't end: {self.logs()}") from None
            assert code == 0, self.logs()
        state = self.saved()
        assert state is not None
        assert state.phase is Phase.FINISHED
        return state

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], what: str, site: Site) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"{what}: it never came to that. {site.logs()}")
        time.sleep(0.05)


@pytest.fixture
def site(request: pytest.FixtureRequest, material: Path, tmp_path: Path) -> Iterator[Site]:
    made = Site(material, tmp_path, request.param)
    try:
        yield made
    finally:
        made.stop_all()


def models(state: State) -> list[tuple[int, str]]:
    return [(h["round"], h["model"]) for h in state.history]


def again(site: Site) -> list[Step]:
    return list(replay(site.state))


@pytest.mark.parametrize("site", ["plain", "fedasync", "pr-fl"], indirect=True)
def test_the_log_gives_the_same_models_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.start_all()
    state = site.finish()
    scratch = site.folder / "scratch"
    monkeypatch.setattr("fedprune_server.replay.TemporaryDirectory", lambda **_: nullcontext(str(scratch)))
    found = again(site)
    assert [BlobStore(scratch).has(s.model) for s in (found[0], found[-1])] == [False, True]  # past rounds' are deleted
    assert [(s.round, s.model) for s in found] == models(state)
    assert {n for s in found for n in s.devices} == set(SAMPLES)


@pytest.mark.parametrize("site", ["fedbuff"], indirect=True)
def test_kills_are_survived_and_the_log_still_gives_the_same_models(site: Site) -> None:
    site.start_all()
    for number, victim in ((2, "slow"), (3, "server"), (5, "quick")):
        site.wait_for_round(number)
        site.kill(victim)
    state = site.finish()
    assert [r for r, _ in models(state)] == list(range(1, 13))
    assert [(s.round, s.model) for s in again(site)] == models(state)
    out = subprocess.run(
        [sys.executable, "-m", "fedprune_server.cli", "replay", "--state", str(site.state)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.endswith("12 rounds, every model the same to the bit\n")

    # A log that says something else is found out, and so is a folder from which an update has gone.
    forged = site.folder / "forged"
    shutil.copytree(site.state, forged)
    change_a_model(forged / FILE)
    with pytest.raises(StorageError, match=r"Closed of round 4\): model"):
        list(replay(forged))
    BlobStore(site.state / BLOBS).delete(first_update(site))
    with pytest.raises(StorageError):
        again(site)


def change_a_model(path: Path) -> None:
    with sqlite3.connect(path) as database:
        for number, body in database.execute("select number, body from events where type = 'Closed'").fetchall():
            event: dict[str, Any] = json.loads(body)
            if event["round"] == 4:
                event["model"] = "0" * 64
                database.execute("update events set body = ? where number = ?", (json.dumps(event), number))


def first_update(site: Site) -> str:
    with Storage.existing(site.state) as storage:
        return str(next(body["weights"] for _, _, kind, body in storage.events() if kind == "UpdateStored"))
