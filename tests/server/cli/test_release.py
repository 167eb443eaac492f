"""A release made by the command is one that a board takes."""

import platform
from pathlib import Path

import pytest

from fedprune.security.keys import VerifyingKey
from fedprune_device.cli.main import main as device
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_server.cli.main import main as server
from support.fakes.runtime_releases import PYTHON, set_up
from support.fakes.tiny_wheels import wheel as small_wheel


@pytest.fixture
def state(tmp_path: Path) -> Path:
    assert server(["init", "--state", str(tmp_path / "server")]) == 0
    return tmp_path / "server"


def key_of(state: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The server's key, as the operator reads it when a release is made."""
    capsys.readouterr()
    make_signed_release(folder / "first", 1, state)
    return capsys.readouterr().out.splitlines()[-1].rpartition(" ")[2]


def make_signed_release(folder: Path, number: int, state: Path, source: Path | None = None) -> Path:
    out = folder / f"release-{number}"
    command = ["release", "--state", state, "--number", number, "--out", out]
    if source is None:
        wheels = folder / f"wheels-{number}"
        small_wheel(wheels, "app", files={"app/__init__.py": f"VERSION = {number}\n"})
        small_wheel(wheels, "fedprune", requires=["numpy>=1.23", 'pillow>=10; extra == "board"'], extras=["board"])
        small_wheel(wheels, "pillow", "11.0")
        command += ["--wheels", wheels, "--python", PYTHON, "--machine", platform.machine(), "--system", "numpy"]
        command += ["--entry", "app:main"]
    else:
        command += ["--again", source]
    assert server([str(word) for word in command]) == 0
    return out


def test_a_board_is_updated_taken_back_and_tells_what_it_runs(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = key_of(state, capsys, tmp_path)
    (tmp_path / "server.pub").write_text(key + "\n")
    root = ["--root", str(tmp_path / "board")]
    one = make_signed_release(tmp_path, 1, state)
    set_up(tmp_path / "board", one, VerifyingKey.from_hex(key))
    update = ["update", *root, "--key", str(tmp_path / "server.pub"), "--attempts", "2", "--release"]
    assert device([*update, str(make_signed_release(tmp_path, 2, state))]) == 0
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
    assert device([*update, str(make_signed_release(tmp_path, 3, state, source=one))]) == 0
    assert (home.root / "a" / "app" / "__init__.py").read_text() == "VERSION = 1\n"


def own_wheel(folder: Path) -> Path:
    """fedprune's, which requires two packages, and on an old Python a third."""
    requires = ["numpy>=1.23", 'pillow>=10; extra == "board"', 'tomli>=2; python_version < "3.11" and extra == "board"']
    return small_wheel(folder, "fedprune", "0.1.0", requires=[*requires, 'onnx; extra == "server"'], extras=["board"])


def test_wheels_that_would_fail_on_the_boards_are_named_before_anything_is_signed(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "out"

    def check_refusal(expected: str, *further: str, machine: str = "aarch64", python: str = "cp311") -> None:
        capsys.readouterr()
        command = ["release", "--state", str(state), "--wheels", str(wheels), "--number", "1", "--out", str(out)]
        assert server([*command, "--machine", machine, "--python", python, *further]) == 65
        assert expected in capsys.readouterr().err
        assert not out.exists()

    arm = small_wheel(wheels, "numpy", "2.0", tag="cp311-cp311-manylinux_2_28_aarch64")
    check_refusal("fedprune")
    own_wheel(wheels)
    check_refusal(arm.name, machine="x86_64")
    check_refusal(arm.name, python="cp313")
    check_refusal("requires pillow>=10")
    old = small_wheel(wheels, "pillow", "9.5")
    check_refusal("got 9.5")
    small_wheel(wheels, "pillow", "11.0")
    check_refusal("got 11.0 and 9.5")
    old.unlink()
    arm.unlink()
    check_refusal("requires numpy>=1.23")
    check_refusal("requires tomli>=2", "--system", "numpy", python="cp310")
    check_refusal("expected a Python such as cp311", "--system", "numpy", python="3.11")


def test_what_the_boards_bring_themselves_needs_no_wheel(tmp_path: Path, state: Path) -> None:
    own_wheel(tmp_path / "wheels")
    command = ["release", "--state", str(state), "--wheels", str(tmp_path / "wheels"), "--number", "1"]
    command += ["--out", str(tmp_path / "out")]
    assert server(command) == 65
    assert server([*command, "--system", "numpy", "--system", "PIL"]) == 0


def test_a_release_is_never_written_over_another(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_signed_release(tmp_path, 1, state)
    before = (one / "release.json").read_bytes()
    for source in (["--again", str(one)], ["--wheels", str(tmp_path / "wheels-1")]):
        assert server(["release", "--state", str(state), "--number", "2", "--out", str(one), *source]) == 65
        assert "holds a release already" in capsys.readouterr().err
    assert (one / "release.json").read_bytes() == before
