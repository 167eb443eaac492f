"""`fedprune-flash ssh` against real sshd processes on this machine, each of which is a board."""

from __future__ import annotations

import json
import os
import platform
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune.security.joining import Claim
from fedprune.security.keys import SigningKey
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_flash import BoardSettings, Kit, Signer, Target, build_kit
from fedprune_flash.cli import main as cli
from fedprune_flash.ssh.journal import Journal
from support.fakes.runtime_releases import KEY, PUBLIC
from support.processes.ssh_boards import PROFILE, Board, Boards

pytestmark = [pytest.mark.soak, pytest.mark.system]

MakeKit = Callable[..., Kit]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A small kit, whose samples come from a function, so that a service needs no file."""
    board = BoardSettings("mqtts://broker.example:8883", "any", "lab", "own.samples:load")
    here = Target(f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine())
    own = next(wheels.glob("fedprune-*.whl"))
    return build_kit(
        tmp_path_factory.mktemp("ssh-kit") / "kit", board, here, wheel=own, links=[wheels], signer=Signer(KEY)
    ).folder


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Boards]:
    """Two boards."""
    made = Boards(tmp_path, ["attic", "cellar"])
    yield made
    made.stop()


def write_claims(path: Path, count: int) -> list[str]:
    texts = [Claim.make(bytes(12)).text for _ in range(count)]
    path.write_text("\n".join(texts) + "\n")
    return texts


def command(inventory: Path, kit: Path, *options: str) -> list[str]:
    claims = inventory.parent / "claims"
    if not claims.exists():
        write_claims(claims, 60)
    signer = inventory.parent / "signing.key"
    if not signer.exists():
        KEY.save(signer)
    given = ["--kit", str(kit), "--claims", str(claims), "--signing-key", str(signer)]
    return ["ssh", str(inventory), *given, "--wait", "20", *options]


def states(said: str) -> dict[str, str]:
    """Board and state, of the table."""
    rows = [line.split("\t") for line in said.splitlines()[1:]]
    return {row[0].partition(" ")[0]: row[1] for row in rows}


def snapshot(root: Path, but: str = "none") -> dict[str, int]:
    """When each file of a board was written last."""
    found = {str(p.relative_to(root)): p.lstat().st_mtime_ns for p in root.rglob("*") if not p.is_dir()}
    return {name: time for name, time in found.items() if not name.startswith(("run/calls", but))}


def check_installed(board: Board) -> None:
    record = SlotStore(board.root / "opt/fedprune").whole("a")
    assert record.version == 0
    rows = dict(line.split("=") for line in (board.root / "etc/fedprune/device.env").read_text().splitlines())
    assert rows["FEDPRUNE_DEVICE"] == board.name
    assert board.calls().count("restart --no-block fedprune.service") == 1
    assert board.claim.stat().st_mode & 0o777 == 0o400


SIGNALLED = """
import os, runpy, sys
from pathlib import Path
from fedprune_flash.ssh.journal import DONE, Journal

roots, number, enough = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
note, done = Journal.note, set()

def noted(self, device, *, state=None, work=None):
    note(self, device, state=state, work=work)
    if state == DONE:
        done.add(device)
        if len(done) >= enough and any(home.parent.name not in done for home in roots.glob("*/home")):
            os.kill(os.getpid(), number)

Journal.note = noted
sys.argv[:4] = ["fedprune-flash"]
runpy.run_module("fedprune_flash.cli.main", run_name="__main__", alter_sys=False)
"""
"""The program that gets a signal as soon as so many boards are done, while some other one has its kit and is not: who
watches it from elsewhere may find it done with all of them."""


def signalled(made: Boards, number: signal.Signals, enough: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", SIGNALLED, str(made.folder / "roots"), str(int(number)), str(enough)]
    return subprocess.run([*start, *words], capture_output=True, text=True, timeout=180, check=False)


# At every push the next test passes over what is done, and `test_inventory.py` gives each board a claim of its own.
@pytest.mark.soak
@pytest.mark.parametrize(("boards", "enough"), [(7, 3), (40, 6)])
def test_boards_are_installed_by_one_command_that_may_be_killed(
    tmp_path: Path, kit: Path, boards: int, enough: int
) -> None:
    """A claim goes to one board, and what was done before the kill isn't done again."""
    made = Boards(tmp_path, [f"board-{number:02}" for number in range(boards)])
    try:
        inventory = made.inventory()
        options = command(inventory, kit, "--jobs", "6")
        words = [sys.executable, "-m", "fedprune_flash.cli.main", *options]
        journal = tmp_path / "boards.toml.journal"
        killed = signalled(made, signal.SIGKILL, enough, options)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        before = done(journal)
        assert enough <= len(before) < boards
        finished = {b.name: snapshot(b.root) for b in made.boards if b.name in before}
        again = subprocess.run(words, capture_output=True, text=True, check=False)
        assert again.returncode == ExitCode.OK, again.stdout + again.stderr
        assert f"{boards} of {boards} boards done" in again.stderr
        assert len(done(journal)) == boards
        for board in made.boards:
            check_installed(board)
        assert {b.name: snapshot(b.root) for b in made.boards if b.name in before} == finished
        given = [board.claim.read_text() for board in made.boards]
        assert len(set(given)) == boards
        assert set(given) <= set((tmp_path / "claims").read_text().split())
        assert not any(text in journal.read_text() for text in given)
    finally:
        made.stop()


def done(journal: Path) -> set[str]:
    if not journal.exists():
        return set()
    boards = json.loads(journal.read_text())["boards"]
    return {name for name, entry in boards.items() if entry["state"] == "done"}


def test_what_is_done_is_passed_over_unless_something_changes(
    boards: Boards, kit: Path, capsys: Capture, make_kit: MakeKit
) -> None:
    inventory = boards.inventory()
    assert cli.main(command(inventory, kit)) == ExitCode.OK
    said = capsys.readouterr()
    assert set(states(said.out).values()) == {"done"}
    before = [snapshot(b.root, "home/") for b in boards.boards]
    assert cli.main(command(inventory, kit)) == ExitCode.OK
    said = capsys.readouterr()
    assert said.out.count("nothing has changed since") == 2
    assert "connecting" not in said.err
    assert cli.main(command(inventory, kit, "--again")) == ExitCode.OK
    said = capsys.readouterr()
    assert "connecting" in said.err
    assert said.err.count("copying 1 of 9 files") == 2  # kit.json, in which there is a claim no more
    assert "now:" not in said.err
    assert [snapshot(b.root, "home/") for b in boards.boards] == before
    changed = boards.inventory(server='"mqtts://other.example"')
    assert cli.main(command(changed, kit, "--only", "attic")) == ExitCode.OK
    said = capsys.readouterr()
    assert "attic: now: write /etc/fedprune/device.env" in said.err
    assert "unpack" not in "".join(line for line in said.err.splitlines() if "now:" in line)
    assert (
        (boards.boards[0].root / "etc/fedprune/device.env")
        .read_text()
        .startswith("FEDPRUNE_BROKER=mqtts://other.example\n")
    )


def test_a_dry_run_looks_and_changes_nothing(boards: Boards, kit: Path, tmp_path: Path, capsys: Capture) -> None:
    inventory = boards.inventory()
    before = [snapshot(b.root) for b in boards.boards]
    assert cli.main(command(inventory, kit, "--dry-run")) == ExitCode.OK
    said = capsys.readouterr().out
    assert set(states(said).values()) == {"planned"}
    planned = re.findall(r"copy (\d+) files, its claim among them, .* run install.pyz, start the service", said)
    assert len(planned) == 2
    assert [snapshot(b.root) for b in boards.boards] == before
    assert not (tmp_path / "boards.toml.journal").exists()
    assert cli.main(command(inventory, kit)) == ExitCode.OK
    assert re.findall(r"copying (\d+) of", "".join(capsys.readouterr())) == planned


def test_removal_is_the_reverse(boards: Boards, kit: Path, capsys: Capture) -> None:
    inventory = boards.inventory()
    before = [snapshot(b.root) for b in boards.boards]
    assert cli.main(command(inventory, kit)) == ExitCode.OK
    assert cli.main(["ssh", str(inventory), "--remove"]) == ExitCode.OK
    for board in boards.boards:
        assert board.claim.exists()
        assert not (board.root / "opt/fedprune").exists()
    journal = inventory.with_name("boards.toml.journal")
    undelivered = Claim.make(bytes(12)).text
    assert Journal(journal).give("attic", undelivered)
    assert cli.main(["ssh", str(inventory), "--remove", "--purge"]) == ExitCode.OK
    assert undelivered not in journal.read_text()
    assert not Journal(journal).give("cellar", undelivered)
    for board, files in zip(boards.boards, before, strict=True):
        assert {n: t for n, t in snapshot(board.root).items() if not n.startswith("run/")} == files
    said = capsys.readouterr().out
    assert said.count("what was learnt stays") == 2
    assert said.count("all is gone") == 2


def test_each_board_says_what_is_wrong_with_it_and_the_others_are_done(
    tmp_path: Path, kit: Path, capsys: Capture
) -> None:
    names = ["good", "model", "broken", "empty", "gone", "late"]
    made = Boards(tmp_path, names)
    by_name = {b.name: b for b in made.boards}
    try:
        text = made.inventory().read_text()
        text = text.replace('device = "model"', 'device = "model"\nboard = "raspberry-pi-5"')
        (tmp_path / "boards.toml").write_text(text)
        for name, file in (("broken", "broken"), ("empty", "unmet")):
            (by_name[name].root / "run").mkdir()
            (by_name[name].root / "run" / file).touch()
        by_name["gone"].process.terminate()
        by_name["gone"].process.wait()
        write_claims(tmp_path / "claims", 3)
        code = cli.main(command(tmp_path / "boards.toml", kit, "--jobs", "1"))
        said = capsys.readouterr()
        assert code == ExitCode.BOARD
        lines = {line.split()[0]: line for line in said.out.splitlines()}
        assert "\tdone\t" in lines["good"]
        assert f"model is another board: expected raspberry-pi-5, got {PROFILE}" in lines["model"]
        assert "\tCorrect its host or its board in the inventory." in lines["model"]
        assert "the service ends" in lines["broken"]
        assert "waits for its samples" in lines["empty"]
        assert "no connection" in lines["gone"]
        assert "there is no claim left for late" in lines["late"]
        assert "1 of 6 boards done" in said.err
        assert "Traceback" not in said.out + said.err
        assert not (by_name["model"].root / "home").exists()
        # What was wrong is mended: the same command continues, and nobody gets a second claim.
        claims = {name: by_name[name].claim.read_text() for name in ("good", "broken", "empty")}
        for name, file in (("broken", "broken"), ("empty", "unmet")):
            (by_name[name].root / "run" / file).unlink()
        options = [part for name in ("good", "broken", "empty") for part in ("--only", name)]
        assert cli.main(command(tmp_path / "boards.toml", kit, *options)) == ExitCode.OK
        assert {name: by_name[name].claim.read_text() for name in claims} == claims
    finally:
        made.stop()


def test_hosts_that_are_not_known_are_refused(boards: Boards, kit: Path, tmp_path: Path, capsys: Capture) -> None:
    inventory = boards.inventory()
    known = tmp_path / "known_hosts"
    text = known.read_text()
    known.write_text("")
    assert cli.main(command(inventory, kit, "--only", "attic", "--dry-run")) == ExitCode.BOARD
    said = capsys.readouterr().out
    assert "its host key is not known\tLog in by hand and compare it, or use --accept-new-hosts." in said
    assert known.read_text() == ""
    assert cli.main(command(inventory, kit, "--only", "attic", "--dry-run", "--accept-new-hosts")) == ExitCode.OK
    assert known.read_text().split()[1:] == text.splitlines()[0].split()[1:]  # the name may be hashed
    other = " ".join((tmp_path / "user.pub").read_text().split()[:2])
    known.write_text(f"[127.0.0.1]:{boards.boards[0].port} {other}\n")
    assert cli.main(command(inventory, kit, "--only", "attic", "--dry-run", "--accept-new-hosts")) == ExitCode.BOARD
    assert "its host key is not the one that is known" in capsys.readouterr().out


def test_a_board_without_python_or_for_another_key_is_said_so(
    tmp_path: Path, kit: Path, capsys: Capture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    made = Boards(tmp_path, ["attic"], path=str(bare))
    try:
        inventory = made.inventory()
        assert cli.main(command(inventory, kit)) == ExitCode.BOARD
        assert "it has no python3\tsudo apt install python3" in capsys.readouterr().out
        stranger = tmp_path / "stranger"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger)], check=True)
        inventory = made.inventory(key=f'"{stranger}"')
        assert cli.main(command(inventory, kit)) == ExitCode.BOARD
        assert "it refuses the login" in capsys.readouterr().out
    finally:
        made.stop()


def test_a_kit_for_another_board_is_not_copied(
    boards: Boards, make_kit: MakeKit, wheels: Path, capsys: Capture
) -> None:
    other = next(v for v in ("3.10", "3.13") if v != f"{sys.version_info[0]}.{sys.version_info[1]}")
    wrong = make_kit("wrong", target=Target(other, platform.machine()))
    assert cli.main(command(boards.inventory(), wrong.folder)) == ExitCode.BOARD
    said = capsys.readouterr().out
    assert said.count("no kit for Python") == 2
    assert not any((b.root / "home").exists() for b in boards.boards)


def test_a_board_that_has_joined_gets_no_claim(boards: Boards, kit: Path, tmp_path: Path) -> None:
    board = boards.boards[0]
    identity = board.root / "var/lib/fedprune/identity"
    identity.mkdir(parents=True)
    for name in ("device.pem", "tls.key", "authority.pem", "server.pub"):
        (identity / name).touch()
    (identity / "server.pub").write_text(PUBLIC.hex)
    KEY.save(tmp_path / "signing.key")
    words = ["ssh", str(boards.inventory()), "--kit", str(kit), "--only", "attic"]
    assert cli.main(words) == ExitCode.USAGE
    SigningKey.make().save(tmp_path / "another.key")
    assert cli.main([*words, "--signing-key", str(tmp_path / "another.key")]) == ExitCode.KIT
    assert not (board.root / "opt/fedprune").exists()
    assert cli.main([*words, "--signing-key", str(tmp_path / "signing.key")]) == ExitCode.OK
    assert not board.claim.exists()
    assert (board.root / "opt/fedprune/server.pub").read_text() == PUBLIC.hex


def test_boards_may_be_installed_without_signatures(boards: Boards, make_kit: MakeKit, tmp_path: Path) -> None:
    board, plain = (
        boards.boards[0],
        make_kit(signer=None, board=BoardSettings("mqtts://h", "any", "lab", "own.samples:load")),
    )
    write_claims(tmp_path / "claims", 1)
    words = ["ssh", str(boards.inventory()), "--kit", str(plain.folder), "--claims", str(tmp_path / "claims")]
    KEY.save(tmp_path / "signing.key")
    words += ["--only", "attic"]
    assert cli.main([*words, "--signing-key", str(tmp_path / "signing.key")]) == ExitCode.KIT
    assert cli.main([*words, "--unsigned"]) == ExitCode.OK
    check_installed(board)
    assert not (board.root / "opt/fedprune/server.pub").exists()


def test_a_board_that_is_another_device_already_is_left_alone(
    boards: Boards, kit: Path, tmp_path: Path, capsys: Capture
) -> None:
    inventory = boards.inventory()
    assert cli.main(command(inventory, kit, "--only", "attic")) == ExitCode.OK
    before = snapshot(boards.boards[0].root)
    inventory.write_text(inventory.read_text().replace('device = "attic"', 'device = "loft"'))
    assert cli.main(command(inventory, kit, "--only", "loft")) == ExitCode.BOARD
    assert "it is installed as another device than loft: got attic" in capsys.readouterr().out
    assert snapshot(boards.boards[0].root) == before


def test_claims_that_have_expired_are_replaced_on_demand(boards: Boards, kit: Path, capsys: Capture) -> None:
    board, inventory = boards.boards[0], boards.inventory()
    (board.root / "run").mkdir()
    (board.root / "run/broken").touch()
    words = command(inventory, kit, "--only", "attic")
    assert cli.main(words) == ExitCode.BOARD
    old = board.claim.read_text()
    assert cli.main(words) == ExitCode.BOARD
    assert board.claim.read_text() == old
    (board.root / "run/broken").unlink()
    assert cli.main([*words, "--new-claims"]) == ExitCode.OK
    assert board.claim.read_text() != old
    assert "Traceback" not in capsys.readouterr().err


def test_on_a_terminal_boards_at_work_are_shown(boards: Boards, kit: Path) -> None:
    near, far = pty.openpty()
    words = [sys.executable, "-m", "fedprune_flash.cli.main", *command(boards.inventory(), kit)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=far, text=True, env={**os.environ, "TERM": "xterm"}
    )
    os.close(far)
    seen = b""
    with suppress(OSError):  # which is how a terminal ends
        while piece := os.read(near, 65536):
            seen += piece
    os.close(near)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.OK
    assert set(states(out).values()) == {"done"}
    assert b"attic" in seen
    assert b"\x1b[" in seen
    assert b"Traceback" not in seen


def test_the_server_makes_claims_for_the_boards_names(
    boards: Boards, make_kit: MakeKit, tmp_path: Path, capsys: Capture
) -> None:
    server = pytest.importorskip("fedprune_server.cli.main")
    folder = pytest.importorskip("fedprune_server.enrollment.pki")
    state = tmp_path / "state"
    assert server.main(["init", "--state", str(state), "--site", "lab"]) == ExitCode.OK
    board = BoardSettings("mqtts://h", "any", "lab", "own.samples:load")
    kit = make_kit(signer=Signer.load(state / "identity/signing.key"), board=board).folder
    words = ["ssh", str(boards.inventory()), "--kit", str(kit), "--server-state", str(state)]
    assert cli.main(words) == ExitCode.OK
    with folder.IdentityFolder(state) as identity:
        pin, key = identity.authority.pin, identity.key.verifying
    assert {(b.root / "opt/fedprune/server.pub").read_text() for b in boards.boards} == {key.hex}
    claims = [Claim.parse(b.claim.read_text()) for b in boards.boards]
    assert {c.pin for c in claims} == {pin}
    assert len({c.id for c in claims}) == 2


def test_a_second_run_at_the_same_time_is_refused(boards: Boards, kit: Path, tmp_path: Path, capsys: Capture) -> None:
    inventory = boards.inventory()
    with Journal(tmp_path / "boards.toml.journal").alone():
        assert cli.main(command(inventory, kit)) == ExitCode.STORAGE
    assert "another run uses" in capsys.readouterr().err


# At every push `tests/toolkit/core/test_cli.py` ends commands by signals.
@pytest.mark.soak
def test_ctrl_c_ends_it_and_nothing_of_it_stays(tmp_path: Path, kit: Path) -> None:
    made = Boards(tmp_path, [f"board-{number}" for number in range(6)])
    try:
        options = command(made.inventory(), kit, "--jobs", "2")
        words = [sys.executable, "-m", "fedprune_flash.cli.main", *options]
        ended = signalled(made, signal.SIGTERM, 1, options)
        assert ended.returncode == ExitCode.INTERRUPTED
        assert "Traceback" not in ended.stdout + ended.stderr
        again = subprocess.run(words, capture_output=True, text=True, check=False)
        assert again.returncode == ExitCode.OK, again.stdout + again.stderr
        for board in made.boards:
            check_installed(board)
    finally:
        made.stop()
