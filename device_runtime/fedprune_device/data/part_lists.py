"""The parts of a data set, for training, validation and testing, that its own files name by folder or by image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath

from fedprune.core.disk import open_file, read_file, storage_errors
from fedprune.core.errors import ConfigError, DataError, error_reason
from fedprune_device.data.folder_listing import files_in

_MAX_LIST_BYTES = 64 * 2**20  # a list of a million images
_VOC_LISTS = Path("ImageSets", "Main")


_YAML_FILES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")  # Ultralytics, Roboflow
_MAX_YAML_FILES = 20  # that are looked into
MAX_BYTES = 2**16
_MAX_ENTRY_LENGTH = 1000  # characters of an entry; the pattern's time grows faster than a line's length
PARTS = ("train", "val", "test")

# No two parts that follow each other match the same spaces: trying all ways to divide them takes minutes.
_ENTRY = re.compile(
    r"""(?:-[ \t]|(\d+)[ \t]*:)[ \t]*("[^"]*"|'[^']*'|(?:[^\s#](?:[^#\n]|(?<!\s)\#)*?)?)[ \t]*(?:[ \t]\#.*)?"""
)
_ITEM = re.compile(r"""(?:(\d+)[ \t]*:[ \t]*)?("[^"]*"|'[^']*'|[^\s,\[\]{}'"][^,\[\]{}\n'"]*)|(?P<end>[\]}])""")
_SCALAR = re.compile(r"""("[^"]*"|'[^']*'|[^#\n]*?)[ \t]*(?:(?:^|[ \t])\#.*)?""")


@dataclass(frozen=True)
class YoloSettings:
    """Paths of each part's images, as the file has them, and whether labels have keypoints behind their boxes."""

    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_keypoints: bool = False


# Boards have no library for YAML. These files are short and of a few forms, and what has another form is an error.
def read_yolo_settings(folders: Iterable[Path]) -> YoloSettings:
    """The settings in the first of the folders' `yaml_files`, with its errors."""
    path = next((path for folder in folders for path in yaml_files(folder)), None)
    if path is None:
        return YoloSettings()
    text = read_text(path)
    texts = {part: _paths(text, part) for part in PARTS}
    has_keypoints = _head(text, "kpt_shape") is not None
    return YoloSettings({part: paths for part, paths in texts.items() if paths}, has_keypoints)


def yaml_files(folder: Path) -> list[Path]:
    """The files of a folder that describe a data set: those of the usual names, or else the one that has `names`.

    Raises `ConfigError` if several have, `StorageError` if one can't be read.
    """
    if usual := [folder / name for name in _YAML_FILES if (folder / name).is_file()]:
        return usual
    others = files_in(folder, (".yaml", ".yml"))[:_MAX_YAML_FILES] if folder.is_dir() else []
    described = [path for path in others if path.is_file() and _head(read_text(path), "names") is not None]
    if len(described) > 1:
        raise ConfigError(
            f"names of classes in {folder}",
            expected=f"one file with `names`, such as {_YAML_FILES[0]}",
            got=" and ".join(path.name for path in described),
            hint=f"Rename the one that counts to {_YAML_FILES[0]}.",
        )
    return described


def read_text(path: Path) -> str:
    """The beginning of a text file, of at most `MAX_BYTES`; raises `StorageError`."""
    with storage_errors(f"can't read {path}"), open_file(path) as file:
        return file.read(MAX_BYTES).decode("utf-8-sig", errors="replace")


def yaml_names(text: str) -> tuple[str, ...] | None:
    """The entries of `names`, empty without such a key; None if they are neither a list nor numbered from 0."""
    head = _head(text, "names")
    if head is None:
        return ()
    entries = _entries(head[1], text[head.end() :])
    numbers = [number for number, _ in entries if number]
    if not entries or (numbers and numbers != list(map(str, range(len(entries))))):
        return None
    return tuple(_strip_quotes(name) for _, name in entries)


def _paths(text: str, part: str) -> tuple[str, ...]:
    """The path of a part, or the list of its paths."""
    head = _head(text, part)
    if head is None:
        return ()
    scalar = _SCALAR.fullmatch(head[1]) if len(head[1]) <= _MAX_ENTRY_LENGTH else None
    value = _strip_quotes(scalar[1]) if scalar is not None and not head[1].startswith("[") else ""
    if value:
        return () if value in ("null", "~") else (value,)
    return tuple(_strip_quotes(entry) for _, entry in _entries(head[1], text[head.end() :]))


def _head(text: str, key: str) -> re.Match[str] | None:
    return re.search(rf"^{key}[ \t]*:[ \t]*(.*)$", text, re.MULTILINE)


def _entries(value: str, following: str) -> list[tuple[str, str]]:
    """Entries in YAML, each with its number or without: `[a, b]`, `{0: a, 1: b}`, or a line for each.

    `value` is the text behind the key, `following` the text after that line.
    """
    if value.startswith(("[", "{")):
        items = takewhile(lambda item: not item["end"], _ITEM.finditer(value + following, 1))
        return [(item[1] or "", item[2]) for item in items]
    entries = []
    for line in following.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        entry = _ENTRY.fullmatch(line) if len(line) <= _MAX_ENTRY_LENGTH else None
        if entry is None:
            break
        entries.append((entry[1] or "", entry[2]))
    return entries


def _strip_quotes(name: str) -> str:
    name = name.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name


@dataclass(frozen=True)
class PartLists:
    """The parts of folders, and of single images. If an image is in several lists, the last of `PARTS` decides.

    Attributes:
        folders: The part of each folder; folders that no part has are no samples.
        images: The part of each image, by as much of its path below the data set as its list has, without the file
            name's extension. If there are any, other images are no samples.
        depth: Most names in such a path.
        notes: What was chosen where there was a choice.
    """

    folders: Mapping[Path, str] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    depth: int = 1
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.folders or self.images or self.notes)

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.folders.values(), *self.images.values()))

    def part_of(self, path: Path) -> str | None:
        """The part of an image; None if nothing names it."""
        names = (*path.parent.parts, path.stem)
        keys = ("/".join(names[-count:]) for count in range(self.depth, 0, -1))
        listed_part = next((self.images[key] for key in keys if key in self.images), None)
        return listed_part or self.folders.get(path.parent)

    def has(self, path: Path) -> bool:
        """Whether an image is a sample."""
        return not (self.folders or self.images) or self.part_of(path) is not None


def yolo_part_lists(root: Path, parts_by_name: Mapping[Path, str | None], settings: YoloSettings) -> PartLists:
    """The parts that `data.yaml` names, and else those of the folders' own names, for these folders of images. Raises
    `DataError` if a list can't be read.

    Its paths are those of the machine that wrote it: the longest end of each that is in `root` counts.
    """
    part_of_home: dict[Path, str] = {}
    images: dict[str, str] = {}
    notes, twice, depths = [], set[Path](), _depths(root, parts_by_name)
    for part in PARTS:
        for text in settings.paths.get(part, ()):
            # The file or folder in `root` at the longest end of a path.
            names = _names(text)
            candidates = (root.joinpath(*names[i:]) for i in range(len(names)))
            path = next((path for path in candidates if path.exists()), None)
            if path is None:
                notes.append(f"data.yaml names a path for {part} that is not there")
            elif path.is_file():
                images |= dict.fromkeys(_listed_images(path, depths), part)
            elif part_of_home.get(path, part) != part:
                twice.add(path)
            else:
                part_of_home[path] = part
    for path in twice:  # small examples test on what they train on
        del part_of_home[path]
        notes.append("data.yaml names one folder for several parts: the board divides it itself")
    if not (part_of_home or images) or twice:
        return PartLists(notes=tuple(notes))
    folders: dict[Path, str] = {}
    for folder, own_part in parts_by_name.items():
        homes = (home for home in (folder, *folder.parents) if home in part_of_home)
        if (named_part := next((part_of_home[home] for home in homes), own_part)) is not None:
            folders[folder] = named_part
    return PartLists(folders, images, max(depths, default=1), tuple(notes))


def voc_part_lists(root: Path, folders: Iterable[Path]) -> PartLists:
    """The parts that `ImageSets/Main` lists, for these folders of images; raises `DataError` if it can't be read."""
    lists = {part: root / _VOC_LISTS / f"{part}.txt" for part in PARTS}
    if not lists["train"].is_file():  # VOC's years before 2012 have lists of both together
        lists["train"] = root / _VOC_LISTS / "trainval.txt"
    images, depths = dict[str, str](), _depths(root, folders)
    for part, path in lists.items():
        if path.is_file():
            images |= dict.fromkeys(_listed_images(path, depths), part)
    return PartLists(images=images, depth=max(depths, default=1))


def _depths(root: Path, folders: Iterable[Path]) -> set[int]:
    """How many names the paths of images in these folders have below `root`."""
    return {len(folder.relative_to(root).parts) + 1 for folder in folders}


def _names(text: str) -> list[str]:
    return [name for name in PurePosixPath(text.replace("\\", "/")).parts if name not in ("/", ".", "..")]


def _listed_images(path: Path, depths: set[int]) -> Iterator[str]:
    """The images of a list, a path or a name in each line, as keys of `PartLists.images`.

    A path has all names below the data set, as images of several parts may have the same name and folder. Those above
    it are of another machine.
    """
    try:
        text = read_file(path, _MAX_LIST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path.name} can't be read", got=error_reason(error)) from error
    for line in text.splitlines():
        if names := _names(line.strip()):
            # VOC's names may be followed by a number; a path may have spaces in it.
            stem = PurePosixPath(names[-1]).stem if len(names) > 1 or "." in names[-1] else names[-1].split()[0]
            yield from ("/".join((*names[:-1], stem)[-depth:]) for depth in depths)
