"""Reads data of some hundred kinds as a board reads them, and compares the samples with what was written.

A kind is `taken` if the samples are those that were written, `rewritten` if the board also says what it read in another
way, `left out in part` if some are missing and it says why, and `refused` if it says why it reads nothing. All else is
`misread`: there must be none.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.data_folders import arrays, pictures, recordings, streams, tables
from benchmarks.data_folders.kinds import Kind, count_samples
from benchmarks.harness import Record, run_cases
from fedprune.core.errors import FedpruneError
from fedprune.model.input_type import FLOATS
from fedprune_device.data.sources import SampleOptions

KINDS = {kind.name: kind for room in (tables, pictures, recordings, arrays) for kind in room.kinds()}
STREAMS = {stream.name: stream for stream in streams.streams()}
_OPTIONS = SampleOptions("", "board", 0, 0.0, 0.0, (), (0.0,), (1.0,), 8000, 10_000)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def read_kind(kind: str) -> Record:
    """Write one kind of data, or send its messages, and read it; how it was read, and what was said."""
    if kind in STREAMS:
        with tempfile.TemporaryDirectory() as folder:
            rows, said = streams.read_stream(STREAMS[kind], Path(folder))
        outcome = "misread" if rows != STREAMS[kind].rows else "left out in part" if said else "taken"
        return {"group": "streams", "outcome": outcome, "said": said}
    log, logger = _Lines(), logging.getLogger("fedprune.device")
    logger.addHandler(log)
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome, said = _outcome(KINDS[kind], Path(folder), log)
    finally:
        logger.removeHandler(log)
    return {"group": KINDS[kind].group, "outcome": outcome, "said": said.replace(f"{folder}/", "")}


def _outcome(kind: Kind, folder: Path, log: _Lines) -> tuple[str, str]:
    data, spool = folder / "data", folder / "spool"
    data.mkdir(), spool.mkdir()
    path, truth = kind.write(data)
    options = SampleOptions(**{**vars(_OPTIONS), "data": str(path), **dict(kind.options)})
    try:
        source = options.fixed(spool=spool)
        read = source.snapshot(kind.shape, kind.targets)
        read.check(kind.targets, kind.shape, input_type=FLOATS)
    except FedpruneError as error:
        return ("refused" if truth.samples is None else "refused, though it could be read"), str(error)
    said = "; ".join([*log.lines, *source.notes])
    parts = (read.x_train, read.x_test, read.x_val), (read.y_train, read.y_test, read.y_val)
    x, y = (np.concatenate([np.asarray(part[:]) for part in arrays if len(part)]) for arrays in parts)
    sample_count = count_samples(x, y, truth)
    if sample_count is None or (sample_count < len(truth.samples or ()) and not said):
        return "misread", said
    if sample_count < len(truth.samples or ()):
        return "left out in part", said
    return ("rewritten" if said else "taken"), said


def main() -> None:
    """Read all kinds that have no record yet."""
    run_cases("data_folders", __doc__, [{"kind": name} for name in (*KINDS, *STREAMS)], read_kind, "pillow", "pyarrow")


if __name__ == "__main__":
    main()
