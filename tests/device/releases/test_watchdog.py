"""The heartbeat follows the loop: no turn, no beat; and a release stays once a turn has followed the connection."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedprune.core.disk import file_digest
from fedprune.core.errors import RuntimeUnavailableError
from fedprune_device.hardware.runtime_process import RuntimeProcess
from fedprune_device.launcher.launcher import choose_slot
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_device.launcher.state import COMMITTED, ROLLED_BACK, TRIAL, UpdateOutcome
from fedprune_device.releases.installer import ReleaseInstaller
from fedprune_device.releases.release_trial import REQUIRED_MODULES, ReleaseTrial, check_packages
from fedprune_device.releases.watchdog import Watchdog
from fedprune_device.serving.model_slots import ModelSlots, ServingRecord
from fedprune_device.serving.predictor import Predictor
from support.fakes.runtime_releases import OUTSIDE, PUBLIC, make_release, set_up, source
from support.faults.power_cuts import power

pytestmark = pytest.mark.board


def check_model(serving: Path) -> None:
    with RuntimeProcess() as runtime:
        runtime.check_model(serving)


@pytest.fixture
def board(copy_board: Callable[..., Path], tmp_path: Path) -> ReleaseInstaller:
    updater = ReleaseInstaller(copy_board(), PUBLIC)
    with power():
        updater.stage(source(make_release(tmp_path / "2", 2, system=OUTSIDE)))
        updater.arm()
    return updater


def trial_of(board: ReleaseInstaller, slot: str = "b") -> ReleaseTrial | None:
    return ReleaseTrial.current({"FEDPRUNE_ROOT": str(board.home.root), "FEDPRUNE_SLOT": slot})


def outcome(home: SlotStore) -> UpdateOutcome | None:
    return home.load().outcome


def test_a_beat_comes_with_the_loop_and_not_more_often_than_needed() -> None:
    now, texts = [0.0], list[str]()
    heart = Watchdog(tell=texts.append, interval=20.0, clock=lambda: now[0])
    for _ in range(100):
        heart.turn()
        now[0] += 0.5
    assert texts[:2] == ["READY=1", "WATCHDOG=1"]
    assert texts.count("WATCHDOG=1") == 20, "four times within ten seconds, the watchdog's half"
    now[0] += 1000
    assert texts.count("WATCHDOG=1") == 20, "a loop that hangs is not alive"
    heart.stop()
    assert texts[-1] == "STOPPING=1"


def test_a_release_stays_a_turn_after_the_broker_was_reached(board: ReleaseInstaller) -> None:
    choose_slot(board.home, ExitStack())
    trial = trial_of(board)
    assert trial is not None
    texts: list[str] = []
    heart = Watchdog(trial, tell=texts.append, interval=1.0)
    heart.turn()
    heart.turn()
    heart.on_connect()
    assert outcome(board.home) is None, "the loop has yet to live through it"
    heart.turn()
    assert outcome(board.home) == UpdateOutcome(2, COMMITTED)
    assert "STATUS=connected to the broker" in texts
    assert trial_of(board) is None


def test_only_the_process_on_trial_may_end_it(board: ReleaseInstaller) -> None:
    assert trial_of(board, "a") is None
    assert ReleaseTrial.current({}) is None
    trial = trial_of(board)
    with board.home.lock_state():
        board.home.save(board.home.load().roll_back("its time is over"))
    trial.commit()
    assert outcome(board.home) == UpdateOutcome(2, ROLLED_BACK, "its time is over"), "too late"


def test_a_board_that_is_well_passes_the_checks(board: ReleaseInstaller, model: Path, tmp_path: Path) -> None:
    slots = ModelSlots(tmp_path / "serving")
    slots.prepare()
    check_model(tmp_path / "serving")
    slots.stage(model / "inference.onnx", model / "weights.safetensors")
    files = {name: file_digest(model / name) for name in ("inference.onnx", "weights.safetensors")}
    Predictor(model).check(3)
    slots.install(ServingRecord("job", 1, 3, files))
    trial_of(board).check(lambda: check_model(tmp_path / "serving"))
    state = board.home.load()
    assert (state.phase, "not reached the broker" in state.trouble) == (TRIAL, True)


def test_a_model_that_served_and_cannot_any_more_fails_the_check(model: Path, tmp_path: Path) -> None:
    slots = ModelSlots(tmp_path / "serving")
    slots.prepare()
    graph = tmp_path / "other.onnx"
    graph.write_bytes(b"a graph of an operator that this onnxruntime doesn't know")
    slots.stage(graph, model / "weights.safetensors")
    files = {"inference.onnx": file_digest(graph)}
    files["weights.safetensors"] = file_digest(model / "weights.safetensors")
    slots.install(ServingRecord("job", 1, 3, files))
    with pytest.raises(RuntimeUnavailableError, match="onnxruntime"):
        check_model(tmp_path / "serving")


def test_a_package_that_comes_from_outside_the_release_fails_the_check(tmp_path: Path) -> None:
    package_names = [name for name in REQUIRED_MODULES if name != "safetensors"]
    with pytest.raises(RuntimeUnavailableError, match="safetensors"):
        check_packages(tmp_path, package_names)
    (tmp_path / "safetensors").mkdir()
    (tmp_path / "safetensors" / "__init__.py").touch()
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from fedprune_device.releases.release_trial import check_packages\n"
        "check_packages(Path(sys.argv[1]), sys.argv[2:])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *package_names], check=True)


def test_a_release_that_lacks_a_package_goes_back_with_its_name(tmp_path: Path) -> None:
    board = set_up(tmp_path / "board", make_release(tmp_path / "1", 1))
    board.stage(source(make_release(tmp_path / "3", 3, system=OUTSIDE[1:])))
    board.arm()
    choose_slot(board.home, ExitStack())
    trial = trial_of(board)
    with pytest.raises(RuntimeUnavailableError):
        trial.check(trial.check_packages)
    result = outcome(board.home)
    assert (result.version, result.result) == (3, ROLLED_BACK)
    assert f"{OUTSIDE[0]} is not in the release" in result.reason
