"""A board that answers anything at all: whatever comes back is an error of one line, and no file ends up elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedprune.core.errors import BoardError, ExitCode
from fedprune_flash import Kit
from fedprune_flash.cli import main as cli
from fedprune_flash.on_board import remote_agent
from fedprune_flash.ssh.connection import BoardLink
from fedprune_flash.ssh.inventory import BoardRow

pytestmark = [pytest.mark.soak, pytest.mark.system]

ROW = BoardRow("attic", "attic.local", "raspberry-pi-5")
Fake = Callable[[str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a script in the place of ssh."""

    def put(script: str) -> None:
        path = tmp_path / "programs/ssh"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return put


HELLO = "echo 'fedprune: [3, 11]'"
CHANGED = "echo '@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @' >&2; exit 255"

SCRIPTS: dict[str, tuple[str, str]] = {
    "nothing": ("exit 0", "the connection broke"),
    "refused": ("echo 'ssh: connect to host x port 22: Connection refused' >&2; exit 255", "Connection refused"),
    "codes of a terminal": ("printf 'a\\033[31mb\\007\\n' >&2; exit 255", "a [31mb"),
    "no python": ("exit 127", "it has no python3"),
    "changed": (CHANGED, "its host key is not the one that is known"),
    "old": ("echo 'fedprune: [3, 6]'; cat >/dev/null", "its Python is too old: expected 3.10 or newer, got 3.6"),
    "no version": ("echo 'fedprune: {}'; cat >/dev/null", "first answer can't be read"),
    "no JSON": (f"{HELLO}; echo 'fedprune: {{{{'; cat >/dev/null", "can't be read"),
    "deep": (
        f"{HELLO}; printf 'fedprune: '; head -c 100000 /dev/zero | tr '\\0' '['; echo; cat >/dev/null",
        "can't be read",
    ),
    "a list": (f"{HELLO}; echo 'fedprune: []'; cat >/dev/null", "something else than an answer"),
    "endless": (f"{HELLO}; yes", "the board's login prints too much"),
    "endless line": (f"{HELLO}; cat /dev/zero", "the board's login prints too much"),
    "an error": (
        f'{HELLO}; echo \'fedprune: {{"error": "disk\\u000afull"}}\'; cat >/dev/null',
        "on the board: disk full",
    ),
}


def first_answer() -> None:
    link = BoardLink(ROW, accept_new=False)
    try:
        link.ask("probe", free=True)
    finally:
        link.kill()
        link.close()


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_whatever_a_board_says_is_an_error_of_one_line(name: str, fake: Fake) -> None:
    script, words = SCRIPTS[name]
    fake(script)
    with pytest.raises(BoardError) as caught:
        first_answer()
    assert words in str(caught.value)
    assert "\x1b" not in str(caught.value)


ANSWERS = {
    "empty": {},
    "odd types": {
        "python": 3,
        "machine": [],
        "model": 1,
        "compatible": "x",
        "memory": "much",
        "sudo": True,
        "wide": True,
    },
    "huge": {"python": [3, 11], "machine": "x" * 10**5, "model": "\x1b]0;" * 999, "sudo": True, "wide": True},
    "no sudo": {"sudo": False, "wide": True},
    "32 bits": {"sudo": True, "wide": False},
}


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_board_may_lie_about_itself(
    name: str, fake: Fake, tmp_path: Path, kit: Kit, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "answer").write_text("fedprune: " + json.dumps(ANSWERS[name]) + "\n")
    fake(f"{HELLO}; cat {tmp_path}/answer; cat >/dev/null")
    (tmp_path / "boards.toml").write_text("[[board]]\ndevice = 'attic'\nhost = 'a'\nboard = 'raspberry-pi-5'\n")
    code = cli.main(["ssh", str(tmp_path / "boards.toml"), "--kit", str(kit.folder), "--unsigned"])
    said = capsys.readouterr()
    assert code == ExitCode.BOARD, said
    assert "Traceback" not in said.out + said.err
    assert "\x1b" not in said.out + said.err
    assert len(said.out.splitlines()) == 2
    words = ["ssh", str(tmp_path / "boards.toml"), "--kit", str(kit.folder), "--unsigned", "--json"]
    assert cli.main(words) == ExitCode.BOARD
    [row] = json.loads(capsys.readouterr().out)
    assert (row["device"], row["good"], bool(row["reason"])) == ("attic", False, True)


@pytest.fixture
def near(tmp_path: Path, fake: Fake) -> Iterator[Callable[[], BoardLink]]:
    """Connections to a board that is this machine, below a folder; its login prints a greeting."""
    (tmp_path / "root").mkdir()
    path = f"PATH={Path(sys.executable).parent}:$PATH"
    fake(f'echo "Welcome!"; for word in "$@"; do last=$word; done; {path}; eval "exec $last"')
    row = BoardRow("attic", "attic.local", "raspberry-pi-5", root=str(tmp_path / "root"))
    links: list[BoardLink] = []

    def connect() -> BoardLink:
        links.append(BoardLink(row, accept_new=False))
        return links[-1]

    yield connect
    for link in links:
        link.close()


def test_a_file_whose_copy_broke_off_is_gone_on_with(near: Callable[[], BoardLink], tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20)
    sha256 = hashlib.sha256(data).hexdigest()
    rows = [["wheelhouse/a.whl", sha256, len(data)]]
    link = near()
    assert link.ask("have", files=rows, dry=False) == {"missing": [["wheelhouse/a.whl", 0]]}

    def pulled(_count: int) -> None:
        if next(counted) == 6:
            link.kill()

    counted = iter(range(100))
    with pytest.raises(BoardError, match="the connection broke"):
        link.put("wheelhouse/a.whl", data, sha256, len(data), 0, pulled)
    link = near()
    ((path, offset),) = link.ask("have", files=rows, dry=False)["missing"]
    assert (path, offset % 2**18) == ("wheelhouse/a.whl", 0)
    assert 0 < offset < len(data)
    sent: list[int] = []
    assert link.put(path, data, sha256, len(data), offset, sent.append)
    assert sum(sent) == len(data) - offset
    assert link.ask("have", files=rows, dry=False) == {"missing": []}
    folder = tmp_path / "root/home/.cache/fedprune-kit"
    assert (folder / "wheelhouse/a.whl").read_bytes() == data
    assert folder.stat().st_mode & 0o777 == 0o700
    assert link.ask("have", files=[], dry=False) == {"missing": []}
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {".lock"}, "what no kit has is deleted"


def test_a_copy_that_comes_out_wrong_is_noticed(near: Callable[[], BoardLink], tmp_path: Path) -> None:
    link = near()
    assert not link.put("a.whl", b"other", "0" * 64, 5, 0, lambda _: None)
    assert not list((tmp_path / "root").rglob("a.whl"))
    link.close()


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x"])
def test_no_file_leads_out_of_the_kits_folder(path: str, near: Callable[[], BoardLink], tmp_path: Path) -> None:
    link = near()
    with pytest.raises(BoardError, match="leads out"):
        link.put(path, b"x", hashlib.sha256(b"x").hexdigest(), 1, 0, lambda _: None)


def test_a_folder_that_is_somebody_elses_is_not_used(near: Callable[[], BoardLink], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    cache = tmp_path / "root/home/.cache"
    cache.mkdir(parents=True)
    (cache / "fedprune-kit").symlink_to(tmp_path / "elsewhere")
    link = near()
    with pytest.raises(BoardError, match="is not this user's own"):
        link.ask("have", files=[], dry=False)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_far_side_runs_on_every_python_that_kits_are_for() -> None:
    pythons = sorted((Path.home() / ".pyenv/versions").glob("3.1[0-3].*/bin/python"))
    if not pythons:
        pytest.skip("no other Python here")
    request = json.dumps({"op": "probe", "root": "/", "free": True}) + "\n"
    for python in pythons:
        done = subprocess.run(
            [python, "-I", remote_agent.__file__], input=request, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout.removeprefix(remote_agent.MARK))["wide"] is True


def test_what_a_board_says_beside_its_answers_fills_no_disk_and_no_memory(fake: Fake) -> None:
    fake(f"{HELLO}; head -c 300000000 /dev/zero >&2; echo >&2; echo 'it is broken' >&2; exit 255")
    tracemalloc.start()
    with pytest.raises(BoardError, match="no connection: it is broken"):
        first_answer()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 16 * 2**20


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As patient as a test is."""
    monkeypatch.setattr("fedprune_flash.ssh.connection._ANSWER_S", 1.0)


@pytest.mark.usefixtures("patient")
def test_a_board_that_stops_reading_holds_up_nobody(fake: Fake) -> None:
    fake(f"{HELLO}; exec sleep 600")
    link = BoardLink(ROW, accept_new=False)
    try:
        with pytest.raises(BoardError, match="neither reads nor answers for 1 s"):
            link.put("x", bytes(2**24), "0" * 64, 2**24, 0, lambda _: None)
    finally:
        link.close()


def test_an_installer_that_speaks_for_ever_is_left(fake: Fake) -> None:
    fake(HELLO + '; while sleep 0.05; do echo \'fedprune: {"line": "x"}\'; done')
    link = BoardLink(ROW, accept_new=False)
    lines: list[str] = []
    try:
        with pytest.raises(BoardError, match="neither reads nor answers"):
            link.install([], lines.append, 1.0)
        assert lines
    finally:
        link.close()


def test_a_disk_that_takes_less_than_it_is_given_gets_the_rest(tmp_path: Path) -> None:
    """A file in memory that grows by no more than 1000 bytes at once, in the far side's process."""
    data = os.urandom(300_000)
    sha256 = hashlib.sha256(data).hexdigest()
    source = Path(remote_agent.__file__).read_text().replace("file.write(piece)", "file.write(piece[:1000])")
    request = {"op": "put", "root": str(tmp_path), "path": "a", "sha256": sha256, "size": len(data), "offset": 0}
    done = subprocess.run(
        [sys.executable, "-I", "-c", source],
        input=json.dumps(request).encode() + b"\n" + data, capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.decode() == f'{remote_agent.MARK}{{"put": true}}\n', done.stderr
    assert (tmp_path / "home/.cache/fedprune-kit/a").read_bytes() == data
