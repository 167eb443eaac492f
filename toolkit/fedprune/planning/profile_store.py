"""The hardware profiles on this machine: shipped with the package, in a checkout, or in folders of users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedprune.core.disk import path_exists, read_file
from fedprune.core.errors import ProfileError, UnknownProfileError, did_you_mean, path_remedy
from fedprune.planning.profile import HardwareProfile

_SUFFIXES = (".toml", ".json")


def shipped_profiles_folder() -> Path:
    """The folder of fedprune's own profiles, inside the installed package or the checkout. Raises `ProfileError`."""
    package = Path(__file__).resolve().parent
    for folder in (package / "hardware_profiles", *(p / "hardware_profiles" for p in package.parents)):
        if any(folder.glob("*.toml")):
            return folder
    raise ProfileError("the shipped hardware profiles are missing", hint="Install fedprune again.")


def shipped_profile_names() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in shipped_profiles_folder().glob("*.toml")))


def profile_names(folders: Sequence[Path] = ()) -> tuple[str, ...]:
    """Sorted names of all profiles, shipped and in these folders. Raises `ProfileError` if one of the folders isn't
    there."""
    _check_folders(folders)
    own_names = (p.stem for folder in folders for s in _SUFFIXES for p in folder.glob(f"*{s}"))
    return tuple(sorted({*own_names, *shipped_profile_names()}))


def read_profile(path: Path) -> HardwareProfile:
    """The profile in a TOML or JSON file. Raises `ProfileError`, which names the file."""
    if path.suffix != ".json":
        return HardwareProfile.from_toml(path)
    try:
        raw = read_file(path, 2**20)
    except OSError as error:
        raise ProfileError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    return HardwareProfile.from_json(raw, str(path))


def find_profile(name_or_path: str | Path, folders: Sequence[Path] = ()) -> HardwareProfile:
    """The profile of that name, looked up in `folders` before the shipped ones, or in that TOML or JSON file. Raises
    `ProfileError` if it does not exist or is inconsistent, its file has another name than the profile in it, or one of
    the folders isn't there."""
    _check_folders(folders)
    text = str(name_or_path)
    # A name never has a slash or a suffix, so that a path can't be taken for one.
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(_SUFFIXES):
        return read_profile(Path(name_or_path))
    # A user's folders come first: a profile of theirs replaces a shipped one of its name.
    for folder in (*folders, shipped_profiles_folder()):
        for suffix in _SUFFIXES:
            path = folder / f"{text}{suffix}"
            if path_exists(path, file=True):
                profile = read_profile(path)
                if profile.name != text:
                    raise ProfileError(
                        f"{path}: name", expected=repr(text), got=repr(profile.name), hint="Rename the file."
                    )
                return profile
    available = profile_names(folders)
    # The beginning of several names, such as jetson, is meant for none of them in particular.
    is_family = sum(name.startswith(text) for name in available) > 1
    raise UnknownProfileError(
        f"there is no hardware profile called {text!r}{'' if is_family else did_you_mean(text, available)}",
        expected=f"one of {', '.join(available)}, or a path",
        hint="docs/add-a-board.md shows how to write one, and where to put it.",
    )


def find_typed_profile(name_or_path: str, folders: Sequence[Path] = ()) -> HardwareProfile:
    """The profile of a name or path that a user typed. Raises `ProfileError` as `find_profile`, and says so if it is a
    folder, or a file of another kind."""
    try:
        return find_profile(name_or_path, folders)
    except ProfileError as error:
        path = Path(name_or_path)
        if path.is_dir() or (path.is_file() and path.suffix not in _SUFFIXES):
            kind = "a folder" if path.is_dir() else "no TOML or JSON file"
            raise ProfileError(
                f"{name_or_path} is {kind}", expected="a profile's name, or a TOML or JSON file of one profile"
            ) from error
        raise


def _check_folders(folders: Sequence[Path]) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise ProfileError(
                f"{folder.absolute()} is no folder", expected="a folder of TOML or JSON files, one per profile"
            )
