"""TOML files: read whole, or refused by file and line."""

import os
import sys
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError, MissingExtraError, ProfileError
from fedprune.core.toml_file import read_toml

pytestmark = pytest.mark.board


@pytest.mark.parametrize("raw", [b"ok = 1\nbroken\n", b"ok = 1\nx = = 2", b"ok = 1\n# \xff\n", b"ok = 1\nok = 2\n"])
def test_the_file_and_the_line_of_an_error_are_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(raw)
    with pytest.raises(ProfileError, match=r"a\.toml(:2(:\d+)?|): "):
        read_toml(path, ProfileError)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"a\.toml: "):
        read_toml(path, ConfigError)


def test_without_a_parser_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="tomli"):
        read_toml(tmp_path / "a.toml", ConfigError)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("form", ["{} = 1", "x = {{ {} = 1 }}"])
def test_a_key_of_very_many_parts_is_refused_at_once(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text("ok = 1\n" + form.format(".".join(["a"] * 200_000)))
    with pytest.raises(ConfigError, match=r"a\.toml:2:1: .* 100 "):
        read_toml(path, ConfigError)


@pytest.mark.timeout(20)
def test_a_pipe_and_an_endless_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match=r"pipe\.toml"):
        read_toml(tmp_path / "pipe.toml", ConfigError)
    with pytest.raises(ConfigError, match="/dev/zero"):
        read_toml(Path("/dev/zero"), ConfigError)
