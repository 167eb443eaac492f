"""kill -9 of device, server and broker in the middle of rounds: the run goes on by itself, to the very same model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.coordination import Phase, State
from fedprune.coordination.state import Progress
from fedprune.errors import ExitCode, StorageError
from fedprune_server.storage import Storage
from machine import find_mosquitto

pytestmark = pytest.mark.system

ROUNDS = 3
DEVICES = ("north", "south")
PATIENCE_S = 40
CONFIG = """
[job]
name = "crashes"
rounds = 3
devices = 2
density = 0.5
deadline_s = 300

[job.recipe]
epochs = 4000  # a round must last long enough to be hit in its middle on a machine that stalls for a second
lr = 0.001

[model]
path = "model.onnx"

[evaluation]
data = "evaluation.npz"
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier and every device's samples."""
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
    for name in (*DEVICES, "evaluation"):
        x = random.standard_normal((200, 8)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=(x @ truth).argmax(1))
    (folder / "fleet.toml").write_text(CONFIG)
    return folder


class Site:
    """Real processes: a server, its devices and a broker."""

    def __init__(self, material: Path, folder: Path, *, mosquitto: bool) -> None:
        self.material = material
        self.folder = folder
        self.port = free_port()
        self.mosquitto = mosquitto
        self.state = folder / "server"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        if mosquitto:
            (folder / "mosquitto.conf").write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")

    def start(self, name: str, *, in_group: bool = False) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name), stdout=log, stderr=log, env=environment, start_new_session=in_group
            )

    def command(self, name: str) -> list[str]:
        url = f"mqtt://127.0.0.1:{self.port}"
        if name == "broker":
            return [find_mosquitto(), "-c", str(self.folder / "mosquitto.conf")]
        if name == "server":
            where = ["--broker", url] if self.mosquitto else ["--port", str(self.port)]
            run = ["run", "--config", str(self.material / "fleet.toml"), "--state", str(self.state)]
            return [sys.executable, "-m", "fedprune_server.cli", *run, *where, "--until-finished"]
        return [
            *(sys.executable, "-m", "fedprune_device.cli", "run", "--broker", url, "--device", name, "--no-probe"),
            *("--data", str(self.material / f"{name}.npz"), "--state", str(self.folder / name), "--threads", "1"),
            *("--profile", "raspberry-pi-4b", "--until-finished", "--patient"),
        ]

    def start_all(self) -> None:
        if self.mosquitto:
            self.start("broker")
        self.start("server")
        wait_for(lambda: listens(self.port), "the broker listens", self)
        for name in DEVICES:
            self.start(name)

    def stop_all(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def saved(self) -> State | None:
        """What the server has saved."""
        try:
            with Storage.existing(self.state) as storage:
                return storage.load()
        except StorageError:
            return None  # not yet

    def wait_until_training(self, number: int) -> None:
        """Wait for the middle of a round: a device has its offer and nobody has delivered."""

        def middle() -> bool:
            state = self.saved()
            if state is not None and (state.round > number or state.phase is Phase.FINISHED):
                raise AssertionError(f"round {number} is over already: {self.logs()}")
            return (
                state is not None
                and (state.round, state.phase) == (number, Phase.TRAINING)
                and all(t.progress is Progress.OFFERED for t in state.tasks.values())
            )

        wait_for(middle, f"the middle of round {number}", self)
        time.sleep(0.2)

    def kill(self, name: str) -> None:
        """kill -9; of an embedded broker, only of it."""
        if name == "broker" and not self.mosquitto:
            server = self.processes["server"].pid
            children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
            assert len(children) == 1
            os.kill(int(children[0]), signal.SIGKILL)
            return
        self.processes[name].kill()
        self.processes[name].wait()
        self.start(name)

    def finish(self) -> State:
        """Wait for the end of all processes but Mosquitto."""
        for name in ("server", *DEVICES):
            try:
                code = self.processes[name].wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} doesn't end: {self.logs()}") from None
            assert code == 0, self.logs()
        state = self.saved()
        assert state is not None
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


def wait_for(condition: object, what: str, site: Site | None = None) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        if time.monotonic() > until:
            raise AssertionError(f"{what}: it never came to that. {site.logs() if site else ''}")
        time.sleep(0.05)


@pytest.fixture
def site(request: pytest.FixtureRequest, material: Path, tmp_path: Path) -> Iterator[Site]:
    made = Site(material, tmp_path, mosquitto=request.param == "mosquitto")
    try:
        yield made
    finally:
        made.stop_all()


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> State:
    calm = Site(material, tmp_path_factory.mktemp("calm"), mosquitto=False)
    try:
        calm.start_all()
        return calm.finish()
    finally:
        calm.stop_all()


def test_an_undisturbed_run_counts_every_device_in_every_round(undisturbed: State) -> None:
    progress = [[d["progress"] for d in r["devices"].values()] for r in undisturbed.history]
    assert progress == [["folded"] * len(DEVICES)] * ROUNDS


@pytest.mark.parametrize("site", ["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)], indirect=True)
def test_kills_in_the_middle_of_rounds_change_not_a_bit(site: Site, undisturbed: State) -> None:
    site.start_all()
    for number, victim in enumerate((DEVICES[0], "server", "broker"), start=1):
        site.wait_until_training(number)
        site.kill(victim)
    state = site.finish()
    assert [r["model"] for r in state.history] == [r["model"] for r in undisturbed.history]


@pytest.mark.parametrize("group", [False, True], ids=["server", "group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, ExitCode.OK), (signal.SIGINT, ExitCode.INTERRUPTED)])
def test_a_signal_ends_a_server_cleanly(
    material: Path, tmp_path: Path, number: signal.Signals, code: ExitCode, group: bool
) -> None:
    site = Site(material, tmp_path, mosquitto=False)
    try:
        site.start("server", in_group=True)
        wait_for(lambda: listens(site.port), "the broker listens", site)
        wait_for(lambda: "connected to the broker" in site.logs(), "the server is connected", site)
        server = site.processes["server"]
        if group:  # as a service manager and a terminal do
            os.killpg(server.pid, number)
        else:
            server.send_signal(number)
        assert server.wait(15) == code
        assert "connection was lost" not in site.logs()
        assert "took in 0 " not in site.logs()
        assert not listens(site.port)
    finally:
        site.stop_all()
