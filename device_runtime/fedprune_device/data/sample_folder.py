"""Reads the samples in a folder that the application fills: each round takes the files that exist when it begins."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import open_own_file, read_file, storage_errors
from fedprune.core.errors import DataError
from fedprune.model.input_type import FLOATS, InputType
from fedprune.model.lengths import Shape
from fedprune_device.data.dataset import LocalData, ReadSource
from fedprune_device.data.decoded_samples import CacheFullError, DecodedSamples
from fedprune_device.data.folder_layout import layout_of
from fedprune_device.data.labels import Targets
from fedprune_device.data.layouts import MAX_LABEL_BYTES, NO_LABELS, Layout
from fedprune_device.data.other_files import SINGLE_FILES, WAY_OUT
from fedprune_device.data.splits import SplitShares

INDEX_FILE = "images.index"  # the name of the index in a board's state folder

DECODED_BYTES = 2**30  # most bytes of decoded samples on the disk

_LOG = logging.getLogger("fedprune.device")

_MAX_FILES = 200_000  # files that are looked at: of each class all, or a fair share

# Files that are read at the start if the index doesn't know them; the first round reads the others, so that a board
# with many new files is ready at once.
_MAX_HASHED_AT_START = 1000

# If the same file is in several parts, the last of these decides, so that no sample is trained on and tested on.
_SPLIT_ORDER = ("train", "val", "test")

_T = TypeVar("_T")


_Entry = tuple[int, int, str]


class FileIndex:
    """Digests by path, valid while a file's size and modification time stay the same; without a path only in memory.

    The index has a line of JSON per digest and only grows, until more than half of its lines are stale: then it is
    rewritten. A damaged line is skipped, and its file read again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, _Entry] = {}
        self._seen: set[str] = set()
        self._new_lines: list[str] = []
        self._lines = 0
        self._ends_with_newline = True
        if path is not None:
            with suppress(FileNotFoundError), storage_errors(f"can't read {path}", missing=True):
                self._read(path)

    @contextmanager
    def update(self) -> Iterator[FileIndex]:
        """Look up every file in the body; at its end entries of other files are dropped, and new ones are written."""
        self._seen = set()
        yield self
        self._entries = {key: self._entries[key] for key in self._seen}
        if self._path is None or not (self._new_lines or self._lines > 2 * len(self._entries) + 100):
            return
        rewrites = self._lines + len(self._new_lines) > 2 * len(self._entries) + 100
        lines = [_line(key, entry) for key, entry in self._entries.items()] if rewrites else self._new_lines
        with storage_errors(f"can't write {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            target = self._path.with_suffix(".new") if rewrites else self._path
            flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if rewrites else os.O_APPEND)
            with os.fdopen(open_own_file(target, flags), "w", encoding="ascii") as file:
                file.write(("" if rewrites or self._ends_with_newline else "\n") + "".join(lines))
            if rewrites:
                target.replace(self._path)
        self._lines = len(lines) + (0 if rewrites else self._lines)
        self._new_lines, self._ends_with_newline = [], True

    def find_digest(self, key: str, status: os.stat_result) -> str | None:
        size, changed, digest = self._entries.get(key, (-1, -1, ""))
        if (size, changed) != (status.st_size, status.st_mtime_ns):
            return None
        self._seen.add(key)
        return digest

    def add(self, key: str, status: os.stat_result, digest: str) -> str:
        self._entries[key] = (status.st_size, status.st_mtime_ns, digest)
        self._seen.add(key)
        self._new_lines.append(_line(key, self._entries[key]))
        return digest

    def _read(self, path: Path) -> None:
        with path.open(encoding="ascii", errors="replace") as file:
            for line in file:
                self._lines += 1
                self._ends_with_newline = line.endswith("\n")
                with suppress(ValueError, TypeError, OverflowError, RecursionError):
                    key, size, changed, digest = json.loads(line)
                    if isinstance(key, str) and isinstance(digest, str) and len(digest) == 64:
                        self._entries[key] = (int(size), int(changed), digest)


def _line(key: str, entry: _Entry) -> str:
    return json.dumps([key, *entry]) + "\n"


@dataclass(frozen=True)
class _File:
    """A file with a sample, and the file of its labels."""

    path: Path
    label_file: Path | None
    name: str  # its sha256, which decides the split of its samples, and whether it is among the chosen files
    version: str  # changes when its labels change
    split: str  # train, test or val

    @property
    def key(self) -> str:
        return f"{self.name} {self.version}"


class Format(Protocol):
    """A file format, such as `image_decoding.Pixels` and `audio_decoding.Audio`; `sources.SampleOptions` lists those in
    use."""

    @property
    def endings(self) -> tuple[str, ...]:
        """File name extensions, in lower case, such as `.wav`."""

    @property
    def max_bytes(self) -> int:
        """Larger files are refused before they are read."""

    def samples(self, body: bytes, shape: Shape) -> npt.NDArray[Any]:
        """A file's samples [k, ...], k >= 1, in their most compact type; `shape` is the model's input shape.

        Raises `DataError` if the file is damaged or can't be a sample of this shape.
        """

    def numbers(self, samples: npt.NDArray[Any], shape: Shape) -> npt.NDArray[np.float32]:
        """Samples as a model of floats takes them."""

    def whole_numbers(self, samples: npt.NDArray[Any], shape: Shape) -> npt.NDArray[np.uint8]:
        """Samples as a model of whole numbers takes them; raises `DataError` if they aren't made of any."""


class SampleFolder(ReadSource):
    """A board's samples as files in one of the layouts of `data.layouts`, each in one of `formats`. `root` is their
    folder, or one file, which counts as a folder of one.

    A round's files are decoded once, into a file without a name of at most `room` bytes; batches are read from there.
    A round takes at most `max_samples` samples: a fair share per class, chosen by the files' digests, always the same.
    `state` is a folder for that file and for the index of digests; without one the index is only in memory. Raises
    `ConfigError` if a folder is not a class.
    """

    def __init__(
        self,
        root: Path,
        formats: tuple[Format, ...],
        shares: SplitShares,
        max_samples: int,
        class_names: tuple[str, ...] = (),
        state: Path | None = None,
        room: int = DECODED_BYTES,
    ) -> None:
        super().__init__(root)
        self._root, self._shares, self._max_samples = root, shares, max_samples
        self._formats = {ending: one for one in formats for ending in one.endings}
        self._names, self._state, self._room = class_names, state, room
        self._index = FileIndex(None if state is None else state / INDEX_FILE)
        self._decoded: tuple[object, DecodedSamples] | None = None
        self._chosen: list[_File] = []
        self._foreign_counts: Counter[str] = Counter()  # files by endings that aren't read
        self._unlabelled_counts: Counter[str] = Counter()  # files without labels, by what is missing
        self._refusals: list[str] = []  # why files were left out when they were last looked at
        self._choose_files(_MAX_HASHED_AT_START)

    def snapshot(
        self, shape: Shape | None = None, targets: Targets | None = None, input_type: InputType = FLOATS
    ) -> LocalData:
        """The samples that exist now; unreadable files are logged and left out. Raises `DataError` if none is left."""
        if shape is None:
            raise DataError("the shape of samples", expected="a model's input")
        layout = self._choose_files()
        layout.check(targets)
        rows_by_split: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        decoded, samples_left = self._cache_for((shape, targets)), self._max_samples
        formats: set[Format] = set()
        refusals = [*self._refusals]
        for file in self._chosen:
            try:
                file_rows = decoded.rows_for(file.key, partial(self._decode, layout, file, shape, targets))
            except CacheFullError:
                _LOG.warning("files of %s are left out: decoded ones may take %d bytes", self._root, self._room)
                break
            except (OSError, DataError) as error:
                refusals.append(getattr(error, "strerror", None) or str(error))  # no path, which the server would see
                _LOG.warning("%s is left out: %s", file.path, refusals[-1])
                continue
            rows_by_split[file.split] += file_rows[:samples_left]
            samples_left -= min(samples_left, len(file_rows))
            formats.add(self._format(file.path))
            if not samples_left:
                break
        if not rows_by_split["train"]:
            raise self._nothing_to_train_on(layout, sum(map(len, rows_by_split.values())), refusals)
        # Files of earlier rounds are not decoded again, so that what was noted of them stays.
        self._notes.replace(dict.fromkeys((*self._notes.texts, *layout.notes)))
        sample_format = formats.pop()
        numbers = sample_format.whole_numbers if input_type.is_whole else sample_format.numbers
        convert = partial(numbers, shape=shape)
        arrays: list[Any] = []
        for split in ("train", "test", "val"):
            rows = np.array(rows_by_split[split], np.int64)
            x, y = decoded.inputs(rows, convert), decoded.labels(rows)
            arrays += [x, x if y.shape[1:] == NO_LABELS.shape else y]
        self._training_count = len(rows_by_split["train"])
        return LocalData(*arrays)

    def _nothing_to_train_on(self, layout: Layout, held_out: int, refusals: list[str]) -> DataError:
        """The error if there is nothing to train on. It names one cause, because the server doesn't see the log."""
        hint = ""
        if held_out:
            got = f"{held_out} held out for testing and validation"
        elif refusals:
            got = f"{len(refusals)} that don't fit, such as one for this reason: {refusals[0]}"
        elif self._foreign_counts:
            ending, count = self._foreign_counts.most_common(1)[0]
            way_out = WAY_OUT[ending]
            got, hint = f"{count} that end in {ending}", f"{way_out[0].upper()}{way_out[1:]}."
        else:
            got = f"none that ends in {', '.join(self._formats)}"
            hint = next((hint for ending, hint in SINGLE_FILES.items() if any(layout.files((ending,)))), "")
        return DataError(f"{self._root} has nothing to train on", expected=layout.expected_files, got=got, hint=hint)

    def _decode(
        self, layout: Layout, file: _File, shape: Shape, targets: Targets | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """A file's samples and labels."""
        label_bytes = b"" if file.label_file is None else self._content(file.label_file)
        label = layout.label(file.path, label_bytes, shape, targets)
        x = self._format(file.path).samples(self._content(file.path), shape)
        return x, np.broadcast_to(label, (len(x), *label.shape))

    def _cache_for(self, key: object) -> DecodedSamples:
        """Decoded samples of earlier rounds, unless they are for another model or too many are no longer chosen."""
        keys = {file.key for file in self._chosen}
        if self._decoded is None or self._decoded[0] != key or not self._decoded[1].is_worth_keeping(keys):
            self._decoded = None
            self._decoded = key, DecodedSamples(self._state, self._room)
        return self._decoded[1]

    def _choose_files(self, max_new: int = _MAX_FILES) -> Layout:
        """Find the files and choose among them; at most `max_new` files that the index doesn't know are read."""
        layout = layout_of(self._root, self._names)
        paths_by_class = layout.files((*self._formats, *WAY_OUT))
        endings = (path.suffix.lower() for paths in paths_by_class for path in paths)
        counts = Counter(ending for ending in endings if ending not in self._formats)
        for ending in counts.keys() - self._foreign_counts.keys():
            _LOG.warning("files of %s that end in %s are left out: %s", self._root, ending, WAY_OUT[ending])
        self._foreign_counts = counts
        paths_by_class = [[path for path in paths if path.suffix.lower() in self._formats] for paths in paths_by_class]
        if (count := sum(map(len, paths_by_class))) > _MAX_FILES:
            _LOG.warning("%s holds %d files; %d are looked at, of every class", self._root, count, _MAX_FILES)
        class_of = {path: number for number, paths in enumerate(paths_by_class) for path in paths}
        file_of_digest: list[dict[str, _File]] = [{} for _ in paths_by_class]  # the same files count once
        self._refusals = []
        unlabelled: dict[str, list[Path]] = {}
        reads = iter(range(max_new))
        with self._index.update() as index:
            for path in islice(_interleave(paths_by_class), _MAX_FILES):
                label_file = None
                try:
                    label_file = layout.label_file(path)
                    file = self._identify(layout, path, label_file, index, reads)
                    if file is not None:
                        same_content = file_of_digest[class_of[path]].get(file.name, file)
                        file_of_digest[class_of[path]][file.name] = max(
                            file, same_content, key=lambda f: _SPLIT_ORDER.index(f.split)
                        )
                except FileNotFoundError:
                    if label_file is not None and path.exists():
                        unlabelled.setdefault(layout.missing_label_text(path), []).append(path)
                    continue  # otherwise the file was deleted or renamed since it was listed
                except (OSError, DataError) as error:
                    self._refusals.append(getattr(error, "strerror", None) or str(error))
                    _LOG.warning("%s is left out: %s", path, self._refusals[-1])
        self._count_unlabelled(unlabelled)
        files_by_class = [[files_by_name[name] for name in sorted(files_by_name)] for files_by_name in file_of_digest]
        self._chosen = list(islice(_interleave(files_by_class), self._max_samples))
        self._training_count = sum(file.split == "train" for file in self._chosen)
        return layout

    def _identify(
        self, layout: Layout, path: Path, label_file: Path | None, index: FileIndex, reads: Iterator[int]
    ) -> _File | None:
        """A file with its digest; None if the index doesn't know it and no more of `reads` are left."""
        names: list[str] = []
        for hashed_path in (path,) if label_file is None else (path, label_file):
            status, key = hashed_path.lstat(), str(hashed_path.relative_to(self._root))
            name = index.find_digest(key, status)
            if name is None:
                if next(reads, None) is None:
                    return None
                name = index.add(key, status, hashlib.sha256(self._content(hashed_path)).hexdigest())
            names.append(name)
        version = " ".join([layout.version(path), *names[1:]])
        return _File(path, label_file, names[0], version, self._split(layout, path, names[0]))

    def _split(self, layout: Layout, path: Path, name: str) -> str:
        """The split that a file's folder names; by default one by the file's digest, of the splits without a folder."""
        folder_part = layout.split_of(path)
        if folder_part in ("val", "test"):
            return folder_part
        split = self._shares.split_of(name)
        return "train" if split in layout.splits else split

    def _count_unlabelled(self, unlabelled: Mapping[str, list[Path]]) -> None:
        counts = Counter({reason: len(paths) for reason, paths in unlabelled.items()})
        for reason, paths in unlabelled.items():
            self._refusals += [reason] * len(paths)
            if counts[reason] != self._unlabelled_counts[reason]:  # not in each round the same again
                first = paths[0].name
                _LOG.warning("images of %s are left out (%d, such as %s): %s", self._root, len(paths), first, reason)
        self._unlabelled_counts = counts

    def _format(self, path: Path) -> Format:
        return self._formats[path.suffix.lower()]

    def _content(self, path: Path) -> bytes:
        has_sample = path.suffix.lower() in self._formats
        # No links, which could lead to any file of the board.
        return read_file(path, self._format(path).max_bytes if has_sample else MAX_LABEL_BYTES, own=True)


def _interleave(queues: Iterable[list[_T]]) -> Iterable[_T]:
    return (item for turn in zip_longest(*queues) for item in turn if item is not None)
