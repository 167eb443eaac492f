"""Parsers of the samples that boards train on: single files, tables, and whole folders of which one file is damaged."""

import io
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fedprune.core.errors import FedpruneError
from fedprune.model.input_type import InputType
from fedprune_device.cli.predict import _read_samples as samples_to_predict
from fedprune_device.data.array_source import load_data, read_arrays
from fedprune_device.data.audio_decoding import Audio
from fedprune_device.data.box_layouts import voc_boxes, yolo_boxes
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.image_decoding import Pixels, read_mask
from fedprune_device.data.labels import Targets
from fedprune_device.data.reservoir import SampleLimits
from fedprune_device.data.sample_folder import FileIndex, SampleFolder
from fedprune_device.data.sample_store import SampleStore
from fedprune_device.data.segment_log import Kind, LogRecord, SegmentLog
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_array import chunks
from fedprune_device.data.table_windows import TableFile
from support.fakes.sample_files import wav
from support.faults.parser_target import Target, as_file, scratch
from support.faults.parsers_of_files import npz, picture

VOC = (
    b"<annotation><size><width>8</width><height>8</height></size><object><name>ant</name><bndbox><xmin>1</xmin>"
    b"<ymin>1</ymin><xmax>4</xmax><ymax>5</ymax></bndbox></object></annotation>"
)
CSV = b"time,a,class\n1,2,0\n2,2.5,1\n"

_SHAPE = (3, 8, 8)
_ARRAYS = 2 * 2**20  # bytes that numpy's and zipfile's machinery may take for any file
_DECODERS = 200 * 2**20  # bytes of an image of as many pixels, or a recording of as many frames, as a board reads
_ALL = SplitShares(0.0)


@cache
def sample_targets() -> tuple[Target, ...]:
    """All of them."""
    return (*_files(), *_tables(), *_folders(), *_sample_store_targets())


def to_predict(path: Path) -> object:
    """The samples that `fedprune-device predict --input` reads."""
    defaults = {"class_names": (), "device": "", "seed": 0, "validation_share": 0.0}
    predictor: Any = Namespace(input_shape=(4,), input_type=InputType.of("float"))
    return samples_to_predict(Namespace(input=path, split=None, **defaults), predictor, ())


def _files() -> tuple[Target, ...]:
    x, y = np.zeros((4, *_SHAPE), np.float32), np.arange(4)
    sets = npz(x=x, y=y), npz(np.savez, x_train=x, y_train=y, x_test=x, y_test=y)
    label_maps = npz(np.savez, x=x, y=y.repeat(4).reshape(4, 2, 2)), npz(x=x, y=x[:, 0])
    several = npz(sound=x, sight=x[:, 0], y=y), npz(np.savez, a_train=x, b_train=x, y_train=y)
    npy = io.BytesIO()
    np.save(npy, x)
    recordings = wav(b"\0\1" * 99), wav(b"abcdef" * 40, 2, 3, 48_000)

    def read_streamed(path: Path) -> object:
        """Samples that stay in the file, or in a copy of it, as those of a large set do."""
        with patch("fedprune_device.data.spooled_arrays.MAX_SAMPLES_IN_MEMORY", 0):
            return _read(load_data(str(path), validation_share=0.2, spool=scratch()))

    def arrays(name: str, parse: Callable[[Path], object], seeds: tuple[bytes, ...]) -> Target:
        file = as_file(parse, f"{name.replace(' ', '_')}.npz")
        return Target(f"samples.{name}", file, seeds, factor=2200, constant=_ARRAYS, share=0.2)

    return (
        arrays("npz", read_arrays, sets),
        arrays("data", lambda path: load_data(str(path)), sets),
        arrays("several inputs", lambda path: load_data(str(path)), several),
        arrays("streamed", read_streamed, (*sets, *label_maps)),
        arrays("to predict", to_predict, (sets[0], npy.getvalue())),
        Target(
            "samples.recording",
            lambda raw: Audio().samples(raw, (1, 8)),
            recordings,
            factor=200,
            constant=_DECODERS,
            share=0.5,
        ),
        Target("samples.mask", lambda raw: read_mask(raw, 4, 4), (picture("PNG", "L"),), constant=_DECODERS, share=0.5),
        Target("samples.voc", lambda body: voc_boxes(body, ("ant",)), (VOC,), text=True),
        Target("samples.boxes", yolo_boxes, (b"1 .5 .5 .25 .5\n0 .1 .2 .1 .1\n",), text=True),
    )


def _tables() -> tuple[Target, ...]:
    forecast = b"a;b;target_c\n" + b"".join(b"%d;%d.5;-1e3\n" % (n, n) for n in range(40))

    def windows(shape: tuple[int, ...], targets: Targets) -> Callable[[Path], object]:
        return lambda path: _read(TableFile(path, _ALL, 10, spool=scratch()).snapshot(shape, targets))

    last = windows((1, 1), Targets("cross_entropy", 2))
    next_ = windows((2, 3), Targets("mse", 1, (1,)))
    return (
        Target("samples.table", as_file(last, "table.csv"), (CSV,), text=True, constant=2**20),
        Target("samples.forecast", as_file(next_, "forecast.csv"), (forecast,), text=True, constant=2**20),
        Target("samples.parquet", as_file(last, "table.parquet"), _parquet(), constant=2**20, share=0.5),
    )


def _parquet() -> tuple[bytes, ...]:
    """The table of `CSV` in each packing, with and without dictionaries."""
    from pyarrow import table
    from pyarrow.parquet import write_table

    out = []
    for packing, dictionary in (("none", True), ("snappy", False), ("gzip", True), ("zstd", False)):
        file = io.BytesIO()
        rows = table({"time": ["1", "2"], "a": [2.0, 2.5], "class": [0, 1]})
        write_table(rows, file, compression=packing, use_dictionary=dictionary)
        out.append(file.getvalue())
    return tuple(out)


def _folders() -> tuple[Target, ...]:
    image, grey, sound = picture("PNG"), picture("PNG", "L"), wav(b"\0\1" * 99)
    box = b"0 .5 .5 .25 .5\n"
    classes, pixel_targets = Targets("cross_entropy", 2), Targets("cross_entropy", 256, (8, 8))
    boxes, itself = Targets("mse", 2, (3, 5)), Targets("mse", 1, _SHAPE)
    jpegs = picture("JPEG"), picture("JPEG", "L")
    images = {"images/a.png": jpegs[0], "images/b.png": image}
    sounds = wav(b"\0\1" * 40), wav(b"abcdef" * 9, 2, 3, 48_000)

    def folder(
        name: str, at: str, intact_files: Mapping[str, bytes], targets: Targets, seeds: tuple[bytes, ...]
    ) -> Target:
        """A folder with a damaged file `at` among sound ones."""
        root = scratch() / "folders" / name.replace(" ", "_")
        for path, body in intact_files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(body)
        (root / at).parent.mkdir(parents=True, exist_ok=True)
        shape = (1, 16) if at.endswith(".wav") else _SHAPE

        def parse(raw: bytes) -> object:
            (root / at).write_bytes(raw)
            try:
                data = SampleFolder(root, (Pixels(), Audio()), _ALL, 10, (), scratch() / "state").snapshot(
                    shape, targets
                )
            except FedpruneError:
                if at.endswith(".json"):  # about all samples
                    raise
                raise ValueError("one damaged file cost the others") from None
            return _read(data)

        return Target(
            f"folder.{name}", parse, seeds, constant=_DECODERS, share=0.2, text=at.endswith((".txt", ".json"))
        )

    return (
        folder("images", "0/a.png", {"1/b.png": image}, classes, (picture("PNG"), *jpegs)),
        folder("recordings", "0/a.wav", {"1/b.wav": sound}, classes, sounds),
        folder("unlabelled", "a.png", {"b.png": image}, itself, (picture("PNG"),)),
        folder("masks", "masks/a.png", {**images, "masks/b.png": grey}, pixel_targets, (grey,)),
        folder("boxes", "labels/a.txt", {**images, "labels/b.txt": box}, boxes, (box,)),
    )


def _sample_store_targets() -> tuple[Target, ...]:
    folder = scratch() / "segments"
    folder.mkdir(exist_ok=True)
    log = SegmentLog(folder, b"key", 2**20)
    list(log.replay())
    log.append([LogRecord(Kind.COUNTS, b"n" * 16, 1, 1, b"payload")])
    log.close()
    root, limits = scratch() / "set", SampleLimits(10, 2**20)
    with SampleStore(root, limits, _ALL) as samples:
        for number in range(3):
            samples.add(np.full(4, number, np.float32), number)
    described, segment = root / "set.json", root / "segment-00000001.log"
    segments, description = segment.read_bytes(), described.read_bytes()

    def replay_segment(raw: bytes) -> object:
        log.path(1).write_bytes(raw)
        return list(SegmentLog(folder, b"key", 2**20).replay())

    def open_set(body: bytes, logged: bytes) -> object:
        for path in root.glob("segment-*"):
            path.unlink()
        described.write_bytes(body)
        segment.write_bytes(logged)
        with SampleStore(root, limits, _ALL) as samples:
            samples.add(np.zeros(4, np.float32), 0)
            return _read(samples.snapshot((4,)))

    def find_in_index(path: Path) -> object:
        with FileIndex(path).update() as index:
            return index.find_digest("a", path.stat())

    lines = b'["a", 3, 17, "%s"]\n["b", 4, 18, "%s"]\n' % (b"0" * 64, b"1" * 64)
    return (
        Target("samples.segment", replay_segment, (log.path(1).read_bytes(),), share=0.5),
        Target("samples.set", lambda raw: open_set(description, raw), (segments,), constant=2**20, share=0.3),
        Target("samples.set's description", lambda raw: open_set(raw, segments), (description,), text=True, share=0.3),
        Target("samples.index", as_file(find_in_index, "images.index"), (lines,), text=True, share=0.5),
    )  # fmt: skip


def _read(data: LocalData) -> int:
    """All samples and labels, as training reads them."""
    arrays = (getattr(data, f"{kind}_{split}") for kind in "xy" for split in ("train", "test", "val"))
    return sum(some.nbytes for array in arrays for some in chunks(array))
