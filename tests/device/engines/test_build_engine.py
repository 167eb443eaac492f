import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune.model.recipe import Recipe
from fedprune_device.api.live_model import LiveModel
from fedprune_device.cli import main
from fedprune_device.data.dataset import LocalData
from fedprune_device.serving.predictor import Predictor
from fedprune_device.serving.reduced_precision import ReducedPrecision
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.round_runner import RoundRunner
from support.fakes.engine_board import EngineBoard
from support.fakes.hidden_board import DEVICE, HIDDEN, HiddenBoard, hidden_weights
from support.fakes.local_board import LocalBoard
from support.waiting import until

pytestmark = pytest.mark.board

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def state(tmp_path: Path, graphs: Path) -> Path:
    LocalBoard(tmp_path, graphs).install(1)
    return tmp_path / "state"


def test_the_engine_of_what_serves_is_built_and_reported(board: EngineBoard, state: Path, capsys: Capture) -> None:
    assert main.main(["build-engine", "--state", str(state)]) == ExitCode.OK
    output = capsys.readouterr().out
    for words in ("sm 8.7", "TensorRT 10.16.1: types of the graph", "made: build in", "check: deviation 0 from", " ms"):
        assert words in output
    assert (state / "engines" / "engine.plan").is_file()


def test_an_engine_that_cant_be_built_is_one_line_and_an_exit_code(
    board: EngineBoard, state: Path, capsys: Capture
) -> None:
    board.set(out_of_memory=True)
    assert main.main(["build-engine", "--state", str(state)]) == ExitCode.ENGINE
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--state", "nothing"], ExitCode.MODEL),
        (["--bundle", "nothing", "--out", "engines"], ExitCode.BUNDLE),
        (["--state", "nothing", "--plan", "nothing.json"], ExitCode.STORAGE),
    ],
)
def test_what_is_given_is_looked_at_before_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: ExitCode
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["build-engine", *words]) == code


def test_a_builder_ends_with_a_process_that_is_killed(board: EngineBoard, state: Path) -> None:
    board.set(sleep=600)
    command = [sys.executable, "-m", "fedprune_device.cli.main", "build-engine", "--state", state]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as agent:
        try:
            until(lambda: bool(board.builds))
            (builder,) = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        finally:
            agent.kill()
    try:
        until(lambda: _ended(builder))
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(builder), signal.SIGKILL)
    # The next one finds all that it needs, and nobody beside it.
    board.set()
    assert main.main(["build-engine", "--state", str(state)]) == ExitCode.OK


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_beside_a_lowered_model_engines_are_held_to_float32(
    board: EngineBoard, tmp_path: Path, graphs: Path, data: LocalData, capsys: Capture, precision: str
) -> None:
    state = _lower_precision(tmp_path / "state", graphs, data, precision)
    assert main.main(["build-engine", "--state", str(state), "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["deviation"] == 0
    with LiveModel(state / "serving", selector=board.selector()) as model:
        folder = model._slots.folder(model.serving_model().record)
        _look(model, f"TensorRT {board.version}, float32")
        logits = model.serving_model().predictor.predict(data.x_test)
    np.testing.assert_allclose(logits, Predictor(folder).predict(data.x_test), rtol=1e-6)


def _lower_precision(root: Path, graphs: Path, data: LocalData, precision: str) -> Path:
    """The state folder of a board that has done a round, and serves at lower precision."""
    hidden = HiddenBoard(root, graphs, data)
    with DeviceStore(root) as store:
        kit = store.blobs.put((graphs / f"hidden_half_{precision}.safetensors").read_bytes())
    weights = hidden_weights(HIDDEN // 2, seed=1)
    offer = hidden.offer(1, Recipe(batch_size=10, lr=0.1), weights, graph="kept", lowered={precision: kit})
    with DeviceStore(root) as store:
        bench = RoundRunner(DEVICE, store.blobs, store.slots, data, lowering=ReducedPrecision(precision))
        bench.commit(bench.carry_out(offer))
        record = store.slots.current()
    assert record.precision == precision
    return root


def _ended(process: str) -> bool:
    """Whether a process of anybody's has ended; who should take note of its end needn't have done so."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _look(model: LiveModel, words: str) -> None:
    for _ in range(3000):
        if model.runtime.startswith(words):
            return
        model.poll()
        os.sched_yield()
        model._stopping.wait(0.02)
    raise AssertionError(f"{words!r} doesn't come about: {model.runtime}")
