"""A release made by the command is one that a board takes."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from fedprune_device.cli.main import main as device
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_server.cli.main import main as server
from support.fakes.runtime_releases import PYTHON, make_wheel
from support.fakes.tiny_wheels import wheel as small_wheel


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A server's state folder, with an identity."""
    assert server(["init", "--state", str(tmp_path / "server")]) == 0
    return tmp_path / "server"


def key_of(state: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The server's key, as the operator reads it when a release is made."""
    capsys.readouterr()
    released(folder / "first", 1, state)
    return capsys.readouterr().out.splitlines()[-1].rpartition(" ")[2]


def released(folder: Path, number: int, state: Path, again: Path | None = None) -> Path:
    out = folder / f"release-{number}"
    command = ["release", "--state", state, "--number", number, "--out", out]
    if again is None:
        wheels = folder / f"wheels-{number}"
        small_wheel(wheels, "app", files={"app/__init__.py": f"VERSION = {number}\n"})
        small_wheel(wheels, "fedprune", requires=["numpy>=1.23", 'pillow>=10; extra == "board"'], extras=["board"])
        small_wheel(wheels, "pillow", "11.0")
        command += ["--wheels", wheels, "--python", PYTHON, "--machine", platform.machine(), "--system", "numpy"]
        command += ["--entry", "app:main"]
    else:
        command += ["--again", again]
    assert server([str(word) for word in command]) == 0
    return out


def test_a_board_is_set_up_updated_taken_back_and_tells_what_it_runs(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = key_of(state, capsys, tmp_path)
    (tmp_path / "server.pub").write_text(key + "\n")
    root = ["--root", str(tmp_path / "board")]
    one = released(tmp_path, 1, state)
    assert device(["install", *root, "--key", key, "--release", str(one)]) == 0
    update = ["update", *root, "--key", str(tmp_path / "server.pub"), "--attempts", "2", "--release"]
    assert device([*update, str(released(tmp_path, 2, state))]) == 0
    capsys.readouterr()
    assert device(["slots", *root]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: release 1 (1), stable",
        "b: release 2 (2), trial",
        "trial: 2 attempts of 600 s left",
    ]
    assert device(["slots", *root, "--json"]) == 0
    assert '"highest": 2' in capsys.readouterr().out
    home = SlotStore(tmp_path / "board")
    home.save(home.load().commit())  # type: ignore[union-attr]
    assert device([*update, str(one)]) == 65
    assert device([*update, str(released(tmp_path, 3, state, again=one))]) == 0
    assert (home.root / "a" / "app" / "__init__.py").read_text() == "VERSION = 1\n"


def test_a_release_is_reported_as_json(tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = key_of(state, capsys, tmp_path)
    one = tmp_path / "first" / "release-1"
    words = ["release", "--state", str(state), "--number", "2", "--again", str(one), "--out", str(tmp_path / "two")]
    assert server([*words, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["release"], body["version"], body["wheels"], body["key"]) == (2, "1", 3, key)


def test_what_is_refused_ends_with_its_code(tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = key_of(state, capsys, tmp_path)
    root = ["--root", str(tmp_path / "board")]
    common = [*root, "--key", key, "--release", str(released(tmp_path, 1, state))]
    assert device(["slots", *root]) == 31
    assert device(["update", *common]) == 31
    assert device(["install", *common]) == 0
    capsys.readouterr()
    assert device(["slots", *root]) == 0
    assert capsys.readouterr().out.splitlines() == ["a: release 1 (1), stable", "b: empty, not in use"]
    assert device(["update", *root, "--key", "800c-1234", "--release", "x"]) == 14
    assert "--key: expected 64 hex digits, or a file with them, got '800c-1234'" in capsys.readouterr().err
    assert device(["update", *common]) == 65
    assert "expected a number above 1" in capsys.readouterr().err
    assert server(["init", "--state", str(tmp_path / "other")]) == 0
    other = released(tmp_path, 2, tmp_path / "other")
    assert device(["update", *root, "--key", key, "--release", str(other)]) == 65
    assert "signature is not the server's" in capsys.readouterr().err
    assert device(["update", *root, "--key", str(tmp_path / "nowhere"), "--release", str(other)]) == 31
    (tmp_path / "no-key").write_text("-----BEGIN PUBLIC KEY-----")
    assert device(["update", *root, "--key", str(tmp_path / "no-key"), "--release", str(other)]) == 14
    assert "expected 64 hex digits" in capsys.readouterr().err


def test_a_folder_without_wheels_makes_no_release(tmp_path: Path, state: Path) -> None:
    command = ["release", "--number", "1", "--state", str(state), "--out", str(tmp_path / "out")]
    assert server([*command, "--wheels", str(tmp_path)]) == 65
    assert server([*command, "--wheels", str(tmp_path / "nowhere")]) == 31
    assert server([*command, "--again", str(tmp_path / "nowhere")]) == 31
    (tmp_path / "broken.whl").write_bytes(b"PK")
    assert server([*command, "--wheels", str(tmp_path)]) == 65


def test_a_server_without_an_identity_signs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_wheel(tmp_path / "wheels" / "app-1-py3-none-any.whl", {"app/__init__.py": ""})
    command = ["release", "--wheels", str(tmp_path / "wheels"), "--number", "1", "--out", str(tmp_path / "out")]
    assert server([*command, "--state", str(tmp_path)]) == 63
    assert "fedprune-server init" in capsys.readouterr().err


def own_wheel(folder: Path) -> Path:
    """fedprune's, which requires two packages, and on an old Python a third."""
    requires = ["numpy>=1.23", 'pillow>=10; extra == "board"', 'tomli>=2; python_version < "3.11" and extra == "board"']
    return small_wheel(folder, "fedprune", "0.1.0", requires=[*requires, 'onnx; extra == "server"'], extras=["board"])


def test_wheels_that_would_fail_on_the_boards_are_named_before_anything_is_signed(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "out"

    def refused(expected: str, *more: str, machine: str = "aarch64", python: str = "cp311") -> None:
        capsys.readouterr()
        command = ["release", "--state", str(state), "--wheels", str(wheels), "--number", "1", "--out", str(out)]
        assert server([*command, "--machine", machine, "--python", python, *more]) == 65
        assert expected in capsys.readouterr().err
        assert not out.exists()

    arm = small_wheel(wheels, "numpy", "2.0", tag="cp311-cp311-manylinux_2_28_aarch64")
    refused("there is no wheel of fedprune among the 1")
    own_wheel(wheels)
    refused(f"{arm.name}: expected a wheel for cp311 on x86_64", machine="x86_64")
    refused(f"{arm.name}: expected a wheel for cp313 on aarch64", python="cp313")
    refused("fedprune-0.1.0-py3-none-any.whl requires pillow>=10: expected a wheel of it, got none")
    old = small_wheel(wheels, "pillow", "9.5")
    refused("requires pillow>=10: expected a wheel of it, got 9.5")
    small_wheel(wheels, "pillow", "11.0")
    refused("wheels of pillow: expected one, got 11.0 and 9.5")
    old.unlink()
    arm.unlink()
    refused("requires numpy>=1.23")
    refused("requires tomli>=2", "--system", "numpy", python="cp310")
    refused("expected a Python such as cp311", "--system", "numpy", python="3.11")


def test_what_the_boards_bring_themselves_needs_no_wheel(tmp_path: Path, state: Path) -> None:
    own_wheel(tmp_path / "wheels")
    command = ["release", "--state", str(state), "--wheels", str(tmp_path / "wheels"), "--number", "1"]
    command += ["--out", str(tmp_path / "out")]
    assert server(command) == 65
    assert server([*command, "--system", "numpy", "--system", "PIL"]) == 0


def test_a_release_is_never_written_over_another(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = released(tmp_path, 1, state)
    before = (one / "release.json").read_bytes()
    for source in (["--again", str(one)], ["--wheels", str(tmp_path / "wheels-1")]):
        assert server(["release", "--state", str(state), "--number", "2", "--out", str(one), *source]) == 65
        assert "holds a release already" in capsys.readouterr().err
    assert (one / "release.json").read_bytes() == before
