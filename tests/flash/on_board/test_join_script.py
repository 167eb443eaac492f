"""One line that installs a kit from a web server: what it checks before it runs anything, and what it leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_flash import Kit
from support.fakes.runtime_releases import CLAIM
from support.paths import ROOT

SCRIPT = ROOT / "deploy" / "join.sh"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def site(tmp_path: Path, kit: Kit) -> Iterator[str]:
    """Address of the kit."""
    with served(tmp_path) as url:
        yield f"{url}/{kit.folder.name}"


def joined(root: Path, *words: str, claim: str = "", script: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """What came of the line, as a pipe from curl runs it."""
    root.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    temporary = root.with_name("temporary")
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"PATH": path, "FEDPRUNE_CLAIM": claim, "TMPDIR": str(temporary)}
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = SCRIPT.read_bytes() if script is None else script
    command = ["sh", "-s", "--", *words]
    done = subprocess.run(command, input=text, capture_output=True, check=False, env=environment)
    assert list(temporary.iterdir()) == []
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_one_line_installs_a_kit_and_leaves_the_claim_to_the_board(tmp_path: Path, kit: Kit, site: str) -> None:
    root = tmp_path / "root"
    done = joined(root, f"{site}/", kit.digest, "--root", str(root), claim=CLAIM)
    assert done.returncode == 0, done.stderr
    assert "signed with key" in done.stdout
    claim = root / "var/lib/fedprune/claim"
    assert claim.read_text().strip() == CLAIM
    assert claim.stat().st_mode & 0o777 == 0o400
    assert (root / "etc/fedprune/device.env").exists()
    again = joined(root, site, kit.digest, "--root", str(root))
    assert again.returncode == 0
    assert "now:" not in again.stdout


def break_kit(kit: Kit) -> None:
    path = kit.folder / "install.pyz"
    path.write_bytes(b"import os; os.mkdir('/tmp/never')" + path.read_bytes())


def break_manifest(kit: Kit) -> None:
    path = kit.folder / "kit.json"
    path.write_text(path.read_text() + " ")


def lose_file(kit: Kit) -> None:
    (kit.folder / "install.pyz").unlink()


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (break_kit, ExitCode.KIT, "is damaged"),
        (break_manifest, ExitCode.KIT, "another digest"),
        (lose_file, ExitCode.BROKER, "can't fetch"),
    ],
)
def test_nothing_that_the_digest_does_not_cover_is_run(
    tmp_path: Path, kit: Kit, site: str, damage: Callable[[Kit], None], code: ExitCode, said: str
) -> None:
    damage(kit)
    root = tmp_path / "root"
    done = joined(root, site, kit.digest, "--root", str(root), claim=CLAIM)
    assert done.returncode == code
    assert said in done.stderr
    assert list(root.iterdir()) == []


def test_a_kit_with_a_claim_is_not_for_a_web_server(tmp_path: Path, make_kit: Callable[..., Kit]) -> None:
    kit = make_kit("claimed", claim=CLAIM)
    with served(tmp_path) as url:
        done = joined(tmp_path / "root", f"{url}/claimed", kit.digest)
    assert (done.returncode, "has a claim" in done.stderr) == (ExitCode.KIT, True)


@pytest.mark.parametrize(
    "words", [(), ("https://fleet.example/kit",), ("http://fleet.example/kit", "0" * 64), ("https://a.b/c", "0" * 63)]
)
def test_a_wrong_line_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert joined(tmp_path / "root", *words).returncode == ExitCode.USAGE


def test_a_script_that_was_cut_off_does_nothing(tmp_path: Path, kit: Kit, site: str) -> None:
    root, whole = tmp_path / "root", SCRIPT.read_bytes()
    for length in (len(whole) // 4, len(whole) // 2, len(whole) - len(b'main "$@"\n')):
        joined(root, site, kit.digest, "--root", str(root), script=whole[:length])
        assert list(root.iterdir()) == []


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, *(ROOT / "deploy").rglob("*.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
