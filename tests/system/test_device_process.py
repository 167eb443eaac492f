"""A real `fedprune-device` process on a real broker: killed, started again, watched for what it imports."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.wire.messages import Birth, Death, RoundProgress, UpdateAnnouncement
from fedprune_device.data.array_source import load_data
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from support.fakes.agent_fleet import MemoryServer
from support.paths import GRAPHS
from support.processes.device_process import Field, loaded_packages, running
from support.waiting import PATIENCE_S

pytestmark = pytest.mark.system


@pytest.fixture
def weights() -> Tensors:
    rng = np.random.default_rng(6)
    return {"w": (0.1 * rng.standard_normal((3, 6))).astype(np.float32), "b": np.zeros(3, np.float32)}


@pytest.fixture
def field(tmp_path: Path, weights: Tensors) -> Iterator[Field]:
    rng = np.random.default_rng(5)
    np.savez(tmp_path / "data.npz", x=rng.standard_normal((90, 6)).astype(np.float32), y=rng.integers(0, 3, 90))
    with running(tmp_path, MemoryServer(tmp_path / "server", GRAPHS, weights, time.monotonic)) as field:
        yield field


def test_a_process_killed_while_training_goes_on_to_the_same_bits(field: Field, weights: Tensors) -> None:
    server, holds = field.server, field.root / "holds"
    server.plan = [server.offer(1)]
    holds.mkdir()
    (holds / "7-1").touch()
    process = field.start(holds=holds)
    field.wait((holds / "7-1-d").exists, "training")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not server.of(UpdateAnnouncement)
    assert field.start().wait(PATIENCE_S) == 0, (field.root / "log").read_text()[-3000:]
    data = load_data(str(field.root / "data.npz"), 0, "d")
    wanted = Trainer(GRAPHS / "plain.onnx").train(
        weights, data, TrainingTask(Recipe.from_dict(server.plan[0].recipe), seed=7, device="d", round=1, classes=3)
    )
    assert server.blobs.read(server.updates[1].weights.sha256) == tensorfile.encode(wanted.tensors)
    assert server.of(Birth)[-1].session > server.of(Birth)[0].session
    assert Death("d", server.of(Birth)[0].session) in server.seen  # the broker's last word for the killed process


def test_a_process_killed_before_its_update_was_accepted_hands_it_in_without_training(field: Field) -> None:
    server = field.server
    server.plan, server.accepts = [server.offer(1)], False
    process = field.start()
    field.wait_for(UpdateAnnouncement)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = server.of(UpdateAnnouncement)[0]
    server.seen.clear()
    server.accepts = True
    assert field.start().wait(PATIENCE_S) == 0
    assert server.updates[1] == first
    assert not [p for p in server.of(RoundProgress) if p.phase == "train"]


def test_a_process_that_is_told_to_stop_ends_well(field: Field) -> None:
    process = field.start()
    field.wait_for(Birth)
    process.terminate()
    assert process.wait(PATIENCE_S) == 0
    field.wait_for(Death)


def test_a_training_device_imports_neither_torch_nor_onnx_nor_scipy(field: Field) -> None:
    field.server.plan = [field.server.offer(1)]
    assert field.start("-X", "importtime").wait(PATIENCE_S) == 0
    loaded = loaded_packages(field)
    assert {"onnxruntime", "numpy", "fedprune_device"} <= loaded
    assert not loaded & {"torch", "onnx", "onnxscript", "scipy", "rich", "sqlalchemy", "amqtt", "fedprune_export"}


def test_a_board_that_has_taken_part_says_why_it_cannot_start(field: Field) -> None:
    (field.root / "data.npz").rename(field.root / "samples.npz")
    (field.root / "data.npz").write_bytes(b"no archive")
    assert field.start().wait(PATIENCE_S) == ExitCode.DATA, "whoever starts a board for the first time sees the error"
    assert not field.server.of(Birth)
    (field.root / "samples.npz").replace(field.root / "data.npz")
    process = field.start()
    field.wait_for(Birth, trouble=None)
    process.terminate()
    process.wait(PATIENCE_S)
    (field.root / "data.npz").write_bytes(b"no archive")
    assert field.start().wait(PATIENCE_S) == ExitCode.DATA
    field.wait(lambda: field.server.of(Birth)[-1].trouble, "reason")
    first, last = field.server.of(Birth)[0], field.server.of(Birth)[-1]
    assert last.session > first.session
    assert "/" not in (last.trouble or ""), "no paths"
