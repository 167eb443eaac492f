from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny_wheels
from fedprune.errors import ExitCode
from fedprune_flash import BoardFile, Kit, Target, build_kit, installer

pytestmark = pytest.mark.system

CLAIM = "one-time-claim"
MakeKit = Callable[..., Kit]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A kit with a claim, which no test may change."""
    board = BoardFile("mqtts://broker.example:8883", "attic", "lab")
    here = Target(f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine())
    out = tmp_path_factory.mktemp("whole") / "kit"
    own = next(wheels.glob("fedprune-*"))
    return build_kit(out, board, here, wheel=own, links=[wheels], claim=CLAIM).folder


@pytest.fixture
def kit(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "kit"))


def run(kit: Path, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The installer as a board runs it, without what this environment would add."""
    return subprocess.run(
        [sys.executable, "-I", str(kit / "install.py"), "--root", str(root), *options],
        capture_output=True,
        text=True,
        check=False,
    )


def program(root: Path, *arguments: str) -> str:
    """What the installed command says."""
    command = [str(root / "opt/fedprune/bin/fedprune-device"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={}).stdout


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file's permissions, time of change and content; what programs compile as they run is left out."""
    return {
        str(p.relative_to(folder)): (
            p.lstat().st_mode,
            p.lstat().st_mtime_ns,
            b"" if p.is_symlink() else p.read_bytes(),
        )
        for p in sorted(folder.rglob("*"))
        if not p.is_dir() and "__pycache__" not in p.parts
    }


def test_a_board_is_installed_and_a_second_run_changes_nothing(kit: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    done = run(kit, root)
    assert done.returncode == 0, done.stderr

    settings = root / "etc/fedprune"
    assert (settings / "board.env").read_text() == "FEDPRUNE_BROKER=mqtts://broker.example:8883\n"
    assert (settings / "claim").read_text() == CLAIM
    assert (settings / "claim").stat().st_mode & 0o777 == 0o400
    assert not (kit / "claim.txt").exists()
    unit = root / "etc/systemd/system/fedprune.service"
    assert unit.read_bytes() == (kit / "fedprune.service").read_bytes()
    assert (unit.parent / "multi-user.target.wants/fedprune.service").readlink() == Path(
        "/etc/systemd/system/fedprune.service"
    )
    assert program(root, "x") == "fedprune x\n"

    before = snapshot(root)
    again = run(kit, root)
    assert again.returncode == 0, again.stderr
    assert "now:" not in again.stdout
    assert snapshot(root) == before


def test_a_dry_run_says_every_step_with_its_reverse_and_does_none(kit: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    before = snapshot(kit)
    done = run(kit, root, "--dry-run")
    assert done.returncode == 0, done.stderr
    would = [line for line in done.stdout.splitlines() if line.startswith("would: ")]
    assert all("(undone by: " in line for line in would)
    assert [next(w for w in ("wheels", "board.env", "claim", "service") if w in line) for line in would] == [
        "wheels",
        "board.env",
        "claim",
        "service",
    ]
    assert not list(root.iterdir())
    assert snapshot(kit) == before


def test_removal_is_the_reverse_and_keeps_what_was_learnt(kit: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "var/lib/fedprune").mkdir(parents=True)
    (root / "var/lib/fedprune/offer.json").write_text("learnt")
    before = snapshot(root)
    assert run(kit, root).returncode == 0
    assert run(kit, root, "--remove").returncode == 0
    assert snapshot(root) == before
    assert run(kit, root, "--remove").returncode == 0


def killed_after(kit: Path, root: Path, word: str) -> str:
    """Start the installer, and kill it and its children when it has said a word."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(kit / "install.py"), "--root", str(root)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said = ""
    out = process.stdout
    assert out is not None
    with out:
        for line in out:
            said += line
            if word in line:
                break
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return said


@pytest.mark.parametrize("word", ["wheels", "board.env", "claim", "service"])
def test_a_run_that_was_killed_is_gone_on_with(kit: Path, tmp_path: Path, word: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert word in killed_after(kit, root, word)
    done = run(kit, root)
    assert done.returncode == 0, done.stderr
    assert (root / "etc/fedprune/claim").read_text() == CLAIM
    assert not (kit / "claim.txt").exists()
    assert (root / "etc/systemd/system/multi-user.target.wants/fedprune.service").is_symlink()
    assert program(root) == "fedprune\n"


def test_half_an_environment_is_made_anew(kit: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert run(kit, root).returncode == 0
    home = root / "opt/fedprune"
    (home / installer.MARKER).unlink()
    shutil.rmtree(home / "lib")
    done = run(kit, root)
    assert done.returncode == 0, done.stderr
    assert "now: install the kit's" in done.stdout
    assert program(root) == "fedprune\n"


def test_a_newer_kit_replaces_an_older_one(make_kit: MakeKit, tmp_path: Path, wheels: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert run(make_kit("old").folder, root).returncode == 0
    links = tmp_path / "links"
    shutil.copytree(wheels, links)
    (links / "numpy-2.0-py3-none-any.whl").unlink()
    tiny_wheels.wheel(links, "numpy", "2.1")
    done = run(make_kit("new", links=[links]).folder, root)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in root.glob("opt/fedprune/lib/*/site-packages/numpy-*")} == {"numpy-2.1.dist-info"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("python", "3.9", "this kit is for Python 3.9"), ("architecture", "riscv64", "this kit is for riscv64")],
)
def test_a_kit_for_another_board_is_refused(kit: Path, tmp_path: Path, key: str, value: str, words: str) -> None:
    body = json.loads((kit / "kit.json").read_text())
    body[key] = value
    (kit / "kit.json").write_text(json.dumps(body))
    done = run(kit, tmp_path / "root")
    assert done.returncode == ExitCode.KIT
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(
            (name, how)
            for name in ("board.env", "wheelhouse/numpy-2.0-py3-none-any.whl")
            for how in ("damaged", "missing")
        ),
        ("claim.txt", "damaged"),  # one that is gone was handed over
    ],
)
def test_a_damaged_kit_installs_nothing(kit: Path, tmp_path: Path, name: str, how: str) -> None:
    path = kit / name
    path.write_bytes(path.read_bytes() + b"x") if how == "damaged" else path.unlink()
    root = tmp_path / "root"
    root.mkdir()
    done = run(kit, root)
    assert done.returncode == ExitCode.KIT
    assert name in done.stderr
    assert not list(root.iterdir())


@pytest.mark.parametrize("raw", ["", "[]", "{}", '{"files": 1}', '{"files": [{}], "data": "", "python": "3"}', "\0"])
def test_a_manifest_that_is_none_is_one_line(kit: Path, tmp_path: Path, raw: str) -> None:
    (kit / "kit.json").write_text(raw)
    done = run(kit, tmp_path / "root")
    assert done.returncode == ExitCode.KIT
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def crashing(tmp_path: Path, wheels: Path) -> Iterator[Path]:
    """Wheels whose onnxruntime dies of an instruction that the processor lacks."""
    links = tmp_path / "links"
    shutil.copytree(wheels, links)
    (links / "onnxruntime-1.31-py3-none-any.whl").unlink()
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    tiny_wheels.wheel(links, "onnxruntime", "1.21", {"onnxruntime/__init__.py": code})
    return links


def test_a_wheel_that_the_processor_cannot_run_is_said_so(make_kit: MakeKit, tmp_path: Path, crashing: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    done = run(make_kit(links=[crashing]).folder, root)
    assert done.returncode == ExitCode.RUNTIME
    assert "onnxruntime uses instructions that this processor lacks" in done.stderr
    assert not (root / "opt/fedprune" / installer.MARKER).exists()


def test_a_jetsons_environment_sees_the_boards_own_packages(kit: Path, tmp_path: Path) -> None:
    body = json.loads((kit / "kit.json").read_text())
    body["jetson"] = True
    (kit / "kit.json").write_text(json.dumps(body))
    root = tmp_path / "root"
    root.mkdir()
    assert run(kit, root).returncode == 0
    assert "include-system-site-packages = true" in (root / "opt/fedprune/pyvenv.cfg").read_text()


def test_the_exit_codes_are_those_of_all_commands() -> None:
    for name in ("USAGE", "STORAGE", "RUNTIME", "KIT"):
        assert getattr(installer, name) == ExitCode[name]
    assert installer.FULL == ExitCode.STORAGE_FULL


def test_the_installer_runs_on_every_python_that_kits_are_for(tmp_path: Path) -> None:
    source = Path(installer.__file__).read_text()
    pythons = sorted((Path.home() / ".pyenv/versions").glob("3.1[0-3].*/bin/python"))
    if not pythons:
        pytest.skip("no other Python here")
    copy = tmp_path / "install.py"
    copy.write_text(source)
    for python in pythons:
        done = subprocess.run([python, "-I", str(copy), "--dry-run"], capture_output=True, text=True, check=False)
        assert (done.returncode, "kit.json" in done.stderr) == (ExitCode.KIT, True), (python, done.stderr)


def test_only_root_installs_for_real(kit: Path) -> None:
    if platform.system() != "Linux" or os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
        if not shutil.which("setpriv"):
            pytest.skip("setpriv is not installed")
    else:
        command = [sys.executable]
    for path in (kit, *kit.parents):
        if path.owner() == "root" and path != Path("/") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    done = subprocess.run([*command, "-I", str(kit / "install.py")], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert "sudo" in done.stderr
