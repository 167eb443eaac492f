"""`profiles list | show | check`: what people and programs read, and how it ends."""

import argparse
import json
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode, ProfileError
from fedprune.planning import profile_store
from fedprune.planning.profile import HardwareProfile
from fedprune_export.cli import profiles


def run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    profiles.register(parser.add_subparsers())
    arguments = parser.parse_args(["profiles", *words])
    arguments.function(arguments)


def own(folder: Path, name: str = "mine", cores: int = 4) -> Path:
    text = (profile_store.shipped_profiles_folder() / "raspberry-pi-5.toml").read_text()
    path = folder / f"{name}.toml"
    path.write_text(
        text.replace('name = "raspberry-pi-5"', f'name = "{name}"').replace("cores = 4", f"cores = {cores}")
    )
    return path


def test_the_list_has_every_shipped_profile_and_those_of_own_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own(tmp_path)
    names = sorted([*profile_store.shipped_profile_names(), "mine"])
    run("list", "--folder", str(tmp_path))
    assert [row.split("\t")[0] for row in capsys.readouterr().out.splitlines()] == ["name", *names]
    run("list", "--folder", str(tmp_path), "--json")
    assert [HardwareProfile.from_dict(b).name for b in json.loads(capsys.readouterr().out)] == names


def test_a_bad_file_keeps_no_other_profile_from_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own(tmp_path)
    own(tmp_path, "bad", -4)
    with pytest.raises(ProfileError, match=r"bad\.toml: cpu\.cores"):
        run("list", "--folder", str(tmp_path))
    rows = [row.split("\t")[0] for row in capsys.readouterr().out.splitlines()]
    assert rows == ["name", *sorted([*profile_store.shipped_profile_names(), "mine"])]
    (tmp_path / "worse.toml").write_text("name = 1")
    with pytest.raises(ProfileError, match=r"^2 of \d+.*bad\.toml.*worse\.toml"):
        run("list", "--json", "--folder", str(tmp_path))
    assert len(json.loads(capsys.readouterr().out)) == len(rows) - 1


@pytest.mark.parametrize("words", [("show", "pi-9"), ("list", "--folder", "nosuch")])
def test_what_is_not_there_ends_with_the_code_of_profiles(words: tuple[str, ...]) -> None:
    with pytest.raises(ProfileError, match=words[-1]) as caught:
        run(*words)
    assert caught.value.exit_code == ExitCode.PROFILE == 12


def test_a_profile_is_shown_with_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    name = "raspberry-pi-4b"
    run("show", name)
    out = capsys.readouterr().out
    profile = profile_store.find_profile(name)
    assert profile.title in out
    for key, source in profile.sources.items():
        assert any(row.startswith(f"{key}\t") and row.endswith(source) for row in out.splitlines())


def test_shipped_files_pass_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(map(str, profile_store.shipped_profiles_folder().glob("*.toml")))
    run("check", *files)
    assert [row.split(": ok")[0] for row in capsys.readouterr().out.splitlines()] == files


def test_the_check_reports_good_files_and_names_every_bad_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = own(tmp_path), own(tmp_path, "bad", -4)
    with pytest.raises(ProfileError, match=r"bad\.toml: cpu\.cores.*got -4"):
        run("check", str(bad), str(good))
    assert f"{good}: ok" in capsys.readouterr().out
    with pytest.raises(ProfileError):
        run("check", "--json", str(bad), str(good))
    rows = {Path(r["file"]).name: r["ok"] for r in json.loads(capsys.readouterr().out)}
    assert rows == {"bad.toml": False, "mine.toml": True}
    with pytest.raises(ProfileError, match=r"2 of 2 .*bad.*absent"):
        run("check", str(bad), str(tmp_path / "absent.toml"))


def test_a_board_is_identified_from_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("identify", "--model", "ACME Box", "--compatible", "nvidia,tegra234", "--memory", "16000000000")
    run(*words, "--l4t", "36.4.3")
    assert capsys.readouterr().out.splitlines() == [
        "jetson-orin-nx: NVIDIA Jetson Orin NX 16 GB",
        "  because of processor: tegra234",
        "  because of memory: 16.0 GB",
        "  because of L4T 36.4.3: JetPack 6.2",
    ]
    run(*words, "--json")
    assert json.loads(capsys.readouterr().out)["profile"] == "jetson-orin-nx"
