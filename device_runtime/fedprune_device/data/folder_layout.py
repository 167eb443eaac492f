"""Recognises the layout of a folder of samples."""

from __future__ import annotations

from pathlib import Path

from fedprune_device.data.box_layouts import VocBeside, VocBoxes, YoloBeside, YoloBoxes
from fedprune_device.data.folder_listing import files_in, folders_below, folders_in
from fedprune_device.data.image_decoding import ENDINGS
from fedprune_device.data.layouts import (
    IMAGE_FOLDERS,
    ClassFolders,
    LabelledImages,
    Layout,
    MaskFiles,
    SingleFile,
    Unlabelled,
    part_of_folder,
)

_KINDS: tuple[type[LabelledImages], ...] = (MaskFiles, YoloBoxes, VocBoxes)
_KINDS_BESIDE: tuple[type[LabelledImages], ...] = (YoloBeside, VocBeside)


def layout_of(root: Path, names: tuple[str, ...]) -> Layout:
    """The layout of a folder; that of a file is a folder of one. Raises `ConfigError` if a folder is no class,
    `DataError` or `StorageError` if a file about all of its samples can't be read."""
    if root.is_file():
        return SingleFile(root)
    folders = folders_in(root, names)
    folder_splits = [part_of_folder(folder.name) for folder in folders if folder.name not in names]
    is_divided = len(folder_splits) == len(folders) and "train" in folder_splits and all(folder_splits)
    homes = folders if is_divided else [root]
    image_folders = {home: home / name for home in homes for name in IMAGE_FOLDERS
                     if name not in names and (home / name).is_dir()}  # fmt: skip
    if image_folders:
        for kind in _KINDS:
            label_folders = {home: _label_folder(home, kind) for home in image_folders}
            if any(label_folders.values()):
                # Those of the same name below the folder of labels of each home.
                pairs = {
                    folder: (label_folders[home] or home / kind.folders[0]) / folder.relative_to(images)
                    for home, images in image_folders.items()
                    for folder in folders_below(images)
                }
                return kind(root, pairs, names)
        folders = [folder for images in image_folders.values() for folder in folders_below(images)]
    elif any(folders_in(home, names) for home in homes):
        return ClassFolders(root, homes, names)
    else:
        folders = homes
    for kind in _KINDS_BESIDE:
        if any(_has_labels_beside(folder, kind.ending) for folder in folders):
            return kind(root, {folder: folder for folder in folders}, names)
    return Unlabelled(root, folders, names)


def _label_folder(home: Path, kind: type[LabelledImages]) -> Path | None:
    """The folder of a kind's labels; None if there is none. `annotations/` may have files of another kind."""
    candidates = [home / name for name in kind.folders if (home / name).is_dir()]
    if kind is VocBoxes:
        candidates = [c for c in candidates if any(files_in(folder, (kind.ending,)) for folder in folders_below(c))]
    return next(iter(candidates), None)


def _has_labels_beside(folder: Path, ending: str) -> bool:
    stems = {path.stem for path in files_in(folder, (ending,))}
    return bool(stems) and any(path.stem in stems for path in files_in(folder, ENDINGS))
