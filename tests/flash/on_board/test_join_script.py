"""One line that installs a kit from a web server: what it checks before it runs anything, and what it leaves."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from fedprune.core.errors import ExitCode
from fedprune_flash import Kit
from support.fakes.runtime_releases import CLAIM
from support.paths import ROOT

SCRIPT = ROOT / "deploy" / "join.sh"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Endless(Quiet):
    """Sends the beginning of one file, and no more until the board has hung up."""

    def __init__(self, *arguments: Any, stuck: str, begun: threading.Event, **options: Any) -> None:
        self.stuck_file, self.begun = stuck, begun
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        if not self.path.endswith(self.stuck_file):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"{")
        self.begun.set()
        self.connection.recv(1)


@contextmanager
def serve_folder(folder: Path, handler: Callable[..., Quiet] = Quiet) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site(tmp_path: Path, kit: Kit) -> Iterator[str]:
    """Address of the kit."""
    with serve_folder(tmp_path) as url:
        yield f"{url}/{kit.folder.name}"


def run_join_script(
    root: Path,
    *words: str,
    claim: str = "",
    script: bytes | None = None,
    stop: tuple[threading.Event, int] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What came of the line, as a pipe from curl runs it; `stop` sends it a signal after an event, as a terminal does.

    It runs in a folder that is anybody's.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    temporary, anybodys = root.with_name("temporary"), root.with_name("anybody's")
    for folder in (root, temporary, anybodys):
        folder.mkdir(exist_ok=True)
    (anybodys / "json.py").write_text("raise SystemExit('error: a module of the working folder was run')\n")
    environment = os.environ | {"PATH": path, "FEDPRUNE_CLAIM": claim, "TMPDIR": str(temporary)}
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["sh", "-s", "--", *words]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts tests in the background ignores it
    try:
        process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, cwd=anybodys, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    if stop is not None:
        threading.Thread(target=lambda: stop[0].wait(60) and os.killpg(process.pid, stop[1])).start()
    out, errors = process.communicate(SCRIPT.read_bytes() if script is None else script, timeout=120)
    assert list(temporary.iterdir()) == []
    return subprocess.CompletedProcess(command, process.returncode, out.decode(), errors.decode())


def test_one_line_installs_a_kit_and_leaves_the_claim_to_the_board(tmp_path: Path, kit: Kit, site: str) -> None:
    root = tmp_path / "root"
    done = run_join_script(root, f"{site}/", kit.digest, "--root", str(root), claim=CLAIM)
    assert done.returncode == 0, done.stderr
    assert "signed with key" in done.stdout
    claim = root / "var/lib/fedprune/claim"
    assert claim.read_text() == CLAIM
    assert claim.stat().st_mode & 0o777 == 0o400
    assert (root / "etc/fedprune/device.env").exists()
    second_run = run_join_script(root, site, kit.digest, "--root", str(root))
    assert second_run.returncode == 0
    assert "now:" not in second_run.stdout


def test_links_that_the_service_planted_are_not_followed(tmp_path: Path, kit: Kit, site: str) -> None:
    """The state folder is the service's, and the script is root."""
    root, victim = tmp_path / "root", tmp_path / "victim"
    victim.write_text("root's own\n")
    victim.chmod(0o640)
    state = root / "var/lib/fedprune"
    state.mkdir(parents=True)
    for name in ("claim", "claim.new", ".claim.partial"):
        (state / name).symlink_to(victim)
    done = run_join_script(root, site, kit.digest, "--root", str(root), claim=CLAIM)
    assert done.returncode == 0, done.stderr
    assert (victim.read_text(), victim.stat().st_mode & 0o777) == ("root's own\n", 0o640)
    assert not (state / "claim").is_symlink()
    assert (state / "claim").read_text() == CLAIM


@pytest.mark.parametrize("stuck", ["kit.json", "install.pyz"])
def test_a_script_that_is_interrupted_leaves_nothing(tmp_path: Path, kit: Kit, stuck: str) -> None:
    root, begun = tmp_path / "root", threading.Event()
    with serve_folder(tmp_path, partial(Endless, stuck=stuck, begun=begun)) as url:
        words = (f"{url}/{kit.folder.name}", kit.digest, "--root", str(root))
        done = run_join_script(root, *words, claim=CLAIM, stop=(begun, signal.SIGINT))
    assert (done.returncode, begun.is_set()) == (ExitCode.INTERRUPTED, True)
    assert list(root.iterdir()) == []


Damage = Callable[[Path], object]
DAMAGE: dict[str, tuple[Damage, ExitCode, str]] = {
    "another installer": (lambda kit: (kit / "install.pyz").write_text("open('never', 'x')"), ExitCode.KIT, "damaged"),
    "another manifest": (lambda kit: (kit / "kit.json").write_text("{}"), ExitCode.KIT, "another digest"),
    "an endless manifest": (lambda kit: os.truncate(kit / "kit.json", 2**23), ExitCode.KIT, "more than 4194304 bytes"),
    "no installer": (lambda kit: (kit / "install.pyz").unlink(), ExitCode.BROKER, "can't fetch"),
}


@pytest.mark.parametrize(("damage", "code", "message"), DAMAGE.values(), ids=DAMAGE)
def test_nothing_that_the_digest_does_not_cover_is_run(
    tmp_path: Path, kit: Kit, site: str, damage: Damage, code: ExitCode, message: str
) -> None:
    damage(kit.folder)
    root = tmp_path / "root"
    done = run_join_script(root, site, kit.digest, "--root", str(root), claim=CLAIM)
    assert done.returncode == code
    assert message in done.stderr
    assert not list(tmp_path.rglob("never"))
    assert list(root.iterdir()) == []


def test_a_kit_with_a_claim_is_not_for_a_web_server(tmp_path: Path, make_kit: Callable[..., Kit]) -> None:
    kit = make_kit("claimed", claim=CLAIM)
    with serve_folder(tmp_path) as url:
        done = run_join_script(tmp_path / "root", f"{url}/claimed", kit.digest)
    assert (done.returncode, "has a claim" in done.stderr) == (ExitCode.KIT, True)


@pytest.mark.parametrize(
    "words",
    [
        ("https://fleet.example/kit",),
        ("http://fleet.example/kit", "0" * 64),
        ("http://localhost:x@fleet.example/kit", "0" * 64),
        ("http://127.0.0.1.fleet.example/kit", "0" * 64),
    ],
)
def test_a_wrong_line_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert run_join_script(tmp_path / "root", *words).returncode == ExitCode.USAGE


def test_a_script_that_was_cut_off_does_nothing(tmp_path: Path, kit: Kit, site: str) -> None:
    root, script = tmp_path / "root", SCRIPT.read_bytes()
    for length in (len(script) // 4, len(script) // 2, len(script) - len(b'main "$@"\n')):
        run_join_script(root, site, kit.digest, "--root", str(root), script=script[:length])
        assert list(root.iterdir()) == []


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, *(ROOT / "deploy").rglob("*.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
