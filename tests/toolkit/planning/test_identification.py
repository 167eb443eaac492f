"""A board is known by its device tree, its memory and its clock; its L4T release says what it brings along."""

from pathlib import Path

import pytest

from fedprune.core.errors import ProfileError
from fedprune.planning import profile_store
from fedprune.planning.identification import BoardFacts, identify
from fedprune.planning.jetpack_releases import l4t_release

pytestmark = pytest.mark.board


def aarch64(model: str = "", *compatible: str, **facts: object) -> BoardFacts:
    return BoardFacts(model, compatible, machine="aarch64", **facts)  # type: ignore[arg-type]


def own(folder: Path, name: str, like: str, *changes: tuple[str, str]) -> None:
    text = (profile_store.shipped_profiles_folder() / f"{like}.toml").read_text().replace(f'"{like}"', f'"{name}"', 1)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.toml").write_text(text)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2w"),
        ("Raspberry Pi Compute Module 4 Rev 1.0", "raspberry-pi-4b"),
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("NVIDIA Orin NX Developer Kit", "jetson-orin-nx"),
        ("quill", "jetson-tx2"),
    ],
)
def test_a_board_is_known_by_its_name(model: str, name: str) -> None:
    identified = identify(aarch64(model))

    assert identified.profile.name == name
    assert identified.is_certain


@pytest.mark.parametrize(("memory", "name"), [(7_600_000_000, "jetson-orin-nano"), (65_800_000_000, "jetson-agx-orin")])
def test_memory_tells_modules_of_one_processor_apart(memory: int, name: str) -> None:
    identified = identify(aarch64("ACME Box", "acme,box", "nvidia,tegra234", memory_total=memory))

    assert identified.profile.name == name
    assert not identified.is_certain
    assert identified.evidence == ("processor: tegra234", f"memory: {memory / 1e9:.1f} GB")


def test_editions_of_one_name_are_told_apart_by_memory_and_then_by_clock(tmp_path: Path) -> None:
    own(tmp_path, "pi-4-8gb", "raspberry-pi-4b", ("1_900_000_000", "7_900_000_000"))
    own(tmp_path, "pi-4-slow", "raspberry-pi-4b", ("1_500_000_000", "1_250_000_000"))
    model = "Raspberry Pi 4 Model B Rev 1.5"

    assert identify(aarch64(model, memory_total=8_000_000_000), [tmp_path]).profile.name == "pi-4-8gb"
    slow = aarch64(model, memory_total=1_900_000_000, clock_hz=1_250_000_000)
    assert identify(slow, [tmp_path]).profile.name == "pi-4-slow"
    usual = aarch64(model, memory_total=1_900_000_000, clock_hz=1_500_000_000)
    assert identify(usual, [tmp_path]).profile.name == "raspberry-pi-4b"


@pytest.mark.parametrize(("machine", "name"), [("aarch64", "generic-aarch64"), ("x86_64", "generic-x86-64")])
def test_an_unknown_board_gets_the_generic_profile(machine: str, name: str) -> None:
    identified = identify(
        BoardFacts("Raspberry Pi 5 emulated" if machine == "x86_64" else "Banana Pi", machine=machine)
    )

    assert identified.profile.name == name
    assert not identified.is_certain
    assert identified.differences == ()


def test_an_unknown_machine_has_no_profile() -> None:
    with pytest.raises(ProfileError, match=r"riscv64"):
        identify(BoardFacts("VisionFive", machine="riscv64"))


def test_a_jetpack_that_is_too_old_for_a_first_tier_board_is_said() -> None:
    identified = identify(aarch64("NVIDIA Jetson AGX Orin Developer Kit", l4t="35.4.1"))
    assert any("Python 3.8" in d and "flash a newer one" in d for d in identified.differences)


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan", "36.4.3"),
        ("# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64", "32.7.1"),
        ("R39 (release), REVISION: 2", "39.2"),
        ("something else", ""),
        ("# R36 (release), REVISION: 4.3.1.1, GCID: 1", ""),
    ],
)
def test_the_release_file_is_read(text: str, release: str) -> None:
    assert l4t_release(text) == release


@pytest.mark.parametrize("l4t", ["36.x", "36.4.3.2.1", "9" * 50])
def test_a_release_that_is_no_number_is_refused(l4t: str) -> None:
    with pytest.raises(ProfileError, match="L4T"):
        identify(aarch64("NVIDIA Jetson Nano Developer Kit", l4t=l4t))
