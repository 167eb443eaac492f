import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune.security.keys import SigningKey
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_device.launcher.state import LauncherState
from fedprune_device.releases.installer import ReleaseInstaller
from fedprune_flash import BoardSettings, BoardTarget, Kit, build_kit
from fedprune_flash.on_board.board_system import FIRST_BOOT_UNIT
from fedprune_flash.on_board.kit_folder import KitFolder
from fedprune_flash.on_board.runtime_slot import RuntimeSlot
from support.fakes import tiny_wheels
from support.fakes.runtime_releases import CLAIM, KEY, PUBLIC, make_release, source
from support.fakes.signed_kits import change, sign
from support.faults.power_cuts import EACH_KIND, CutError, cuts, power
from support.processes.ssh_boards import SYSTEMCTL

pytestmark = pytest.mark.system

MakeKit = Callable[..., Kit]


@pytest.fixture(scope="module")
def intact_kit(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A kit with a claim, which no test may change."""
    board = BoardSettings("mqtts://broker.example:8883", "attic", "lab")
    here = BoardTarget(f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine())
    out = tmp_path_factory.mktemp("intact") / "kit"
    fedprune_wheel = next(wheels.glob("fedprune-*"))
    return build_kit(out, board, here, wheel=fedprune_wheel, links=[wheels], claim=CLAIM, signer=KEY).folder


@pytest.fixture
def kit(intact_kit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact_kit, tmp_path / "kit"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the file system of a board begins."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def run(kit: Path, root: Path, *options: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """The installer as a board runs it, without what this environment would add."""
    return subprocess.run(
        [python, "-I", str(kit / "install.pyz"), "--root", str(root), *options],
        capture_output=True,
        text=True,
        check=False,
    )


def program(root: Path, *arguments: str) -> str:
    """What the installed command says."""
    command = [sys.executable, str(root / "opt/fedprune/launcher.pyz"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={}).stdout


def home(root: Path) -> SlotStore:
    return SlotStore(root / "opt/fedprune")


def serving(root: Path) -> str:
    """What the release is called that starts."""
    return home(root).checked_record(home(root).load().stable).name


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


def test_a_board_is_installed_and_a_second_run_changes_nothing(kit: Path, root: Path) -> None:
    done = run(kit, root)
    assert done.returncode == 0, done.stderr
    rows = "FEDPRUNE_BROKER=mqtts://broker.example:8883\nFEDPRUNE_SITE=lab\nFEDPRUNE_DEVICE=attic\n"
    assert (root / "etc/fedprune/device.env").read_text() == rows
    claim = root / "var/lib/fedprune/claim"
    assert claim.read_text() == CLAIM
    assert claim.stat().st_mode & 0o777 == 0o400
    assert not (kit / "claim.txt").exists()
    unit = root / "etc/systemd/system/fedprune.service"
    assert unit.read_bytes() == (kit / "fedprune.service").read_bytes()
    assert (unit.parent / "multi-user.target.wants/fedprune.service").readlink() == Path(
        "/etc/systemd/system/fedprune.service"
    )
    assert program(root, "x") == "fedprune x\n"
    assert home(root).load() == LauncherState("a", highest=0, sequence=1)
    record = home(root).checked_record("a")
    assert (record.version, record.entry) == (0, "fedprune_start:device")
    assert not any(name.startswith("pip") for name in record.files)
    before = snapshot(root)
    second_run = run(kit, root)
    assert second_run.returncode == 0, second_run.stderr
    assert "now:" not in second_run.stdout
    assert snapshot(root) == before


def test_a_claim_comes_from_a_file_unless_the_board_has_joined(make_kit: MakeKit, root: Path, tmp_path: Path) -> None:
    kit, file, claim = make_kit().folder, tmp_path / "attic.claim", root / "var/lib/fedprune/claim"
    text = f"{CLAIM.lower()}@attic"
    file.write_text(text + "\n")
    assert run(kit, root, "--claim", str(file)).returncode == 0
    assert (claim.read_text(), claim.stat().st_mode & 0o777) == (text, 0o400)
    claim.unlink()
    (root / "var/lib/fedprune/identity").mkdir()
    (root / "var/lib/fedprune/identity/tls.key").touch()
    second_run = run(kit, root, "--claim", str(file))
    assert (second_run.returncode, "now:" in second_run.stdout, claim.exists()) == (0, False, False)


def test_what_is_no_claim_is_refused_before_anything_is_written(make_kit: MakeKit, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "attic.claim"
    kit = make_kit().folder
    for text in (CLAIM[:-1], f"{CLAIM}@barn", f"{CLAIM}@attic\n{CLAIM}@barn\n"):
        file.write_text(text)
        done = run(kit, root, "--claim", str(file))
        assert CLAIM[:12] not in done.stderr
        assert (done.returncode, done.stderr.count("\n"), list(root.iterdir())) == (ExitCode.JOIN, 1, [])


def test_removal_is_the_reverse_and_keeps_what_was_learnt(kit: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "var/lib/fedprune").mkdir(parents=True)
    (root / "var/lib/fedprune/offer.json").write_text("learnt")
    before = snapshot(root)
    assert run(kit, root).returncode == 0
    assert run(kit, root, "--remove").returncode == 0
    left = snapshot(root)
    assert left.pop("var/lib/fedprune/claim")[2] == CLAIM.encode()
    assert left == before
    second_run = run(kit, root, "--remove")
    assert (second_run.returncode, "now:" in second_run.stdout) == (0, False)
    assert run(kit, root, "--remove", "--purge").returncode == 0
    assert snapshot(root) == {}
    assert run(kit, root, "--purge").returncode == ExitCode.USAGE


def killed_after(kit: Path, root: Path, word: str) -> None:
    """Start the installer, and kill it and its children when it has said a word."""
    command = [sys.executable, "-I", str(kit / "install.pyz"), "--root", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert any(word in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("word", ["wheels", "claim", "service"])
def test_a_run_that_was_killed_is_gone_on_with(kit: Path, root: Path, word: str) -> None:
    killed_after(kit, root, word)
    done = run(kit, root)
    assert done.returncode == 0, done.stderr
    assert (root / "var/lib/fedprune/claim").read_text() == CLAIM
    assert not (kit / "claim.txt").exists()
    assert (root / "etc/systemd/system/multi-user.target.wants/fedprune.service").is_symlink()
    assert program(root) == "fedprune\n"


@pytest.mark.parametrize("lost", ["a/fedprune_start/__init__.py", "state"])
def test_what_is_lost_of_an_installation_is_made_anew(kit: Path, root: Path, lost: str) -> None:
    assert run(kit, root).returncode == 0
    path = root / "opt/fedprune" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = run(kit, root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("now:") == (2 if lost == "state" else 1), done.stdout
    assert program(root) == "fedprune\n"


def update(root: Path, folder: Path, number: int) -> ReleaseInstaller:
    """Install a release of the server's on a board, and let its trial succeed."""
    installer = ReleaseInstaller(root / "opt/fedprune", PUBLIC)
    installer.stage(source(make_release(folder / f"release {number}", number)))
    with installer.home.lock_state():
        installer.home.save(installer.home.load().commit())
    return installer


def newer(make_kit: MakeKit, tmp_path: Path, wheels: Path) -> Path:
    """A kit with a newer numpy."""
    links = tmp_path / "links"
    shutil.copytree(wheels, links)
    (links / "numpy-2.0-py3-none-any.whl").unlink()
    tiny_wheels.wheel(links, "numpy", "2.1")
    return make_kit("new", links=[links]).folder


def test_a_kit_for_many_boards_is_given_each_board_s_name(make_kit: MakeKit, root: Path) -> None:
    kit, environment = make_kit().folder, root / "etc/fedprune/device.env"
    for name in ("all", "a b", "../x", "a\nFEDPRUNE_SITE=x"):
        assert run(kit, root, "--device", name).returncode == ExitCode.USAGE
    assert not list(root.iterdir())

    assert run(kit, root, "--device", "cellar").returncode == 0

    assert environment.read_text() == "".join(
        f"FEDPRUNE_{row}\n" for row in ("BROKER=mqtts://broker.example:8883", "SITE=lab", "DEVICE=cellar")
    )
    before = snapshot(root)
    second_run = run(kit, root, "--device", "cellar")
    assert (second_run.returncode, "now:" in second_run.stdout) == (0, False)
    mixed_up = run(kit, root, "--device", "shed")
    assert (mixed_up.returncode, "cellar" in mixed_up.stderr) == (ExitCode.BOARD, True)
    assert snapshot(root) == before


def test_links_in_the_slots_are_not_followed(make_kit: MakeKit, tmp_path: Path, wheels: Path) -> None:
    """They belong to the service's user, and the installer is root."""
    root, mine = tmp_path / "root", tmp_path / "mine"
    root.mkdir()
    assert run(make_kit("old").folder, root).returncode == 0
    mine.mkdir()
    (mine / "kept").write_text("mine")
    opt = root / "opt/fedprune"
    (opt / "b/numpy").symlink_to(mine)
    (opt / "state/.b.json.new").symlink_to(mine / "kept")
    assert run(newer(make_kit, tmp_path, wheels), root).returncode == 0
    assert {p.name: p.read_text() for p in mine.iterdir()} == {"kept": "mine"}


OTHER_KEY = SigningKey.make()
WHEEL = "wheelhouse/numpy-2.0-py3-none-any.whl"


def swap_wheel(kit: Path) -> None:
    """Another wheel, of which the manifest has the right digest."""
    (kit / WHEEL).write_bytes(b"another")
    files = json.loads((kit / "kit.json").read_text())["files"]
    digest = hashlib.sha256(b"another").hexdigest()
    change(kit, files=[{**row, "sha256": digest, "bytes": 7} if row["path"] == WHEEL else row for row in files])


def link_folder(kit: Path) -> None:
    (kit / "wheelhouse").rename(kit.parent / "elsewhere")
    (kit / "wheelhouse").symlink_to(kit.parent / "elsewhere")


def lead_outside(kit: Path) -> None:
    files = json.loads((kit / "kit.json").read_text())["files"]
    sign(kit, files=[*files, {"path": "../x", "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}])


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a wheel with its digest": (swap_wheel, "not what was signed"),
    "no signature": (lambda kit: change(kit, signature=""), "the kit is not signed"),
    "an added file": (lambda kit: (kit / "wheelhouse/more.whl").write_bytes(b""), "is not part of the kit"),
    "a linked folder": (link_folder, "isn't a plain file"),
    "a path that leads outside": (lead_outside, "isn't a path of a kit"),
    "no manifest": (lambda kit: (kit / "kit.json").write_text("[]"), "error: "),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_a_kit_that_somebody_changed_installs_nothing(
    kit: Path, root: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(kit)
    done = run(kit, root)
    assert done.returncode == ExitCode.KIT
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(root.iterdir())


@pytest.mark.parametrize("where", ["opt/fedprune/server.pub", "var/lib/fedprune/identity/server.pub", "--key"])
def test_a_kit_of_another_server_is_refused_by_a_board_that_knows_its_own(
    kit: Path, tmp_path: Path, where: str
) -> None:
    root = tmp_path / "root"
    key_file = tmp_path / "given" if where == "--key" else root / where
    key_file.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(exist_ok=True)
    key_file.write_text(OTHER_KEY.verifying_key.hex)
    key_option = ["--key", str(key_file)] if where == "--key" else []
    before = snapshot(root)
    done = run(kit, root, *key_option)
    assert done.returncode == ExitCode.KIT
    assert f"expected key {OTHER_KEY.verifying_key.fingerprint}, got key {PUBLIC.fingerprint}" in done.stderr
    assert snapshot(root) == before
    key_file.write_text(PUBLIC.hex)
    assert run(kit, root, *key_option).returncode == 0
    assert (root / "opt/fedprune/server.pub").read_text() == PUBLIC.hex


def test_a_key_that_the_operator_names_takes_the_place_of_the_boards(kit: Path, root: Path) -> None:
    assert run(kit, root).returncode == 0
    sign(kit, OTHER_KEY)
    assert run(kit, root).returncode == ExitCode.KIT
    assert run(kit, root, "--key", "no key").returncode == ExitCode.KIT
    assert run(kit, root, "--key", OTHER_KEY.verifying_key.hex).returncode == 0
    assert (root / "opt/fedprune/server.pub").read_text() == OTHER_KEY.verifying_key.hex
    assert program(root, "x") == "fedprune x\n"


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.soak
def test_the_power_may_fail_while_a_board_changes_its_server(
    kit: Path, tmp_path: Path, wheels: Path, kind: str, make_kit: MakeKit
) -> None:
    before, root = tmp_path / "before", tmp_path / "root"
    before.mkdir()
    assert run(make_kit("old").folder, before).returncode == 0
    kit = newer(make_kit, tmp_path, wheels)
    sign(kit, OTHER_KEY)

    def install() -> None:
        runtime = RuntimeSlot(KitFolder(kit), root / "opt/fedprune", sys.executable, None, OTHER_KEY.verifying_key.raw)
        if not runtime.is_laid_out:
            runtime.lay_out()
        if not runtime.is_filled:
            runtime.fill()

    shutil.copytree(before, root, symlinks=True)
    with power() as supply:
        install()
    assert supply.count > 40
    for at, how in cuts(kind, supply.names):
        if 4 < at <= supply.count - 16:  # in between the wheels' files are written, of which no record tells
            continue
        shutil.rmtree(root)
        shutil.copytree(before, root, symlinks=True)
        with power(at, how), pytest.raises(CutError):
            install()
        assert program(root, "x") == "fedprune x\n", (at, how)
        install()
        assert program(root, "x") == "fedprune x\n", (at, how)
        assert serving(root) == KitFolder(kit).runtime
        assert (root / "opt/fedprune/server.pub").read_text() == OTHER_KEY.verifying_key.hex


@pytest.mark.parametrize("what", ["fifo", "link"])
def test_root_reads_no_key_through_what_the_service_put_there(kit: Path, tmp_path: Path, what: str) -> None:
    key, descriptor = tmp_path / "root/var/lib/fedprune/identity/server.pub", None
    key.parent.mkdir(parents=True)
    if what == "fifo":
        os.mkfifo(key)
        descriptor = os.open(key, os.O_RDWR)  # its maker may hold it open, and write nothing
    else:
        (tmp_path / "elsewhere").write_text(OTHER_KEY.verifying_key.hex)
        key.symlink_to(tmp_path / "elsewhere")
    done = run(kit, tmp_path / "root")
    if descriptor is not None:
        os.close(descriptor)
    assert (done.returncode, "the server's key" in done.stderr) == (ExitCode.KIT, True)


def test_a_kit_that_is_not_signed_needs_to_be_asked_for(make_kit: MakeKit, kit: Path, tmp_path: Path) -> None:
    root, plain = tmp_path / "root", make_kit("plain", signer=None).folder
    root.mkdir()
    assert "the kit is not signed" in run(plain, root).stderr
    assert not list(root.iterdir())
    done = run(plain, root, "--unsigned")
    assert done.returncode == 0, done.stderr
    assert "not signed" in done.stdout.splitlines()
    assert program(root, "x") == "fedprune x\n"
    assert not (root / "opt/fedprune/server.pub").exists()
    assert run(kit, root).returncode == 0, "a signed one of the same wheels is installed over it"
    assert program(root, "x") == "fedprune x\n"
    done = run(plain, root, "--unsigned")
    assert done.returncode == ExitCode.KIT
    assert "starts only what its server has signed" in done.stderr
    assert [run(plain, root, option).returncode for option in ("--remove", "--unsigned")] == [0, 0]


@pytest.fixture
def jetson_kit(make_kit: MakeKit, tmp_path: Path, wheels: Path) -> Path:
    """A kit for a Jetson, but for this processor."""
    links = tmp_path / "links"
    shutil.copytree(wheels, links)
    (links / "onnxruntime-1.31-py3-none-any.whl").unlink()
    target = BoardTarget(f"{sys.version_info[0]}.{sys.version_info[1]}", jetson=True)
    folder = make_kit("jetson-kit", target=target, links=[links]).folder
    sign(folder, architecture=platform.machine())
    return folder


def jetson(tmp_path: Path, **versions: str) -> tuple[Path, str]:
    """A root that looks like a Jetson's, and a Python that has these packages of its own."""
    root, packages = tmp_path / "root", tmp_path / "packages"
    (root / "etc").mkdir(parents=True)
    (root / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    for name, version in versions.items():
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(f"__version__ = {version!r}\nTHE_BOARDS_OWN = True\n")
    binary = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(binary)], check=True)
    (site,) = binary.glob("lib/*/site-packages")
    (site / "own.pth").write_text(f"{packages}\n")
    return root, str(binary / "bin/python")


def test_a_jetson_computes_with_its_own_packages(jetson_kit: Path, tmp_path: Path) -> None:
    root, python = jetson(tmp_path, numpy="1.26.4", onnxruntime="1.23.2")
    done = run(jetson_kit, root, python=python)
    assert done.returncode == 0, done.stderr
    there = {path.split("/")[0].split("-")[0] for path in home(root).checked_record("a").files}
    assert there == {"fedprune", "fedprune_device", "fedprune_start", "pillow"}
    unit = (root / "etc/systemd/system/fedprune.service").read_text().splitlines()
    assert "SupplementaryGroups=video render" in unit
    assert "PrivateDevices=yes" not in unit


@pytest.mark.parametrize(("reason", "note"), [("no kernels for 8.7", "isn't used: no kernels for 8.7"), ("", "")])
def test_a_jetson_whose_gpu_does_not_compute_is_installed_with_a_note(
    make_kit: MakeKit, tmp_path: Path, reason: str, note: str
) -> None:
    probe = (
        "from types import SimpleNamespace\n"
        "def probe(seconds, layer_seconds, cuda):\n"
        f"    return SimpleNamespace(cpu_reason={reason!r} if cuda else 'the processor was measured')\n"
    )
    links = tmp_path / "links"
    fleet_wheel = tiny_wheels.fleet_of_wheels(links, jetson=True, files={"fedprune_device/hardware/probe.py": probe})
    root, python = jetson(tmp_path, numpy="1.26.4", onnxruntime="1.31.1")
    target = BoardTarget(f"{sys.version_info[0]}.{sys.version_info[1]}", jetson=True)
    folder = make_kit("noted-kit", target=target, links=[links], wheel=fleet_wheel).folder
    sign(folder, architecture=platform.machine())

    done = run(folder, root, python=python)

    assert done.returncode == 0, done.stderr
    assert ("note:" in done.stdout) is bool(note)
    assert note in done.stdout


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"numpy": "1.26.4"}, "onnxruntime can't be loaded"),
        ({"numpy": "1.21.5", "onnxruntime": "1.23.2"}, "the board's own numpy: expected 1.23 or newer"),
    ],
)
def test_a_jetson_that_lacks_its_packages_is_said_so(
    jetson_kit: Path, tmp_path: Path, versions: dict[str, str], words: str
) -> None:
    root, python = jetson(tmp_path, **versions)
    done = run(jetson_kit, root, python=python)
    assert done.returncode == ExitCode.RUNTIME
    assert words in done.stderr
    assert home(root).load() is None


def test_kits_of_jetsons_and_of_other_boards_are_not_mixed_up(kit: Path, jetson_kit: Path, tmp_path: Path) -> None:
    root, _ = jetson(tmp_path)
    done = run(kit, root)
    assert (done.returncode, "this board is one" in done.stderr) == (ExitCode.KIT, True), done.stderr
    (tmp_path / "other").mkdir()
    done = run(jetson_kit, tmp_path / "other")
    assert (done.returncode, "this board is no Jetson" in done.stderr) == (ExitCode.KIT, True), done.stderr


def test_only_root_installs_for_real(kit: Path) -> None:
    # Not below pytest's own folder: whenever another pytest starts, it shuts out all other users from there.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        readable = shutil.copytree(kit, Path(folder) / "kit")
        for path in (readable, *readable.rglob("*")):
            path.chmod(path.stat().st_mode | 0o055)
        command = [sys.executable, "-I", str(readable / "install.pyz")]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "sudo" in done.stderr) == (ExitCode.USAGE, True), done.stderr


def with_service(root: Path) -> Path:
    """Give a board a systemctl; returns the file that is there while its service runs."""
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/systemctl").write_text(SYSTEMCTL)
    (root / "usr/bin/systemctl").chmod(0o755)
    return root / "run/up"


def test_a_kit_that_fails_leaves_a_board_running(make_kit: MakeKit, tmp_path: Path, wheels: Path) -> None:
    root = tmp_path / "root"
    up = with_service(root)
    assert run(make_kit("good").folder, root).returncode == 0
    assert up.exists()
    before = home(root).load()
    # An onnxruntime that dies of an instruction that the processor lacks.
    links = tmp_path / "links"
    shutil.copytree(wheels, links)
    (links / "onnxruntime-1.31-py3-none-any.whl").unlink()
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    tiny_wheels.wheel(links, "onnxruntime", "1.21", {"onnxruntime/__init__.py": code})
    bad = make_kit("bad", links=[links]).folder
    done = run(bad, root)
    assert (done.returncode, "onnxruntime" in done.stderr) == (ExitCode.RUNTIME, True)
    assert "stop fedprune.service" in (root / "run/calls").read_text()
    assert up.exists(), "what was stopped for it is started again"
    assert (home(root).load(), program(root)) == (before, "fedprune\n")
    assert not list((root / "opt/fedprune/b").iterdir())
    up.unlink()
    assert run(bad, root).returncode == ExitCode.RUNTIME
    assert not up.exists(), "what was down stays down"
    assert run(make_kit("again").folder, root).returncode == 0


def test_nothing_is_written_while_a_service_cannot_be_stopped(make_kit: MakeKit, tmp_path: Path, wheels: Path) -> None:
    root = tmp_path / "root"
    up = with_service(root)
    assert run(make_kit("old").folder, root).returncode == 0
    (root / "run/stubborn").touch()
    before = snapshot(root / "opt")
    done = run(newer(make_kit, tmp_path, wheels), root)
    assert (done.returncode, "systemctl failed" in done.stderr) == (ExitCode.STORAGE, True)
    assert up.exists()
    assert snapshot(root / "opt") == before


@pytest.mark.parametrize("kind", EACH_KIND)
def test_the_power_may_fail_while_a_claim_is_overwritten(kit: Path, tmp_path: Path, kind: str) -> None:
    root, cut = tmp_path / "root", tmp_path / "cut"
    root.mkdir()
    assert run(Path(shutil.copytree(kit, tmp_path / "first")), root).returncode == 0
    shutil.copytree(kit, tmp_path / "calm")
    with power() as supply:
        KitFolder(tmp_path / "calm").overwrite_claim()
    assert supply.count >= 5
    for at, how in cuts(kind, supply.names):
        shutil.copytree(kit, cut)
        with power(at, how), pytest.raises(CutError):
            KitFolder(cut).overwrite_claim()
        done = run(cut, root)
        assert done.returncode == 0, (at, done.stderr)
        assert (root / "var/lib/fedprune/claim").read_text() == CLAIM
        assert not [p for p in cut.iterdir() if "claim" in p.name], at
        shutil.rmtree(cut)


def test_a_release_of_the_server_stays_though_the_launchers_state_is_lost(
    make_kit: MakeKit, root: Path, tmp_path: Path, wheels: Path
) -> None:
    assert run(make_kit("old").folder, root).returncode == 0
    for number in (1, 2):
        updater = update(root, tmp_path, number)
    for name in ("state.json", "copy.json"):
        (updater.home.folder / name).write_bytes(b"")
    before = {slot: updater.home.checked_record(slot) for slot in "ab"}
    done = run(newer(make_kit, tmp_path, wheels), root)
    assert done.returncode == 0, done.stderr
    assert "newer than the kit's" in done.stdout
    assert {slot: updater.home.checked_record(slot) for slot in "ab"} == before


def test_a_state_folder_that_is_a_link_is_said_so_and_not_purged(kit: Path, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "var/lib").mkdir(parents=True)
    elsewhere.mkdir()
    (root / "var/lib/fedprune").symlink_to(elsewhere)
    assert run(kit, root).returncode == 0
    done = run(kit, root, "--remove", "--purge")
    assert done.returncode == ExitCode.STORAGE
    assert f"var/lib/fedprune is a link to {elsewhere}" in done.stderr
    assert (elsewhere / "claim").exists()


def test_what_is_removed_from_an_image_does_not_come_back_at_the_next_boot(kit: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    unit = root / FIRST_BOOT_UNIT.lstrip("/")
    unit.parent.mkdir(parents=True)
    unit.touch()
    assert run(kit, root).returncode == 0
    assert run(kit, root, "--remove").returncode == 0
    assert (root / "etc/systemd/system" / unit.name).readlink() == Path("/dev/null")
