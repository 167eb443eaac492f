"""The parts of a data set, for training, validation and testing, that its own files name by folder or by image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fedprune.core.disk import read_file
from fedprune.core.errors import DataError, error_reason
from fedprune_device.data.yolo_settings import PARTS, YoloSettings

_MAX_LIST_BYTES = 64 * 2**20  # a list of a million images
_VOC_LISTS = Path("ImageSets", "Main")


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
