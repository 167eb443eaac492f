"""Profiles are found by name, by path, in a user's folder and by what a board says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedprune.core.errors import ProfileError
from fedprune.planning import profile_store

pytestmark = pytest.mark.board

BOARDS = (
    "generic-aarch64",
    "generic-x86-64",
    "jetson-agx-orin",
    "jetson-nano",
    "jetson-orin-nano",
    "jetson-orin-nx",
    "jetson-thor",
    "jetson-tx2",
    "jetson-xavier-nx",
    "raspberry-pi-3b-plus",
    "raspberry-pi-4b",
    "raspberry-pi-5",
    "raspberry-pi-zero-2w",
)


def own(folder: Path, name: str, title: str) -> Path:
    folder.mkdir(exist_ok=True)
    text = (profile_store.shipped_folder() / "raspberry-pi-4b.toml").read_text()
    path = folder / f"{name}.toml"
    path.write_text(text.replace('"raspberry-pi-4b"', f'"{name}"').replace("Raspberry Pi 4 Model B (2 GB)", title))
    return path


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_shipped(name: str) -> None:
    assert profile_store.find(name).name == name


def test_shipped_names_are_sorted() -> None:
    assert list(profile_store.shipped()) == sorted(profile_store.shipped())


def test_a_path_is_read(tmp_path: Path) -> None:
    assert profile_store.find(str(own(tmp_path, "my-board", "Mine"))).title == "Mine"


def test_json_is_read_like_toml(tmp_path: Path) -> None:
    profile = profile_store.find("raspberry-pi-5")
    path = tmp_path / "board.json"
    path.write_text(profile.to_json())
    assert profile_store.find(path) == profile


def test_own_folders_add_names(tmp_path: Path) -> None:
    own(tmp_path, "my-board", "Mine")
    assert "my-board" in profile_store.names([tmp_path])
    assert profile_store.find("my-board", [tmp_path]).title == "Mine"


def test_own_folders_win_over_shipped_profiles(tmp_path: Path) -> None:
    own(tmp_path, "raspberry-pi-5", "Mine")
    assert profile_store.find("raspberry-pi-5", [tmp_path]).title == "Mine"


def test_a_file_is_named_like_its_profile(tmp_path: Path) -> None:
    own(tmp_path, "my-board", "Mine").rename(tmp_path / "other.toml")
    with pytest.raises(ProfileError, match=r"other.toml: name: expected 'other', got 'my-board'"):
        profile_store.find("other", [tmp_path])


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ProfileError, match=r"'pi-9'.*raspberry-pi-5"):
        profile_store.find("pi-9")


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ProfileError, match=r"can't read .*gone"):
        profile_store.find(tmp_path / f"gone{suffix}")


@pytest.mark.parametrize("search", [profile_store.names, lambda folders: profile_store.find("pi", folders)])
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, search: Callable[[list[Path]], object]) -> None:
    with pytest.raises(ProfileError, match=r"nowhere is no folder"):
        search([tmp_path / "nowhere"])


@pytest.mark.parametrize("typed", ["boards", "./boards", "boards/"])
def test_a_folder_is_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    (tmp_path / "boards").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError, match=r"boards/? is a folder: expected a profile's name, or a TOML or JSON file"):
        profile_store.chosen(typed)


def test_a_folder_does_not_hide_a_profile_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raspberry-pi-5").mkdir()
    monkeypatch.chdir(tmp_path)
    assert profile_store.chosen("raspberry-pi-5") == profile_store.find("raspberry-pi-5")
