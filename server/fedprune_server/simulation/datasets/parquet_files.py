"""Data sets in Parquet files, such as the Hugging Face hub has them, and in Arrow files, as `save_to_disk` of the
library `datasets` writes them, read with only pyarrow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedprune.core.errors import DataError, did_you_mean, error_reason, path_remedy, shape_text, value_text
from fedprune.core.text import first_few
from fedprune.model.lengths import PADDING
from fedprune_device.data.audio_decoding import read_recording
from fedprune_server.config.layers import name_source
from fedprune_server.simulation.datasets.columns import ParquetColumns, parquet_files_of
from fedprune_server.simulation.datasets.decoding import Decoding
from fedprune_server.simulation.datasets.image_files import MAX_DATA_BYTES, decode_images, is_test_split
from fedprune_server.simulation.datasets.samples import Samples, assemble_samples
from fedprune_server.simulation.datasets.saved_datasets import ARROW_SUFFIX, is_saved_dataset, saved_splits

Array = npt.NDArray[Any]

_BATCH_ROWS = 1024  # rows of a Parquet file that are read at once

# The schema's metadata in which `datasets` keeps the features.
_FEATURES_KEY = b"huggingface"

_PLAIN_FEATURES = ("Value", "List", "LargeList", "Sequence", "ClassLabel", "Array2D", "Array3D", "Array4D", "Array5D")
_HINTS = {"text": "Tokenise it first with Dataset.map, into lists of whole numbers of one length."}


@dataclass
class _Split:
    """One split: parts of each column, and its features."""

    testing: bool
    features: dict[str, Any] = field(default_factory=dict)
    column_chunks: dict[str, list[pa.Array]] = field(default_factory=dict)

    def column(self, name: str) -> pa.Array:
        return pa.concat_arrays(self.column_chunks[name])


def read_parquet(path: Path, columns: ParquetColumns, decoding: Decoding) -> Samples:
    """Read a data set.

    Args:
        path: A Parquet file, a folder of such files, whose names say what is test data, or a folder of `save_to_disk`.
        columns: Which columns are read.
        decoding: How images and recordings are decoded.

    Raises:
        DataError: A file is missing or damaged, there is no such column, or it holds what can't be read.
        MissingExtraError: There are images, and Pillow is not installed.
    """
    splits = [_read_split(files, testing, columns) for files, testing in _files_of_splits(path)]
    splits = [split for split in splits if split.column_chunks]
    if not splits:
        raise DataError(f"{path} holds no rows", expected="at least one sample")
    if len(columns.x) == 1 and all(split.features.get(columns.x[0], {}).get("_type") == "Audio" for split in splits):
        # Recordings have one length in all splits.
        recordings = [_recordings(split.column(columns.x[0]), columns.x[0]) for split in splits]
        xs = _decode_recordings(recordings, decoding)
    else:
        xs = [_inputs(split, columns.x, decoding) for split in splits]
    ys, names = _labels(splits, columns.y)
    owners = None if not columns.owner else [_owners(split, columns.owner) for split in splits]
    return assemble_samples(
        [(x, y, split.testing) for x, y, split in zip(xs, ys, splits, strict=True)], owners=owners, class_names=names
    )


def _files_of_splits(path: Path) -> Iterator[tuple[list[Path], bool]]:
    """The files of each split, and whether the split is test data."""
    if path.is_file():
        yield [path], False
    elif is_saved_dataset(path):
        yield from saved_splits(path)
    else:
        all_files = parquet_files_of(path)
        for testing in (False, True):
            files = [f for f in all_files if testing == any(map(is_test_split, re.split(r"[-_.]", f.stem)))]
            if files:
                yield files, testing


def _read_split(files: Sequence[Path], testing: bool, columns: ParquetColumns) -> _Split:
    """Read the named columns of a split's files."""
    split, size = _Split(testing), 0
    for path in files:
        with _name_damage(path):
            for batch in _batches(path, columns, split):
                batch.validate(full=True)  # offsets beyond the data would be read otherwise
                size += batch.nbytes
                if size > MAX_DATA_BYTES:
                    raise DataError(
                        f"{path}: the columns {first_few(columns.names)}", expected=f"at most {MAX_DATA_BYTES} bytes"
                    )
                for name in columns.names:
                    split.column_chunks.setdefault(name, []).append(batch.column(name))
    return split


@contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        kind = "an Arrow stream" if path.suffix == ARROW_SUFFIX else "a Parquet file"
        raise DataError(f"{path} is damaged", expected=kind, got=error_reason(error)) from error
    except OSError as error:
        raise DataError(f"can't read {path}: {error_reason(error)}", hint=path_remedy(error)) from error


def _batches(path: Path, columns: ParquetColumns, split: _Split) -> Iterator[pa.RecordBatch]:
    """Read some rows at a time, so that a small file that unfolds to a huge one is noticed."""
    if path.suffix == ARROW_SUFFIX:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            split.features = _features(path, stream.schema, columns)
            yield from (batch.select(columns.names) for batch in stream)
        return
    with pq.ParquetFile(path) as file:
        split.features = _features(path, file.schema_arrow, columns)
        yield from file.iter_batches(_BATCH_ROWS, columns=columns.names)


def _features(path: Path, schema: pa.Schema, columns: ParquetColumns) -> dict[str, Any]:
    """The columns' features in `datasets`. Raises `DataError` if one of them is missing, or there twice."""
    for name in columns.names:
        if schema.names.count(name) != 1:
            raise DataError(
                f"{path}: column {name!r}",
                expected=f"one of {first_few(schema.names, max_names=20)}",
                got="several" if name in schema.names else f"none{did_you_mean(name, schema.names)}",
                hint="Name the columns with x, y and owner in [data].",
            )
    try:
        features = json.loads((schema.metadata or {}).get(_FEATURES_KEY, b"{}")).get("info", {}).get("features", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: the schema's metadata", expected="features of datasets", got=error_reason(error)
        ) from error
    return {n: features[n] for n in columns.names if isinstance(features, dict) and isinstance(features.get(n), dict)}


def _recordings(column: pa.Array, name: str) -> list[tuple[str, bytes]]:
    """The files in a column, each after the name that errors give it."""
    if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        raise DataError(f"column {name!r}", expected="recordings", got=str(column.type)[:80])
    column = column.field("bytes")  # next to a path, which is never opened
    _check_filled(column, name, "Put the recordings into the file: Dataset.save_to_disk does.")
    return [(f"row {i} of {name!r}", bytes(row.as_py())) for i, row in enumerate(column)]


def _decode_recordings(splits: Sequence[Sequence[tuple[str, bytes]]], decoding: Decoding) -> list[Array]:
    """Decode recordings as boards do: mono, from -1 to 1, at `decoding.audio_rate`.

    Each is a file's bytes, after the name that errors give it. With `decoding.seconds` all have this length. Otherwise
    shorter ones end in `PADDING`, as a model with inputs of any length takes them. Raises `DataError`, which names the
    recording, if one can't be read.
    """
    decoded, length = [[_decode_recording(*each, decoding) for each in split] for split in splits], 0
    if decoding.seconds:
        length = round(decoding.seconds * decoding.audio_rate)
        if not length:
            expected = f"at least one of {decoding.audio_rate} Hz"
            raise DataError("[data] seconds", expected=expected, got=decoding.seconds)
    else:
        length = max((len(recording) for split in decoded for recording in split), default=0)
    count = sum(map(len, decoded))
    if count * length * 4 > MAX_DATA_BYTES:
        raise DataError("recordings", expected=f"at most {MAX_DATA_BYTES} bytes", hint="Give a smaller [data] seconds.")
    filling = 0.0 if decoding.seconds else PADDING
    stacks = [np.full((len(split), 1, length), filling, np.float32) for split in decoded]
    for split, inputs in zip(decoded, stacks, strict=True):
        for row, recording in zip(inputs, split, strict=True):
            row[0, : len(recording)] = recording[:length]
    return stacks


def _decode_recording(name: str, body: bytes, decoding: Decoding) -> Array:
    with name_source(name):
        return read_recording(body, decoding.audio_rate)


def _inputs(split: _Split, names: Sequence[str], decoding: Decoding) -> Array:
    if len(names) > 1:
        columns_of_numbers = [_numbers(split.column(name), name) for name in names]
        if any(column.ndim != 1 for column in columns_of_numbers):
            raise DataError(f"several columns of inputs ({first_few(names)})", expected="one number per row in each")
        return np.stack(columns_of_numbers, 1).astype(np.float32)
    [name] = names
    column, kind = split.column(name), str(split.features.get(name, {}).get("_type", ""))
    if kind not in ("", "Image", *_PLAIN_FEATURES):
        raise DataError(f"column {name!r}", expected="images or numbers", got=kind[:40], hint=_HINTS.get(kind, ""))
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.field("bytes")  # next to a path, which is never opened
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        _check_filled(column, name, "Put the images into the file: Dataset.to_parquet of the library datasets does.")
        return decode_images([(f"row {i} of {name!r}", row.as_py()) for i, row in enumerate(column)], decoding)
    x = _numbers(column, name)
    return x if x.ndim > 1 else x[:, None]


def _numbers(column: pa.Array, name: str) -> Array:
    """A column of numbers, or of equally long lists of them, as an array [n, ...]."""
    shape = [len(column)]
    while True:
        _check_filled(column, name)
        # `datasets` stores arrays of two and more axes as an extension type, whose storage is nested lists.
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        elif pa.types.is_fixed_size_list(column.type):
            shape.append(column.type.list_size)
            column = column.flatten()
        elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            lengths = pc.unique(pc.list_value_length(column)).to_pylist()
            if len(lengths) > 1:
                raise DataError(
                    f"lists in column {name!r}",
                    expected="one length",
                    got=f"{min(lengths)} to {max(lengths)}",
                    hint="Pad or cut them with Dataset.map.",
                )
            shape += lengths
            column = column.flatten()
        else:
            break
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        raise DataError(f"column {name!r}", expected="images or numbers", got=str(kind), hint=_HINTS["text"] * text)
    if len(shape) > 8 or 0 in shape[1:]:
        raise DataError(f"column {name!r}", expected="numbers [n, ...]", got=shape_text(*shape))
    numbers: Array = column.to_numpy(zero_copy_only=False)
    return numbers.reshape(shape)


def _labels(splits: Sequence[_Split], name: str) -> tuple[list[Array], tuple[str, ...]]:
    """Labels of each split, and the names of the classes: those of the feature, or the texts themselves in order."""
    columns = [split.column(name) for split in splits]
    for column in columns:
        _check_filled(column, name, "A split without labels can't be used: leave it out.")
    if all(pa.types.is_string(column.type) or pa.types.is_large_string(column.type) for column in columns):
        texts = [np.array(column.to_pylist(), object) for column in columns]
        # Over all splits together: a class may be missing in one of them.
        classes, class_indices = np.unique(np.concatenate(texts).astype(str), return_inverse=True)
        return np.split(class_indices.astype(np.int64), np.cumsum([*map(len, texts)])[:-1]), tuple(map(str, classes))
    for column in columns:
        if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
            raise DataError(f"labels in column {name!r}", expected="whole numbers or texts", got=str(column.type))
    class_names, *others = (split.features.get(name, {}).get("names") for split in splits)
    if any(other != class_names for other in others):
        raise DataError(f"names of the classes of {name!r}", expected="the same in all splits", got="others")
    if class_names is not None and not (isinstance(class_names, list) and all(isinstance(n, str) for n in class_names)):
        raise DataError(f"names of the classes of {name!r}", expected="texts", got=value_text(class_names))
    return [column.to_numpy(zero_copy_only=False) for column in columns], tuple(class_names or ())


def _owners(split: _Split, name: str) -> Array:
    column = split.column(name)
    _check_filled(column, name)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array(column.to_pylist(), str)
    numbers: Array = column.to_numpy(zero_copy_only=False)
    return numbers


def _check_filled(column: pa.Array, name: str, hint: str = "") -> None:
    if column.null_count:
        raise DataError(f"empty rows in column {name!r}", expected="none", got=column.null_count, hint=hint)
