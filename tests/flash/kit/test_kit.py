import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fedprune.core.errors import ConfigError, ExitCode, KitError
from fedprune_flash import BoardSettings, BoardTarget, Kit, open_kit
from fedprune_flash.cli import main as cli
from fedprune_flash.kit import wheelhouse
from support.fakes import tiny_wheels
from support.fakes.runtime_releases import CLAIM, KEY, PUBLIC

MakeKit = Callable[..., Kit]
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate, made by openssl, and its key beside it."""
    folder = tmp_path_factory.mktemp("authority")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=lab"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return folder / "ca.pem"


def test_a_kit_lists_every_file_with_its_digest(make_kit: MakeKit) -> None:
    kit = make_kit(claim=CLAIM)
    body = json.loads((kit.folder / "kit.json").read_text())
    listed = {r["path"]: (r["bytes"], r["sha256"]) for r in [*body["files"], body["claim"]]}
    there = {
        str(p.relative_to(kit.folder)): (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in kit.folder.rglob("*")
        if p.is_file() and p.name != "kit.json"
    }
    assert listed == there
    assert kit.has_claim
    assert {"install.pyz", "device.env", "fedprune.service", "claim.txt"} <= set(there)
    assert (body["python"], body["architecture"], body["jetson"]) == (HERE, platform.machine(), False)


def test_a_kit_is_the_same_whenever_it_is_made(make_kit: MakeKit) -> None:
    assert make_kit("a").digest == make_kit("b").digest


def test_only_the_claim_may_be_missing(make_kit: MakeKit) -> None:
    kit = make_kit(claim=CLAIM)
    (kit.folder / "claim.txt").unlink()
    assert not open_kit(kit.folder).has_claim
    (kit.folder / "device.env").unlink()
    with pytest.raises(KitError, match=r"device\.env"):
        open_kit(kit.folder)


@pytest.mark.parametrize("claim", ["with\0zero", "claim.txt", f"{CLAIM[:-1]}A", f"{CLAIM}@barn"])
def test_a_claim_is_refused_before_wheels_are_fetched(tmp_path: Path, make_kit: MakeKit, claim: str) -> None:
    with pytest.raises(ConfigError, match="claim"):
        make_kit(claim=claim, wheel=tmp_path / "missing.whl")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_kit_that_fails(tmp_path: Path, make_kit: MakeKit) -> None:
    with pytest.raises(KitError):
        make_kit(wheel=tmp_path / "missing.whl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": "mqtts://me:geheim@host"}, "without user and password"),
        ({"server": "http://host"}, "mqtts://"),
        ({"server": "mqtts://host\nX=1"}, "mqtts://"),
        ({"server": "mqtt://host"}, "without TLS"),
        ({"join": "mqtts://host\nX=1"}, "join"),
        ({"device": "all"}, "device"),
        ({"data": "/srv/../etc/shadow"}, "absolute path"),
        ({"data": "//home"}, "one in /home"),
        ({"data": "/run/./user/1000/x.npz"}, "one in /run/user"),
    ],
)
def test_what_a_board_is_told_is_checked(changes: dict[str, str], message: str) -> None:
    values = {"server": "mqtts://host", "device": "attic", **changes}
    with pytest.raises(ConfigError, match=message) as caught:
        BoardSettings(**values)
    assert "geheim" not in str(caught.value)


def test_a_kit_with_a_claim_is_for_its_maker_alone(make_kit: MakeKit) -> None:
    before = os.umask(0o022)
    try:
        kit, plain = make_kit(claim=CLAIM).folder, make_kit("plain").folder
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (kit, kit / "claim.txt")] == [0o700, 0o600]
    assert [p.stat().st_mode & 0o777 for p in (plain, plain / "kit.json")] == [0o755, 0o644]


def test_a_private_key_never_goes_into_a_kit(authority: Path, make_kit: MakeKit) -> None:
    key = (authority.parent / "key.pem").read_text()
    board = BoardSettings("mqtts://host", "attic", authority=True)
    with pytest.raises(ConfigError, match="private key"):
        make_kit(claim=key)
    with pytest.raises(ConfigError, match="private key"):
        make_kit(board=board, authorities=authority.read_bytes() + key.encode())


def test_wheels_for_another_board_are_refused(tmp_path: Path) -> None:
    tiny_wheels.fleet_of_wheels(tmp_path)
    (tmp_path / "numpy-2.0-py3-none-any.whl").unlink()
    for tag in ("cp312-cp312-manylinux_2_28_aarch64", "cp313-cp313-manylinux_2_28_x86_64", "cp313-cp313-win_arm64"):
        wrong = tiny_wheels.wheel(tmp_path, "numpy", "2.0", tag=tag)
        with pytest.raises(KitError, match=r"numpy-2\.0"):
            wheelhouse.check_wheelhouse(sorted(tmp_path.iterdir()), BoardTarget("3.13"))
        wrong.unlink()
    for tag in ("cp313-cp313-manylinux_2_27_aarch64.manylinux_2_28_aarch64", "cp39-abi3-manylinux2014_aarch64"):
        right = tiny_wheels.wheel(tmp_path, "numpy", "2.0", tag=tag)
        wheelhouse.check_wheelhouse(sorted(tmp_path.iterdir()), BoardTarget("3.13"))
        right.unlink()


def test_what_a_wheel_requires_on_the_target_must_be_there(tmp_path: Path) -> None:
    tiny_wheels.fleet_of_wheels(tmp_path)
    tiny_wheels.wheel(
        tmp_path, "pillow", "11.0", requires=["tomli>=2; python_version < '3.11'", "absent; extra == 'x'"]
    )
    (tmp_path / "pillow-10.0-py3-none-any.whl").unlink()
    wheelhouse.check_wheelhouse(sorted(tmp_path.iterdir()), BoardTarget("3.13"))
    with pytest.raises(KitError, match=r"requires tomli>=2 on Python 3\.10"):
        wheelhouse.check_wheelhouse(sorted(tmp_path.iterdir()), BoardTarget("3.10"))


def test_a_file_from_a_network_that_the_lock_file_does_not_list_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another numpy of the version that the lock file has, from an index that this machine was led to."""
    target, index, out = BoardTarget("3.13"), tmp_path / "index/numpy", tmp_path / "out"
    version = next(line for line in wheelhouse.locked_requirements(target) if line.startswith("numpy==")).partition(
        "=="
    )[2]
    wheel = tiny_wheels.wheel(index, "numpy", version)
    (index / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", index.parent.as_uri())
    board_wheel = tiny_wheels.wheel(tmp_path / "own", "fedprune", "1", requires=["numpy"])
    out.mkdir()
    with pytest.raises(KitError, match=wheel.name):
        wheelhouse.fetch_wheels(board_wheel, target, out)


def test_all_that_a_board_installs_is_pinned() -> None:
    target = BoardTarget("3.11")
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in wheelhouse.locked_requirements(target)}
    pending, resolved = [Requirement("fedprune[board]")], set[str]()
    while pending:
        requirement = pending.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in resolved:
            continue
        resolved.add(name)
        for text in requires(requirement.name) or ():
            dependency = Requirement(text)
            extras = requirement.extras or {""}
            if dependency.marker is None or any(dependency.marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(dependency)
    assert {"onnxruntime", "pillow", "cffi"} < resolved
    assert resolved - {"fedprune"} <= pinned


@pytest.mark.parametrize("name", ["numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt"])
def test_nothing_shadows_what_a_jetson_brings(tmp_path: Path, name: str) -> None:
    tiny_wheels.fleet_of_wheels(tmp_path, jetson=True)
    (tmp_path / "numpy-2.0-py3-none-any.whl").unlink()
    target = BoardTarget("3.12", jetson=True)
    wheelhouse.check_wheelhouse(sorted(tmp_path.iterdir()), target)
    tiny_wheels.wheel(tmp_path, name.replace("-", "_"), "1.31")
    with pytest.raises(KitError, match="the board's own"):
        wheelhouse.check_wheelhouse(sorted(tmp_path.iterdir()), target)


def arguments(out: Path, wheels: Path, links: Path) -> list[str]:
    """A command line for a kit that suits this machine."""
    values = {
        "--out": out,
        "--server": "mqtts://h",
        "--device": "d",
        "--python": HERE,
        "--architecture": platform.machine(),
        "--wheel": next(wheels.glob("fedprune-*")),
        "--find-links": links,
    }
    return ["kit", *(str(word) for row in values.items() for word in row)]


def test_the_command_makes_a_kit(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDPRUNE_CLAIM", f"{CLAIM}@barn\n{CLAIM}@d")
    assert cli.main(arguments(tmp_path / "kit", wheels, wheels)) == ExitCode.OK
    kit = open_kit(tmp_path / "kit")
    assert (kit.folder / "claim.txt").read_text() == f"{CLAIM}@d"
    output = capsys.readouterr().out
    assert kit.digest in output
    assert "install.pyz --unsigned" in output
    monkeypatch.delenv("FEDPRUNE_CLAIM")
    KEY.save(tmp_path / "signing.key")
    signed = [*arguments(tmp_path / "signed", wheels, wheels), "--signing-key", str(tmp_path / "signing.key")]
    assert cli.main([*signed, "--json"]) == ExitCode.OK
    body, kit = json.loads(capsys.readouterr().out), open_kit(tmp_path / "signed", KEY)
    assert (body["folder"], body["sha256"], body["bytes"]) == (str(kit.folder), kit.digest, kit.bytes)
    assert (body["device"], body["claimed"], body["key"]) == ("d", False, PUBLIC.hex)
