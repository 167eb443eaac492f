"""Boards that are fed by a sensor's topic, a pipe and a recording, as processes on a real broker."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.wire.link import Link
from fedprune.wire.messages import Refusal, Update
from fedprune_export.cli.main import main as export
from support.fakes.agent_fleet import MemoryServer
from support.paths import GRAPHS
from support.processes.device_process import Field, running
from support.processes.machine import find_mosquitto, free_port, listens

pytestmark = [pytest.mark.soak, pytest.mark.system]

RECIPE = Recipe(epochs=2, batch_size=8)


def await_model(field: Field) -> None:
    """Until the board knows what the model of the first offer takes, for which it has no samples yet."""
    field.wait_for(Refusal)
    field.wait(lambda: field.board.status()["input"], "input")


def train(field: Field, samples: int, recipe: Recipe = RECIPE, **other: object) -> Update:
    field.server.plan = [field.server.offer(2, recipe, **other)]  # type: ignore[arg-type]
    field.wait(lambda: 2 in field.server.updates, "update")
    update = field.server.updates[2]
    assert update.samples == samples
    return update


@pytest.mark.mosquitto
def test_a_board_learns_what_a_sensors_topic_brings(tmp_path: Path) -> None:
    weights = {"w": np.zeros((3, 6), np.float32), "b": np.zeros(3, np.float32)}
    server = MemoryServer(tmp_path / "server", GRAPHS, weights, time.monotonic)
    port = free_port()
    (tmp_path / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    rng = np.random.default_rng(0)
    with running(tmp_path, server) as field:
        field.run(find_mosquitto(), "-c", str(tmp_path / "mosquitto.conf"))
        field.wait(lambda: listens(port), "broker of the sensor")
        server.plan = [server.offer(1)]
        field.start(local=True)
        await_model(field)
        url = f"mqtt://127.0.0.1:{port}/hall/motor"
        source = field.collect(url, "--channels", "1", "--every", "0.001", "--label-topic", "hall/state")
        with Link(f"mqtt://127.0.0.1:{port}", "sensor") as link:
            link.start()

            def send() -> bool:
                for _ in range(2):  # half a window each
                    link.publish("hall/motor", json.dumps(rng.standard_normal(3).tolist()).encode())
                link.publish("hall/motor", b"[1, ")
                link.publish("hall/motor", json.dumps({"x": [0.5] * 6, "label": int(rng.integers(3))}).encode())
                link.publish("hall/state", b"1")
                time.sleep(0.05)
                return bool(field.board.samples()["parts"]["train"] >= 3)

            field.wait(send, "samples of the sensor")
        source.terminate()
        said, _ = source.communicate(timeout=20)
        assert source.returncode == 0
        assert "kept" in said
        assert "malformed messages" in said
        update = train(field, field.board.samples()["parts"]["train"])
        assert np.abs(tensorfile.decode(server.blobs.read(update.weights.sha256))["w"]).max() > 0
    log = (tmp_path / "log").read_text()
    assert log.count("malformed messages: a message isn't JSON") == 1
    assert "Traceback" not in log


def recording(count: int) -> bytes:
    """Frames that are red or blue in turn, one after the other."""
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    for n in range(count):
        image.new("RGB", (32, 24), (200, n, 20) if n % 2 else (20, n, 200)).save(file, "JPEG", quality=95)
    return file.getvalue()


def exported(tmp_path: Path, net: str, classes: int, *words: str) -> tuple[MemoryServer, dict[str, object]]:
    """A server of a net, and what its offers have of their own."""
    made, graphs = tmp_path / "bundle", tmp_path / "graphs"
    command = [f"support.nets.file_nets:{net}", "--target", "raspberry-pi-5", "--out", str(made), *words]
    assert export(command) == 0
    graphs.mkdir()
    for name, source in (("plain", "training"), ("full", "training"), ("inference", "inference")):
        shutil.copy(made / f"{source}.onnx", graphs / f"{name}.onnx")
    server = MemoryServer(tmp_path / "server", graphs, tensorfile.load(made / "weights.safetensors"), time.monotonic)
    server.ends = False
    return server, {
        "classes": classes,
        "widths": tuple(json.loads((made / "submodel.json").read_text())["widths"]),
    }


@pytest.mark.torch
@pytest.mark.parametrize("piped", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_board_learns_frames_of_a_recording_that_are_labelled_later(piped: bool, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    server, model = exported(tmp_path, "watcher", 2)
    (tmp_path / "clip.mjpeg").write_bytes(recording(90))
    with running(tmp_path, server) as field:
        server.plan = [server.offer(1, RECIPE, **model)]  # type: ignore[arg-type]
        field.start(local=True)
        await_model(field)
        if piped:
            source = field.collect("-", "--every", "0.001", stdin=subprocess.PIPE)
            pipe = cast("io.TextIOWrapper", source.stdin).buffer

            def kept() -> bool:
                pipe.write(recording(90))  # of which a busy machine passes many over
                pipe.flush()
                return len(field.board.unlabelled()) >= 10

            field.wait(kept, "frames")
            said, _ = source.communicate(timeout=60)
            assert "kept" in said
        else:
            source = field.collect(str(tmp_path / "clip.mjpeg"), "--every", "0.1")
            said, _ = source.communicate(timeout=60)
            assert said == "30 kept, 0 known, 0 not kept, 0 left out\n"
        assert source.returncode == 0
        waiting = field.board.unlabelled()
        assert len(waiting) >= 10
        for name in waiting:
            seen = image.open(io.BytesIO(field.board.sample(name, "image/png")))
            assert seen.size == (12, 16)
            field.board.label(name, int(seen.getpixel((4, 4))[0] > 100))
        counts = field.board.samples()
        assert len(counts["classes"]) == 2, counts
        assert counts["unlabelled"] == 0
        train(field, field.board.samples()["parts"]["train"], **model)
        field.wait(field.board.healthy, "model")
        assert field.board.predict(recording(1)).round == 2


@pytest.mark.torch
def test_an_autoencoder_learns_frames_as_they_are(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=8, loss="mse")
    server, model = exported(tmp_path, "autoencoder", 3, "--labels", "values")
    (tmp_path / "clip.mjpeg").write_bytes(recording(30))
    with running(tmp_path, server) as field:
        server.plan = [server.offer(1, recipe, **model)]  # type: ignore[arg-type]
        field.start(local=True)
        await_model(field)
        source = field.collect(str(tmp_path / "clip.mjpeg"), "--rate", "1")
        said, _ = source.communicate(timeout=60)
        assert said == "30 kept, 0 known, 0 not kept, 0 left out\n"
        counts = field.board.samples()
        assert counts["unlabelled"] == 30 == sum(counts["parts"].values())
        update = train(field, counts["parts"]["train"], recipe, **model)
        assert update.metrics["loss_last"] < update.metrics["loss_first"]
