"""A release made by the command is one that a board takes."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from runtime_releases import PYTHON, make_wheel

from fedprune_device.cli import main as device
from fedprune_server.cli import main as server


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    secret, public = tmp_path / "key.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(secret)], check=True)
    subprocess.run(["openssl", "pkey", "-in", str(secret), "-pubout", "-out", str(public)], check=True)
    return secret, public


def released(folder: Path, number: int, key: Path) -> Path:
    make_wheel(folder / f"wheels-{number}" / "app-1-py3-none-any.whl", {"app/__init__.py": f"VERSION = {number}\n"})
    out = folder / f"release-{number}"
    command = ["release", "--wheels", folder / f"wheels-{number}", "--number", number, "--key", key, "--out", out]
    command += ["--python", PYTHON, "--machine", platform.machine(), "--system", "numpy", "--entry", "app:main"]
    assert server([str(word) for word in command]) == 0
    return out


def test_a_board_is_set_up_updated_and_tells_what_it_runs(
    tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    secret, public = keys
    root = ["--root", str(tmp_path / "board")]
    common = [*root, "--key", str(public), "--release"]
    assert device(["install", *common, str(released(tmp_path, 1, secret))]) == 0
    assert device(["update", *common, str(released(tmp_path, 2, secret)), "--attempts", "2"]) == 0
    capsys.readouterr()
    assert device(["slots", *root]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: release 1 (1), stable",
        "b: release 2 (2), trial",
        "trial: 2 attempts of 600 s left",
    ]
    assert device(["slots", *root, "--json"]) == 0
    assert '"highest": 2' in capsys.readouterr().out


def test_what_is_refused_ends_with_its_code(
    tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    secret, public = keys
    common = ["--root", str(tmp_path / "board"), "--key", str(public), "--release", str(released(tmp_path, 1, secret))]
    assert device(["slots", "--root", str(tmp_path / "board")]) == 31
    assert device(["update", *common]) == 31
    assert device(["install", *common]) == 0
    assert device(["update", *common]) == 65
    assert "expected a number above 1" in capsys.readouterr().err
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(secret)], check=True)
    released(tmp_path, 2, secret)
    assert device(["update", *common[:-1], str(tmp_path / "release-2")]) == 65
    assert "signature is not the server's" in capsys.readouterr().err


def test_a_folder_without_wheels_makes_no_release(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    command = ["release", "--number", "1", "--key", str(keys[0]), "--out", str(tmp_path / "out"), "--wheels"]
    assert server([*command, str(tmp_path)]) == 65
    assert server([*command, str(tmp_path / "nowhere")]) == 31
    (tmp_path / "broken.whl").write_bytes(b"PK")
    assert server([*command, str(tmp_path)]) == 65
