"""Finds a data set's file or folder, and reads it with the reader of its format."""

from __future__ import annotations

import os
from pathlib import Path

from fedprune.core.disk import path_exists
from fedprune.core.errors import DataError, MissingExtraError
from fedprune_server.config.layers import name_source
from fedprune_server.simulation.datasets.columns import PARQUET_SUFFIX, ParquetColumns, parquet_files_of
from fedprune_server.simulation.datasets.decoding import Decoding
from fedprune_server.simulation.datasets.image_files import read_image_folder
from fedprune_server.simulation.datasets.npz_files import read_npz
from fedprune_server.simulation.datasets.samples import Samples, assemble_samples
from fedprune_server.simulation.datasets.saved_datasets import is_saved_dataset
from fedprune_server.simulation.digits import load_digits

# Environment variable with a folder in which missing sources are searched.
DATA_FOLDER_VARIABLE = "FEDPRUNE_DATA"


def read_samples(
    source: str | Path, columns: ParquetColumns | None = None, decoding: Decoding | None = None
) -> Samples:
    """Read a data set.

    Raises `DataError` if it doesn't exist, or can't be read; the message names the file.

    Args:
        source: A `.npz` or Parquet file; or a folder of Parquet files, of Arrow files as `save_to_disk` of `datasets`
            writes them, or of images. A path that doesn't exist is searched in `FEDPRUNE_DATA`, also with the extension
            `.npz`. `digits` that aren't there either are the package's.
        columns: Columns of Parquet or Arrow files, or of the metadata of images.
        decoding: How images and recordings are decoded.
    """
    try:
        path = find_source(source)
    except DataError:
        if str(source) != "digits":
            raise
        return assemble_samples([(*load_digits(), False)])
    with name_source(str(path)):
        return _read_path(path, columns, decoding or Decoding())


def _read_path(path: Path, columns: ParquetColumns | None, decoding: Decoding) -> Samples:
    if path.suffix == PARQUET_SUFFIX if path.is_file() else is_saved_dataset(path) or parquet_files_of(path):
        try:
            from fedprune_server.simulation.datasets.parquet_files import read_parquet
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"Parquet and Arrow files need {error.name}", extra="parquet") from error
        return read_parquet(path, columns or ParquetColumns(), decoding)
    if path.is_dir():
        return read_image_folder(path, decoding, columns)
    if columns is not None:
        raise DataError("x, y or owner of [data]", expected="none: columns are those of tables", got="some")
    return read_npz(path)


def find_source(source: str | Path) -> Path:
    """The path of a source. Raises `DataError` if it doesn't exist; the message names the searched places."""
    path, root = Path(source), os.environ.get(DATA_FOLDER_VARIABLE)
    candidates = [path]
    if root and not path.is_absolute():
        candidates += [Path(root) / path, Path(root) / f"{path}.npz"]
    for candidate in candidates:
        if path_exists(candidate):
            return candidate
    raise DataError(
        f"data {str(source)!r}",
        expected="a .npz file or a folder that exists",
        got=f"nothing at {', '.join(str(p.absolute()) for p in candidates)}",
        hint="" if root else f"Or set {DATA_FOLDER_VARIABLE} to the folder that holds it.",
    )
