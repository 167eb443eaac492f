"""Hardware profiles: what is shipped is sound, and what is unsound says so in one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ExitCode, ProfileError
from fedprune.planning import profile_store
from fedprune.planning.profile import SECTIONS, HardwareProfile

pytestmark = pytest.mark.board


def body() -> dict[str, Any]:
    return deepcopy(profile_store.find("jetson-orin-nano").to_dict())


@pytest.mark.parametrize("name", profile_store.shipped())
def test_every_figure_of_a_shipped_profile_has_a_source(name: str) -> None:
    profile = profile_store.find(name)
    assert set(profile.sources) == set(profile.figures())


@pytest.mark.parametrize("name", profile_store.shipped())
def test_a_shipped_profile_leaves_room_for_training(name: str) -> None:
    profile = profile_store.find(name)
    assert 0 < profile.training_bytes < profile.memory.total_bytes - profile.memory.reserve_bytes


def refused(spec: Field[Any]) -> list[object]:
    """Values on the other side of each limit of a figure."""
    meta = spec.metadata
    if meta["kind"] == "number":
        whole: list[object] = [meta["low"] + 0.5] if spec.type == "int" else []
        low, high = meta["low"] - max(1, meta["low"]), 2 * meta["high"] + 1
        return [low, high, float("nan"), float("inf"), 10**400, "8 GB", True, [4], None, *whole]
    return {"texts": ["neon", [""], 3], "flag": [1, "yes", None], "text": [3.13, "", None]}[meta["kind"]] + (
        ["magic"] if meta.get("choices") else []
    )


FIGURES = [(section, spec) for section, (kind, _) in SECTIONS.items() for spec in fields(kind)]


@pytest.mark.parametrize(("section", "spec"), FIGURES, ids=[f"{s}.{f.name}" for s, f in FIGURES])
def test_a_figure_that_is_bad_or_missing_is_named_with_its_file(section: str, spec: Field[Any]) -> None:
    for value in refused(spec):
        bad = body()
        bad[section][spec.name] = value
        with pytest.raises(ProfileError) as caught:
            HardwareProfile.from_dict(bad, "board.toml")
        assert str(caught.value).startswith(f"board.toml: {section}.{spec.name}")
        assert caught.value.expected is not None
        assert caught.value.got is not None
        assert caught.value.exit_code == ExitCode.PROFILE
    bad = body()
    if bad[section].pop(spec.name, None) is not None and spec.default is MISSING:
        with pytest.raises(ProfileError, match=f"{section}.{spec.name} is missing"):
            HardwareProfile.from_dict(bad)


CHANGES: list[tuple[str, Any, str]] = [
    ("memory.reserve_bytes", 2**49, r"memory\.reserve_bytes: expected less than"),
    ("power.idle_w", 30.0, r"power\.idle_w: expected at most"),
    ("arch", "armv7l", "aarch64, x86_64"),
    *(("name", name, "name") for name in ("", "Raspberry Pi", "a/b", 4)),
    ("colour", 1, "profile: unknown key 'colour'"),
    ("memory.total_mb", 1, "profile: memory: unknown key 'total_mb'"),
    ("sources.memory.total_bytes", None, r"memory\.total_bytes has no source"),
    ("sources.memory.colour", "https://example.org/colours", r"sources\.memory\.colour"),
    *(("sources.cpu.cores", source, r"sources\.cpu\.cores") for source in ("", "somewhere", "estimate: ", 4)),
    *((section, None, rf"\[{section}\] is missing") for section, (_, required) in SECTIONS.items() if required),
    ("support", "limited", "advice: expected what a user can do"),
    ("advice", "Do this.", "advice: expected what a user can do"),
]


@pytest.mark.parametrize(("path", "value", "said"), CHANGES, ids=str)
def test_what_is_unknown_missing_or_contradicts_itself_is_named(path: str, value: Any, said: str) -> None:
    """None in place of a value leaves the key out."""
    bad, (*tables, key) = body(), path.split(".")
    bad["sources"]["power"]["idle_w"] = "estimate: for this test"
    at = bad
    for table in tables:
        at = at[table]
    at[key] = value
    if value is None:
        del at[key]
    with pytest.raises(ProfileError, match=said):
        HardwareProfile.from_dict(bad)


@pytest.mark.parametrize("text", ["not toml", "\ud800"])
def test_what_is_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ProfileError, match=r"board\.toml[:0-9]*: this is not TOML"):
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


def test_a_second_tier_profile_survives_json() -> None:
    profile = profile_store.find("jetson-nano")
    assert HardwareProfile.from_json(profile.to_json()) == profile


def own(folder: Path, name: str, title: str) -> Path:
    folder.mkdir(exist_ok=True)
    text = (profile_store.shipped_folder() / "raspberry-pi-4b.toml").read_text()
    path = folder / f"{name}.toml"
    path.write_text(text.replace('"raspberry-pi-4b"', f'"{name}"').replace("Raspberry Pi 4 Model B (2 GB)", title))
    return path


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


@pytest.mark.parametrize("suffix", [".toml"])
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
