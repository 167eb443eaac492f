"""The launcher as a process of its own: real releases that start well, crash, hang and die of signals."""

import hashlib
import json
import os
import select
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.security.keys import SigningKey
from fedprune_device.launcher.slot_store import KEY_FILE, SIGNATURE_PREFIX, SlotStore, digest_and_size, files_digest
from fedprune_device.launcher.state import COMMITTED, ROLLED_BACK, STABLE, TRIAL, UpdateOutcome
from fedprune_device.releases.installer import LAUNCHER_FILE, ReleaseInstaller
from support.fakes.runtime_releases import make_release, set_up, source

pytestmark = [pytest.mark.board, pytest.mark.system]

HEALTHY = """
import os, sys
sys.path.insert(0, os.environ["FEDPRUNE_ROOT"] + "/launcher.pyz")
from pathlib import Path
from fedprune_device.launcher.slot_store import SlotStore

def main():
    home = SlotStore(Path(os.environ["FEDPRUNE_ROOT"]))
    with home.lock_state():
        state = home.load()
        if state.phase == "trial" and state.other_slot == os.environ["FEDPRUNE_SLOT"]:
            home.save(state.commit())
    print("version", VERSION, sys.argv[1:], flush=True)
    return 7
"""
WAITS = "import time\ndef main():\n    print('version', VERSION, flush=True)\n    time.sleep(600)\n"
BAD = {
    "raise ImportError('no module of that name')": "ended with exit code 1 before it was healthy: "
    "ImportError: no module of that name",
    "import os, signal\nos.kill(os.getpid(), signal.SIGILL)": "killed by SIGILL before it was healthy",
    "import sys\ndef main():\n    print('first', 'x' * 5000, '\\n\\t lost \\n\\n', file=sys.stderr)\n    return 3": (
        "ended with exit code 3 before it was healthy: lost"
    ),
    "def main():\n    return 0": "ended with exit code 0 before it was healthy",
    "import time\ntime.sleep(600)": "not healthy within 1 s",
}


@pytest.fixture
def board(tmp_path: Path) -> ReleaseInstaller:
    return set_up(tmp_path / "board", make_release(tmp_path / "one", 1, app=HEALTHY))


def start(board: ReleaseInstaller, *arguments: str) -> subprocess.Popen[str]:
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "FEDPRUNE"))}
    command = [sys.executable, str(board.home.root / LAUNCHER_FILE), *(arguments or ("run", "--patient"))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def boot(board: ReleaseInstaller, *arguments: str) -> tuple[str, int]:
    process = start(board, *arguments)
    out, err = process.communicate(timeout=60)
    return out.strip() or err.strip().splitlines()[-1], process.returncode


def update(
    board: ReleaseInstaller, folder: Path, app: str, *, number: int = 2, attempts: int = 2, seconds: float = 1
) -> None:
    board.stage(source(make_release(folder / str(number), number, app=app)))
    board.arm(attempts, seconds)


def test_a_release_that_is_healthy_stays_and_gets_all_arguments(board: ReleaseInstaller, tmp_path: Path) -> None:
    assert boot(board) == ("version 1 ['run', '--patient']", 7)
    update(board, tmp_path, HEALTHY, seconds=60)
    assert boot(board) == ("version 2 ['run', '--patient']", 7)
    state = board.home.load()
    assert (state.phase, state.stable, state.outcome) == (STABLE, "b", UpdateOutcome(2, COMMITTED))
    assert boot(board) == ("version 2 ['run', '--patient']", 7)
    assert board.home.checked_record("b").version == 2, "running it left nothing in its slot"


@pytest.mark.parametrize(("app", "reason"), BAD.items(), ids=BAD.values())
def test_a_release_that_is_no_good_is_rolled_back_by_itself(
    board: ReleaseInstaller, tmp_path: Path, app: str, reason: str
) -> None:
    update(board, tmp_path, app, seconds=1 if "within 1 s" in reason else 60)  # a start alone may take a second
    assert boot(board) == ("version 1 ['run', '--patient']", 7)
    assert board.home.load().outcome == UpdateOutcome(2, ROLLED_BACK, reason)


@pytest.mark.parametrize("arguments", ["slots", "predict --top 1", "--help", "run --help"])
def test_another_command_runs_what_is_stable_and_leaves_the_trial_to_the_service(
    board: ReleaseInstaller, tmp_path: Path, arguments: str
) -> None:
    update(board, tmp_path, HEALTHY, attempts=1, seconds=60)
    before = [path.read_bytes() for path in sorted(board.home.folder.iterdir())]
    for _ in range(2):
        assert boot(board, *arguments.split()) == (f"version 1 {arguments.split()}", 7)
    assert [path.read_bytes() for path in sorted(board.home.folder.iterdir())] == before
    assert boot(board) == ("version 2 ['run', '--patient']", 7)


@pytest.mark.parametrize("slot", ["a", "b"])
def test_one_service_runs_and_nobody_writes_its_slot(tmp_path: Path, slot: str) -> None:
    board = set_up(tmp_path / "board", make_release(tmp_path / "one", 1, app=WAITS))
    if slot == "b":
        update(board, tmp_path, WAITS, seconds=600)
    process = start(board)
    assert process.stdout.readline().startswith("version")
    before = board.home.load()
    assert boot(board) == ("error: another process runs the service", 31)
    with pytest.raises(BlockingIOError, match=f"a process runs from slot {slot}"), board.home.lock_slot(slot):
        pass
    assert board.home.load() == before
    process.kill()
    process.communicate()
    with board.home.lock_slot(slot):
        pass


def take_over(board: ReleaseInstaller, slot: str, **changes: str) -> None:
    """Change a slot and its record as a service could that was broken into; both fit each other."""
    home = board.home
    app = home.root / slot / "app/__init__.py"
    app.write_text("def main():\n    print('taken over')\n    return 0\n")
    record = home.record(slot)
    files = {**record.files, "app/__init__.py": digest_and_size(app)}
    home.write_record(slot, replace(record, files=files, **changes))


def signed_by_another(board: ReleaseInstaller, slot: str) -> dict[str, str]:
    """The proof of a slot's content by a key that isn't the server's."""
    body = json.loads(board.home.record(slot).manifest)
    app = b"def main():\n    print('taken over')\n    return 0\n"
    files = {**board.home.record(slot).files, "app/__init__.py": (hashlib.sha256(app).hexdigest(), len(app))}
    manifest = json.dumps({**body, "contents": files_digest(files)})
    return {"manifest": manifest, "signature": SigningKey.make().sign(SIGNATURE_PREFIX + manifest.encode()).hex()}


PROOFS: dict[str, Callable[[ReleaseInstaller, str], dict[str, str]]] = {
    "as it was": lambda *_: {},
    "none": lambda *_: {"manifest": "", "signature": ""},
    "of another entry": lambda *_: {"entry": "os:abort"},
    "by another key": signed_by_another,
    "changed": lambda board, slot: {"manifest": signed_by_another(board, slot)["manifest"]},
}


@pytest.mark.parametrize("proof", PROOFS.values(), ids=PROOFS)
def test_what_the_server_has_not_signed_is_not_started(
    board: ReleaseInstaller, proof: Callable[[ReleaseInstaller, str], dict[str, str]]
) -> None:
    take_over(board, "a", **proof(board, "a"))
    output, code = boot(board)
    assert code == 31
    assert "slot a: the server's key has not signed what is in it" in output


def test_a_slot_that_was_changed_gives_way_to_the_other(board: ReleaseInstaller, tmp_path: Path) -> None:
    update(board, tmp_path, HEALTHY, seconds=60)
    assert boot(board) == ("version 2 ['run', '--patient']", 7)
    take_over(board, "b")
    assert boot(board) == ("version 1 ['run', '--patient']", 7)
    assert "slot b: the server's key has not signed what is in it" in board.home.load().outcome.reason


def test_a_damaged_key_starts_nothing(board: ReleaseInstaller) -> None:
    (board.home.root / KEY_FILE).write_text("no key")
    output, code = boot(board)
    assert code == 31
    assert "server.pub holds no key" in output


def test_without_a_key_a_slot_is_checked_for_damage_alone_and_the_launcher_says_so(board: ReleaseInstaller) -> None:
    (board.home.root / KEY_FILE).unlink()
    take_over(board, "a")
    out, err = start(board).communicate(timeout=60)
    assert out == "taken over\n"
    assert "no server.pub" in err


def test_a_launcher_that_is_killed_takes_its_trial_along_and_has_counted_the_attempt(
    board: ReleaseInstaller, tmp_path: Path
) -> None:
    update(board, tmp_path, WAITS, seconds=600)
    for left in (1, 0):
        process = start(board)
        assert process.stdout.readline() == "version 2\n"
        state = board.home.load()
        assert (state.phase, state.left) == (TRIAL, left)
        (release,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        ended = os.pidfd_open(release)
        process.kill()
        process.wait()
        try:
            assert select.select([ended], [], [], 60)[0], "the release goes on without its launcher"
        finally:
            os.close(ended)
        process.communicate()
    assert boot(board)[0] == "version 1 ['run', '--patient']"
    state = board.home.load()
    assert "without a message" in state.outcome.reason


def test_a_stop_in_the_middle_of_a_trial_ends_both_and_costs_the_attempt(
    board: ReleaseInstaller, tmp_path: Path
) -> None:
    update(board, tmp_path, WAITS, seconds=600)
    process = start(board)
    assert process.stdout.readline() == "version 2\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0
    state = board.home.load()
    assert (state.phase, state.left, state.trouble) == (TRIAL, 1, "killed by SIGTERM before it was healthy")


def test_the_launcher_needs_the_standard_library_only(board: ReleaseInstaller, tmp_path: Path) -> None:
    with zipfile.ZipFile(board.home.root / LAUNCHER_FILE) as archive:
        names = archive.namelist()
    assert "fedprune_device/launcher/launcher.py" in names
    code = (
        "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]);"
        "import fedprune_device.launcher.launcher as l; new = {n.split('.')[0] for n in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'fedprune_device'}), l.VERSION)"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(board.home.root / LAUNCHER_FILE)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[] 1"


def test_a_board_without_anything_whole_ends_with_one_sentence(board: ReleaseInstaller) -> None:
    for path in board.home.folder.glob("*.json"):
        path.unlink()
    output, code = boot(board)
    assert code == 31
    assert output == "error: neither the launcher's state nor a slot is whole. Install the runtime again."
    assert SlotStore(board.home.root).load() is None
