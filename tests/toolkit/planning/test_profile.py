"""Hardware profiles: what is shipped is sound, and what is unsound says so in one clear error."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ExitCode, ProfileError
from fedprune.planning import profile_store
from fedprune.planning.profile import HardwareProfile

pytestmark = pytest.mark.board

DELETED = "(deleted)"
"""Stands for a key that isn't there."""


def body() -> dict[str, Any]:
    return deepcopy(profile_store.find_profile("jetson-orin-nano").to_dict())


@pytest.mark.parametrize("name", profile_store.shipped_profile_names())
def test_every_figure_of_a_shipped_profile_has_a_source(name: str) -> None:
    profile = profile_store.find_profile(name)
    assert set(profile.sources) == set(profile.figures())


@pytest.mark.parametrize("name", profile_store.shipped_profile_names())
def test_a_shipped_profile_leaves_room_for_training(name: str) -> None:
    profile = profile_store.find_profile(name)
    assert 0 < profile.training_memory_bytes < profile.memory.total_bytes - profile.memory.reserve_bytes


CHANGES: list[tuple[str, Any, str]] = [
    *(("cpu.cores", v, "cpu.cores") for v in (0, 4097, 1.5, math.nan, math.inf, 10**400, "8 GB", True, [4], None)),
    *(("memory.training_share", v, "memory.training_share") for v in (0, 1.5, "half", None)),
    *(("cpu.isa", v, "cpu.isa") for v in ("neon", [""], 3)),
    *(("accelerator.shared_memory", v, "accelerator.shared_memory") for v in (1, "yes", None)),
    *(("accelerator.kind", v, "accelerator.kind") for v in ("magic", "", 3.13)),
    *(("name", v, "name") for v in ("", "Raspberry Pi", "a/b", 4)),
    ("title", " ", "title"),
    ("arch", "armv7l", "arch"),
    ("memory.reserve_bytes", 2**49, "memory.reserve_bytes"),
    ("power.idle_w", 30.0, "power.idle_w"),
    ("colour", 1, "'colour'"),
    ("memory.total_mb", 1, "memory: unknown key 'total_mb'"),
    ("cpu", DELETED, "cpu"),
    ("cpu.cores", DELETED, "cpu.cores"),
    ("sources.memory.total_bytes", DELETED, "memory.total_bytes"),
    ("sources.memory.colour", "https://example.org/colours", "sources.memory.colour"),
    *(("sources.cpu.cores", source, "sources.cpu.cores") for source in ("", "somewhere", "estimate: ", 4)),
    ("support", "limited", "advice"),
    ("advice", "Do this.", "advice"),
]


@pytest.mark.parametrize(("path", "value", "subject"), CHANGES, ids=lambda v: str(v)[:30])
def test_what_is_wrong_unknown_or_missing_is_named_with_its_file(path: str, value: Any, subject: str) -> None:
    bad, (*tables, key) = body(), path.split(".")
    if tables[:1] == ["sources"]:
        tables, key = ["sources"], path.removeprefix("sources.")
    at = bad
    for table in tables:
        at = at[table]
    at[key] = value
    if value is DELETED:
        del at[key]
    with pytest.raises(ProfileError) as caught:
        HardwareProfile.from_dict(bad, "board.toml")
    assert str(caught.value).startswith(f"board.toml: {subject}") or subject in str(caught.value).split(",")[0]
    assert caught.value.exit_code == ExitCode.PROFILE


def test_whole_numbers_may_be_written_as_toml_has_large_ones() -> None:
    profile = HardwareProfile.from_dict({**body(), "cpu": {**body()["cpu"], "clock_hz": 1.5e9}})
    assert profile.cpu.clock_hz == 1_500_000_000


@pytest.mark.parametrize("text", ["not toml", "\ud800"])
def test_what_is_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ProfileError, match=r"board\.toml"):
        HardwareProfile.from_toml(path)


@pytest.mark.parametrize("text", ["", "null", '{"format": "other/1"}', "[" * 100_000])
def test_what_is_no_profile_json_is_refused(text: str) -> None:
    with pytest.raises(ProfileError):
        HardwareProfile.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_anything_in_place_of_a_value_is_a_profile_error_or_fine(data: st.DataObject) -> None:
    changed = body()
    target, keys = changed, list(changed)
    while True:
        key = data.draw(st.sampled_from(keys))
        if isinstance(target[key], dict) and data.draw(st.booleans()):
            target, keys = target[key], list(target[key])
            continue
        target[key] = data.draw(JSON)
        break
    try:
        profile = HardwareProfile.from_json(json.dumps({"format": "fedprune.profile/1", **changed}))
    except ProfileError:
        return
    assert HardwareProfile.from_json(profile.to_json()) == profile


def own(folder: Path, name: str, title: str) -> Path:
    folder.mkdir(exist_ok=True)
    text = (profile_store.shipped_profiles_folder() / "raspberry-pi-4b.toml").read_text()
    path = folder / f"{name}.toml"
    path.write_text(text.replace('"raspberry-pi-4b"', f'"{name}"').replace("Raspberry Pi 4 Model B (2 GB)", title))
    return path


def test_a_file_is_read_by_its_path_or_in_a_folder_by_its_name(tmp_path: Path) -> None:
    assert (
        profile_store.find_profile(str(own(tmp_path, "my-board", "Mine"))).title
        == profile_store.find_profile("my-board", [tmp_path]).title
        == "Mine"
    )
    assert "my-board" in profile_store.profile_names([tmp_path])


def test_json_is_read_like_toml(tmp_path: Path) -> None:
    profile = profile_store.find_profile("raspberry-pi-5")
    path = tmp_path / "board.json"
    path.write_text(profile.to_json())
    assert profile_store.find_profile(path) == profile


def test_own_folders_win_over_shipped_profiles(tmp_path: Path) -> None:
    own(tmp_path, "raspberry-pi-5", "Mine")
    assert profile_store.find_profile("raspberry-pi-5", [tmp_path]).title == "Mine"


def test_a_file_is_named_like_its_profile(tmp_path: Path) -> None:
    own(tmp_path, "my-board", "Mine").rename(tmp_path / "other.toml")
    with pytest.raises(ProfileError, match=r"other\.toml: name") as caught:
        profile_store.find_profile("other", [tmp_path])
    assert caught.value.got == "'my-board'"


@pytest.mark.parametrize(
    ("name", "folder", "subject"),
    [("pi-9", ".", "pi-9"), ("gone.toml", ".", "gone"), ("pi", "nowhere", "nowhere"), ("boards", ".", "boards")],
)
def test_what_is_no_profile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, subject: str
) -> None:
    (tmp_path / "boards").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError, match=subject):
        profile_store.find_typed_profile(name, [Path(folder)])


def test_a_folder_does_not_hide_a_profile_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raspberry-pi-5").mkdir()
    monkeypatch.chdir(tmp_path)
    assert profile_store.find_typed_profile("raspberry-pi-5") == profile_store.find_profile("raspberry-pi-5")


def test_a_profile_has_one_text_however_it_was_made() -> None:
    for name in profile_store.profile_names():
        profile = profile_store.find_profile(name)
        read = HardwareProfile.from_json(profile.to_json())
        assert profile.to_json() == read.to_json() == replace(profile).to_json()
