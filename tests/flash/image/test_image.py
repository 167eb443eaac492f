import gzip
import lzma
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from fedprune.core.errors import ExitCode
from fedprune.security.keys import SigningKey
from fedprune_flash import BoardTarget, Kit
from fedprune_flash.cli import main as cli
from support.fakes.runtime_releases import CLAIM, KEY
from support.processes.disk_images import SECTOR, fsck_fat, make_image, mlist, mtype, run, tool
from support.processes.machine import confining_command

pytestmark = pytest.mark.system

Capture = pytest.CaptureFixture[str]
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
MACHINES = {"x86_64": 0x3E, "aarch64": 0xB7, "armhf": 0x28}
CMDLINE = "console=tty1 root=PARTUUID=5eedf00d-02 rootfstype=ext4 rootwait"
SSID, PHRASE = 'Küche "5" \\ #1 😀', "correct horse battery"

BOOTS: dict[str, dict[str, str]] = {
    "cloud-init": {
        "cmdline.txt": f"{CMDLINE} resize ds=nocloud;i=rpios-image\n",
        "user-data": "#cloud-config\n# hostname: x\nssh_pwauth: false\n",
        "meta-data": "dsmode: local\ninstance_id: rpios-image\n",
        "network-config": "network:\n  version: 2\n  ethernets:\n    eth0:\n      dhcp4: true\n#  wifis:\n",
    },
    "firstrun": {"cmdline.txt": f"{CMDLINE} quiet init=/usr/lib/raspberrypi-sys-mods/firstboot\n"},
    "preseed": {"cmdline.txt": f"{CMDLINE} resize\n", "rpi-preseed.toml": "# nothing yet\n"},
}
CHANGED = {
    "cloud-init": {"cmdline.txt", "user-data", "meta-data", "network-config"},
    "firstrun": {"cmdline.txt", "fedprune-firstrun.sh"},
    "preseed": {"rpi-preseed.toml"},
}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ssh") / "id"
    subprocess.run(
        [tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "o'neill $HOME", "-f", str(path)], check=True
    )
    KEY.save(path.with_name("signing.key"))
    return path.with_suffix(".pub")


def make_root(folder: Path, python: str = HERE, machine: str = "", mount: str = "/boot/firmware") -> Path:
    """A root file system's few files that tell what it is."""
    for name in ("etc", "usr/lib", "usr/bin"):
        (folder / name).mkdir(parents=True)
    (folder / "usr/lib/os-release").write_text(
        'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_ID="13"\n'
    )
    (folder / "etc/os-release").symlink_to("../usr/lib/os-release")
    (folder / "etc/fstab").write_text(f"proc /proc proc defaults 0 0\nPARTUUID=5eedf00d-01 {mount} vfat defaults 0 2\n")
    (folder / "usr/bin/python3").symlink_to(f"python{python}")
    elf = b"\x7fELF" + bytes(12) + struct.pack("<HH", 2, MACHINES[machine or platform.machine()])
    (folder / f"usr/bin/python{python}").write_bytes(elf + bytes(100_000))
    return folder


MakeSource = Callable[..., Path]


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """Make an image of a scheme; what is named is changed."""

    def make(scheme: str = "cloud-init", boot: Mapping[str, str] | None = None, **changes: Any) -> Path:
        root = make_root(
            tmp_path / "rootfs", **{k: changes.pop(k) for k in ("python", "machine", "mount") if k in changes}
        )
        files = tmp_path / "boot"
        files.mkdir()
        for name, text in (BOOTS[scheme] if boot is None else boot).items():
            (files / name).write_text(text)
        (files / "overlays").mkdir()
        (files / "overlays" / "a long name.dtbo").write_bytes(b"\x01" * 5000)
        source = tmp_path / "source.img"
        make_image(source, files, root, **changes)
        return source

    return make


def offsets(image: Path) -> tuple[int, int, int]:
    """Where sfdisk sees the boot partition, its size, and the root partition, in bytes."""
    rows = [line for line in run("sfdisk", "-d", image).decode().splitlines() if "start=" in line]
    numbers = [[int(field.split("=")[1]) for field in row.split(":")[1].split(",")[:2]] for row in rows]
    return numbers[0][0] * SECTOR, numbers[0][1] * SECTOR, numbers[1][0] * SECTOR


def command(source: Path, out: Path, kit: Kit, key: Path, *extra_words: str) -> list[str]:
    words = ["image", str(source), "--out", str(out), "--kit", str(kit.folder), "--user", "ann", "--ssh-key", str(key)]
    words += ["--signing-key", str(key.with_name("signing.key"))]
    return [*words, "--wifi", SSID, "--wifi-country", "DE", *extra_words]


@pytest.fixture(autouse=True)
def passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPRUNE_WIFI_PASSWORD", PHRASE)


@pytest.mark.parametrize("scheme", sorted(BOOTS))
def test_an_image_gets_exactly_the_planned_files_and_stays_sound(
    scheme: str, make_source: MakeSource, make_kit: Callable[..., Kit], key: Path, tmp_path: Path, capsys: Capture
) -> None:
    kit = make_kit(claim=CLAIM)
    source, out = make_source(scheme), tmp_path / "out.img"
    before = source.read_bytes()
    assert cli.main(command(source, out, kit, key, "--hostname", "attic-pi")) == ExitCode.OK
    output = capsys.readouterr().out
    boot, size, root = offsets(out)
    fsck_fat(out, boot, size)
    run("e2fsck", "-fn", f"{out}?offset={root}")
    after = out.read_bytes()
    assert source.read_bytes() == before
    assert after[:boot] == before[:boot]
    assert after[boot + size :] == before[boot + size :]
    kit_files = {p.relative_to(kit.folder) for p in kit.folder.rglob("*")}
    kit_names = {f"fedprune/{p}{'/' if (kit.folder / p).is_dir() else ''}" for p in kit_files}
    assert mlist(out, boot) == mlist(source, boot) | kit_names | CHANGED[scheme] | {"fedprune/", "fedprune-install.sh"}
    for path in kit_files:
        if (kit.folder / path).is_file():
            assert mtype(out, f"fedprune/{path}", boot) == (kit.folder / path).read_bytes()
    untouched = set(BOOTS[scheme]) - CHANGED[scheme]
    assert all(mtype(out, name, boot).decode() == BOOTS[scheme][name] for name in untouched)
    assert mtype(out, "overlays/a long name.dtbo", boot) == b"\x01" * 5000
    assert PHRASE.encode() not in after
    assert f"Debian GNU/Linux 13 (trixie), {scheme}, /boot/firmware" in output
    assert "for attic alone" in output
    CHECKS[scheme](lambda name: mtype(out, name, boot).decode(), key.read_text().strip())


Read = Callable[[str], str]


def psk() -> str:
    """The key as wpa_passphrase's own formula has it, by another library."""
    done = subprocess.run(
        ["openssl", "kdf", "-keylen", "32", "-kdfopt", "digest:SHA1", "-kdfopt", f"pass:{PHRASE}"]  # noqa: RUF005
        + ["-kdfopt", f"hexsalt:{SSID.encode().hex()}", "-kdfopt", "iter:4096", "PBKDF2"],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip().replace(":", "").lower()


def check_cloud_init(read: Read, key: str) -> None:
    assert read("user-data").startswith("#cloud-config\n")
    user_data = yaml.safe_load(read("user-data"))
    assert user_data["hostname"] == "attic-pi"
    assert user_data["users"][0]["name"] == "ann"
    assert user_data["users"][0]["ssh_authorized_keys"] == [key]
    assert user_data["users"][0]["lock_passwd"] is True
    (words,) = user_data["bootcmd"]
    assert words[:2] == ["sh", "-c"]
    assert "ExecStart=/bin/sh /boot/firmware/fedprune-install.sh" in words[2].splitlines()
    assert "\\u" not in read("network-config")
    network = yaml.safe_load(read("network-config"))["network"]
    wireless = network["wifis"]["wlan0"]
    assert wireless["access-points"] == {SSID: {"password": psk()}}
    assert (network["version"], wireless["regulatory-domain"]) == (2, "DE")
    identity = yaml.safe_load(read("meta-data"))["instance-id"]
    words = read("cmdline.txt").split()
    assert [w for w in words if w.startswith("ds=")] == [f"ds=nocloud;i={identity}"]
    assert read("cmdline.txt") == f"{CMDLINE} resize ds=nocloud;i={identity}\n"


def check_firstrun(read: Read, key: str) -> None:
    assert read("cmdline.txt").split()[-3:] == [
        "systemd.run=/boot/firmware/fedprune-firstrun.sh",
        "systemd.run_success_action=reboot",
        "systemd.unit=kernel-command-line.target",
    ]
    assert read("cmdline.txt").startswith(f"{CMDLINE} ")
    script = read("fedprune-firstrun.sh")
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    lines = script.splitlines()
    assert "echo attic-pi >/etc/hostname" in lines
    (row,) = [line for line in lines if line.startswith("printf '%s\\n' ")]
    assert shlex.split(row.partition(">")[0])[2:] == [key]
    assert f"psk={psk()}" in lines
    assert f"ssid={''.join(f'{b};' for b in SSID.encode())}" in lines
    assert f"    ssid={SSID.encode().hex()}" in lines


def check_preseed(read: Read, key: str) -> None:
    preseed = tomllib.loads(read("rpi-preseed.toml"))
    assert preseed["config_version"] == "1.1"
    assert preseed["runcmd"]["late"] == ["sh /boot/firmware/fedprune-install.sh"]
    assert preseed["system"]["hostname"] == "attic-pi"
    assert preseed["user"]["name"] == "ann"
    assert (preseed["ssh"]["authorized_keys"], preseed["ssh"]["password_authentication"]) == ([key], False)
    wireless = preseed["wlan"]
    assert (wireless["ssid"], wireless["password"], wireless["country"]) == (SSID, psk(), "DE")
    assert wireless["password_encrypted"] is True


CHECKS: dict[str, Callable[[Read, str], None]] = {
    "cloud-init": check_cloud_init,
    "firstrun": check_firstrun,
    "preseed": check_preseed,
}


@pytest.mark.parametrize("cut", ["mv", "rm", "none"])
def test_the_first_boots_script_ends_whatever_fails_and_leaves_a_board_that_comes_up(
    cut: str, make_source: MakeSource, kit: Kit, key: Path, tmp_path: Path
) -> None:
    """Run in a folder of its own, with programs that all fail; only the paths of the system are moved.

    The power may fail in one of the last steps: a board whose cmdline.txt names a script that is gone, or is empty,
    would never come up again.
    """
    out = tmp_path / "out.img"
    assert cli.main(command(make_source("firstrun"), out, kit, key)) == ExitCode.OK
    at, board, calls = offsets(out)[0], tmp_path / "board", tmp_path / "calls"
    for name in ("boot", "etc", "var/log"):
        (board / name).mkdir(parents=True)
    (board / "etc/hostname").write_text("raspberrypi\n")
    (board / "etc/hosts").write_text("127.0.0.1\tlocalhost\n127.0.1.1\traspberrypi\n")
    (board / "boot/fedprune-install.sh").write_text(f'echo "$@" >{board}/started\nexit 9\n')
    script = mtype(out, "fedprune-firstrun.sh", at).decode()
    for name in ("/etc/", "/var/", "/usr/lib/"):
        script = script.replace(name, f"{board}{name}")
    (board / "boot/fedprune-firstrun.sh").write_text(script)
    cmdline = mtype(out, "cmdline.txt", at).decode().strip() + " cfg80211.ieee80211_regdom=DE\n"
    (board / "boot/cmdline.txt").write_text(cmdline)
    failing = ("getent", "usermod", "groupmod", "systemctl", "raspi-config", "rfkill", "install", "chown")
    note = f"[ -e {board}/started ] && echo $(basename $0) >>{calls}"  # of what comes after the installation
    scripts = {name: f'{note}; PATH=/usr/bin:/bin exec {name} "$@"' for name in ("sed", "mv", "rm", "sync")}
    if cut != "none":
        scripts[cut] = f"{note}; kill -9 $PPID; sleep 1"
    environment = programs_in(tmp_path / "programs", **dict.fromkeys(failing, "exit 1"), **scripts)
    first_boot = [*confining_command(tmp_path), "/bin/sh", str(board / "boot/fedprune-firstrun.sh")]
    done = subprocess.run(first_boot, env=environment, check=False)
    assert (board / "started").read_text() == "--no-start\n"
    assert (board / "etc/hostname").read_text() == "attic\n"
    assert "127.0.1.1\tattic\n" in (board / "etc/hosts").read_text()
    left = (board / "boot/cmdline.txt").read_text()
    assert left.startswith(CMDLINE)
    assert ("systemd.run" not in left) == (cut in ("rm", "none"))
    assert (board / "boot/fedprune-firstrun.sh").exists() == (cut != "none")
    if cut == "none":
        assert done.returncode == 0
        assert calls.read_text().split() == ["sync", "sed", "sync", "mv", "sync", "rm", "sync"]
        assert left == f"{CMDLINE} quiet init=/usr/lib/raspberrypi-sys-mods/firstboot cfg80211.ieee80211_regdom=DE\n"


@pytest.mark.parametrize(("claim", "wifi", "mode"), [(None, False, 0o644), (CLAIM, False, 0o600), (None, True, 0o600)])
def test_an_image_with_something_secret_is_for_its_maker_alone(
    claim: str | None, wifi: bool, mode: int, make_source: MakeSource, make_kit: Callable[..., Kit], tmp_path: Path
) -> None:
    kit, out = make_kit(claim=claim), tmp_path / "out.img"
    before = os.umask(0o022)
    try:
        words = ["image", str(make_source()), "--out", str(out), "--kit", str(kit.folder), "--unsigned"]
        assert cli.main([*words, *(["--wifi", SSID, "--wifi-country", "DE"] if wifi else [])]) == ExitCode.OK
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == mode


def programs_in(folder: Path, **scripts: str) -> dict[str, str]:
    """Programs that are found before those of this machine; returns the environment for it."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_cloud_init_starts_the_installer_at_every_boot_until_it_is_done(
    make_source: MakeSource, kit: Kit, key: Path, tmp_path: Path
) -> None:
    """Only the paths of the system are moved: whatever a cut left of an earlier boot, the next one starts again."""
    out, board = tmp_path / "out.img", tmp_path / "board"
    assert cli.main(command(make_source(), out, kit, key)) == ExitCode.OK
    script = yaml.safe_load(mtype(out, "user-data", offsets(out)[0]))["bootcmd"][0][2]
    script = script.replace("/run/", f"{board}/run/").replace("/etc/", f"{board}/etc/")
    wants = board / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    unit, calls = board / "run/systemd/system/fedprune-install.service", board / "calls"
    environment = programs_in(tmp_path / "programs", systemctl=f'echo "$@" >>{calls}')

    def boot() -> list[str]:
        shutil.rmtree(board / "run", ignore_errors=True)
        calls.write_text("")
        assert subprocess.run(["sh", "-c", script], env=environment, check=False).returncode == 0
        return calls.read_text().splitlines()

    started = ["daemon-reload", "--no-block start fedprune-install.service"]
    assert boot() == started
    text = unit.read_text().replace(str(board), "")
    assert boot() == started
    assert f"ConditionPathExists=!{wants}/fedprune.service" in unit.read_text().splitlines()
    (wants / "fedprune.service").symlink_to("/proc/self")
    assert boot() == []
    (wants / "fedprune.service").unlink()
    (wants.parent / unit.name).symlink_to("/dev/null")  # as `--remove` leaves it
    assert boot() == []
    (tmp_path / unit.name).write_text(text.replace("After=cloud-final.service\n", ""))
    verify = [tool("systemd-analyze"), "verify", "--man=no", str(tmp_path / unit.name)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert not [line for line in done.stderr.splitlines() if unit.name in line], done.stderr


def test_the_kit_in_an_image_installs(
    make_source: MakeSource, make_kit: Callable[..., Kit], key: Path, tmp_path: Path
) -> None:
    """What a board would see of its boot partition is a kit like the one that went in."""
    out = tmp_path / "out.img"
    assert cli.main(command(make_source(), out, make_kit(claim=CLAIM), key)) == ExitCode.OK
    boot, root = tmp_path / "mounted", tmp_path / "board"
    boot.mkdir()
    root.mkdir()
    run("mcopy", "-s", "-i", f"{out}@@{offsets(out)[0]}", "::", boot)
    done = subprocess.run(
        [sys.executable, "-I", str(boot / "fedprune/install.pyz"), "--root", str(root)],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (root / "var/lib/fedprune/claim").read_text() == CLAIM


@pytest.mark.parametrize("packed", ["xz", "gz"])
def test_packed_images_are_unpacked_on_the_way(
    packed: str, make_source: MakeSource, kit: Kit, key: Path, tmp_path: Path
) -> None:
    source = make_source()
    pack = {"xz": lambda raw: lzma.compress(raw, preset=0), "gz": lambda raw: gzip.compress(raw, 1)}[packed]
    (tmp_path / f"source.img.{packed}").write_bytes(pack(source.read_bytes()))
    assert cli.main(command(source, tmp_path / "a.img", kit, key)) == ExitCode.OK
    assert cli.main(command(tmp_path / f"source.img.{packed}", tmp_path / "b.img", kit, key)) == ExitCode.OK
    first_summary, second_summary = (
        fsck_fat(tmp_path / n, *offsets(tmp_path / n)[:2]).splitlines()[-1] for n in ("a.img", "b.img")
    )
    assert first_summary.partition(":")[2] == second_summary.partition(":")[2]
    assert (tmp_path / "b.img").stat().st_size == source.stat().st_size
    assert (tmp_path / "b.img").stat().st_blocks * 512 < source.stat().st_size / 2


def check_refusal(capsys: Capture, arguments: list[str], code: ExitCode, words: str) -> None:
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


WRONG: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "zip": (lambda raw: b"PK\x03\x04" + raw, "a ZIP file"),
    "text": (lambda raw: b"<html>404: there is no such image</html>\n" * 2000, "no partition table"),
    "no partitions": (lambda raw: raw[:446] + bytes(64) + raw[510:], "no boot partition"),
    "cut": (lambda raw: raw[: len(raw) - 5_000_000], "cut short"),
    "xz cut": (lambda raw: lzma.compress(raw, preset=0)[:-3000], "damaged or cut short"),
    "no fat": (lambda raw: raw[: 2048 * 512] + bytes(512) + raw[2048 * 512 + 512 :], "holds no FAT"),
    "overlap": (lambda raw: raw[:470] + raw[454:458] + raw[474:], "overlaps another"),
}


@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_what_is_no_image_of_a_card_is_refused_and_nothing_is_left(
    wrong: str, make_source: MakeSource, kit: Kit, key: Path, tmp_path: Path, capsys: Capture
) -> None:
    source = make_source()
    change, words = WRONG[wrong]
    source.write_bytes(change(source.read_bytes()))
    names = set(tmp_path.iterdir())
    check_refusal(capsys, command(source, tmp_path / "out.img", kit, key), ExitCode.IMAGE, words)
    assert set(tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"python": "3.9"}, ExitCode.KIT, "--python 3.9"),
        ({"machine": "armhf"}, ExitCode.KIT, "64-bit image"),
        ({"boot": {"cmdline.txt": CMDLINE}}, ExitCode.IMAGE, "--scheme"),
        ({"boot": {"config.txt": ""}}, ExitCode.IMAGE, "no cmdline.txt"),
        ({"boot": {"cmdline.txt": "x " * 2**20}}, ExitCode.IMAGE, "cmdline.txt: expected at most"),
        (
            {"boot": {**BOOTS["cloud-init"], "user-data": "#cloud-config\nhostname: mine\n"}},
            ExitCode.IMAGE,
            "user-data on the boot partition has settings already",
        ),
        (
            {"scheme": "firstrun", "extra_partitions": "start={start},size=2048,type=83\n"},
            ExitCode.IMAGE,
            "two root partitions",
        ),
        ({"boot": {**BOOTS["firstrun"], "full": "x" * 41_200_000}}, ExitCode.IMAGE, "doesn't fit the boot partition"),
    ],
)
def test_images_that_would_not_become_the_board_are_refused(
    changes: dict[str, Any],
    code: ExitCode,
    words: str,
    make_source: MakeSource,
    kit: Kit,
    key: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    check_refusal(capsys, command(make_source(**changes), tmp_path / "out.img", kit, key), code, words)
    assert not (tmp_path / "out.img").exists()


def test_a_jetsons_kit_does_not_go_into_an_image_of_a_pi(
    make_source: MakeSource, make_kit: Callable[..., Kit], wheels: Path, key: Path, tmp_path: Path, capsys: Capture
) -> None:
    links = tmp_path / "links"
    shutil.copytree(wheels, links, ignore=lambda _, names: [n for n in names if n.startswith("onnxruntime")])
    kit = make_kit(target=BoardTarget(HERE, jetson=True), links=[links])
    arguments = command(make_source(), tmp_path / "out.img", kit, key)
    check_refusal(capsys, arguments, ExitCode.KIT, "a kit for a Jetson in an image of Debian")
    assert not (tmp_path / "out.img").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--hostname", "a;reboot", "host name"), ("--wifi", "x" * 33, "name of the wireless network")],
)
def test_settings_are_checked(
    option: str, value: str, words: str, kit: Kit, key: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = command(tmp_path / "none.img", tmp_path / "out.img", kit, key, option, value)
    check_refusal(capsys, arguments, ExitCode.CONFIG, words)


def test_a_passphrase_is_never_shown(
    kit: Kit, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("FEDPRUNE_WIFI_PASSWORD", "geheim!")
    assert cli.main(command(tmp_path / "none.img", tmp_path / "out.img", kit, key)) == ExitCode.CONFIG
    assert "geheim" not in "".join(capsys.readouterr())


def test_only_a_kit_of_the_server_goes_into_an_image(
    make_source: MakeSource, make_kit: Callable[..., Kit], key: Path, tmp_path: Path, capsys: Capture
) -> None:
    """`--unsigned` takes any other, signed or not."""
    out, source, ours = tmp_path / "out.img", make_source(), key.with_name("signing.key")
    SigningKey.make().save(tmp_path / "another.key")
    kits = {"signed": make_kit("signed"), "plain": make_kit("plain", signer=None)}
    for name, signing, code in (
        ("signed", None, ExitCode.USAGE),
        ("signed", tmp_path / "another.key", ExitCode.KIT),
        ("plain", ours, ExitCode.KIT),
    ):
        words = ["image", str(source), "--out", str(out), "--kit", str(kits[name].folder)]
        check_refusal(capsys, [*words, *(["--signing-key", str(signing)] if signing else [])], code, "igned")
        assert not out.exists()
    assert cli.main([*words, "--unsigned"]) == ExitCode.OK
    assert 'install.pyz --unsigned "$@"' in mtype(out, "fedprune-install.sh", offsets(out)[0]).decode()
