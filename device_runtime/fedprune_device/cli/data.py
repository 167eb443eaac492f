"""`fedprune-device data check`: what a bundle's model would be trained on, and what doesn't fit it."""

from __future__ import annotations

import argparse
import logging
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedprune.core.cli import options_of, print_json
from fedprune.core.disk import storage_errors
from fedprune.core.errors import DataError, ExitCode
from fedprune.core.text import quantity
from fedprune.output.page import list_html, page_html, section_html, table_html
from fedprune.runtime.bundle import TRAINING, open_bundle
from fedprune_device.cli.column_names import name_columns
from fedprune_device.data.array_assembly import name_arrays
from fedprune_device.data.dataset import SPLITS, LocalData
from fedprune_device.data.sample_drawings import draw_samples
from fedprune_device.data.sources import SampleOptions
from fedprune_device.data.stored_array import chunks
from fedprune_device.data.summary import ChannelRange, DataSummary, find_notes, find_problems, summarise
from fedprune_device.training.trainer import Trainer

_LOGGER = logging.getLogger("fedprune.device")
_MAX_LINES = 10  # of the same kind: a folder may have thousands of files that don't fit

_SPLIT_TITLES = {"train": "training", "test": "test", "val": "validation"}
_RANGE_TITLES = ("lowest", "highest", "mean", "deviation")


class _Warnings(logging.Handler):
    """What a board would log about its samples, such as files that it leaves out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@dataclass(frozen=True)
class _Report:
    source: str
    summary: DataSummary
    problems: Sequence[str]
    notes: Sequence[str]

    def lines(self) -> list[str]:
        counts = ", ".join(
            quantity(self.summary.samples[split], f"{title} sample") for split, title in _SPLIT_TITLES.items()
        )
        lines = [f"{self.source}: {counts}", f"inputs: {self.summary.inputs}"]
        lines += ["  ".join(row) for row in _range_rows("channel", self.summary.channels)]
        for name, per_split in (self.summary.classes or {}).items():
            lines.append(f"{name}: " + ", ".join(f"{n} {_SPLIT_TITLES[split]}" for split, n in per_split.items()))
        lines += ["  ".join(row) for row in _range_rows("label", self.summary.values)]
        lines += [f"problem: {line}" for line in self.problems]
        return lines + [f"note: {line}" for line in self.notes]

    def html(self, drawings: Sequence[str]) -> str:
        splits = [*next(iter((self.summary.classes or {}).values()), {})]
        classes = [
            (name, *(f"{per_split[split]:,}" for split in splits))
            for name, per_split in (self.summary.classes or {}).items()
        ]
        sections = [
            section_html("What doesn't fit", list_html(self.problems)),
            section_html("Notes", list_html(self.notes)),
            section_html("Samples", *drawings),
            section_html("Inputs", _range_table("channel", self.summary.channels)),
            section_html("Labels", table_html(["class", *(_SPLIT_TITLES[s] for s in splits)], classes))
            if classes
            else section_html("Labels", _range_table("label", self.summary.values)),
        ]
        facts = {f"{title} samples": f"{self.summary.samples[split]:,}" for split, title in _SPLIT_TITLES.items()}
        return page_html("Samples of a board", sections, {"data": self.source, "inputs": self.summary.inputs, **facts})


@name_columns()
def check_data(arguments: argparse.Namespace) -> int:
    """Print what a training would read. Raises the errors of a training where it would refuse the samples."""
    bundle = open_bundle(arguments.bundle)
    warnings, options = _Warnings(), options_of(SampleOptions, arguments)
    names = options.class_names or bundle.class_names
    with storage_errors("can't make a folder for copies of samples"):
        folder = tempfile.TemporaryDirectory(prefix="fedprune-", ignore_cleanup_errors=True)
    _LOGGER.addHandler(warnings)
    try:
        with folder as spool:
            trainer = Trainer(bundle.path(TRAINING), threads=1, base=bundle.base)
            targets = trainer.targets(bundle.recipe, bundle.architecture.classes)
            source = options.fixed(bundle.class_names, Path(spool))
            data = source.snapshot(trainer.input_shape, targets, trainer.input_type)
            try:
                data.check(targets, trainer.input_shape, input_type=trainer.input_type)
            except DataError as error:
                raise DataError(f"{arguments.data}: {error}") from error
            summary = summarise(data, targets, names)
            scaled = bool(bundle.recipe.scaling)
            more = len(warnings.lines) - _MAX_LINES
            more_lines = [f"and {more} more of such lines"] if more > 0 else []
            problems = [*warnings.lines[:_MAX_LINES], *more_lines, *find_problems(summary, is_scaled=scaled)]
            report = _Report(arguments.data, summary, problems, [*source.notes, *find_notes(summary)])
            if arguments.out is not None:
                if arguments.out.suffix == ".npz":
                    _write_arrays(arguments.out, data)
                else:
                    out = arguments.out
                    page = report.html(draw_samples(data, targets, names, options.pixels))
                    with storage_errors(f"can't write {out}"):
                        out.write_text(page, encoding="utf-8")
    finally:
        _LOGGER.removeHandler(warnings)
    if arguments.json:
        body = {"data": report.source, **summary.to_dict(), "problems": report.problems, "notes": report.notes}
        print_json(body)
    else:
        print("\n".join(report.lines()))
    return int(ExitCode.FINDINGS if report.problems else ExitCode.OK)


def _write_arrays(out: Path, data: LocalData) -> None:
    """Write the samples as a model takes them, their labels as numbers, and the names of a table's columns to an `.npz`
    file."""
    with storage_errors(f"can't write {out}"), zipfile.ZipFile(out, "w") as archive:
        for split in SPLITS:
            for kind in "x" if data.is_unlabelled else "xy":
                array = getattr(data, f"{kind}_{split}")
                if not len(array):
                    continue
                # Exports measure a model on x where a file has no x_test.
                name = kind if split == "train" else f"{kind}_{split}"
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
                    np.lib.format.write_array_header_1_0(entry, header)
                    for chunk in chunks(array):  # a board has no memory for all samples
                        entry.write(np.ascontiguousarray(chunk, array.dtype).tobytes())
        for name, array in name_arrays(data).items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array)


def _range_rows(name: str, ranges: Sequence[ChannelRange]) -> list[tuple[str, ...]]:
    return [
        (f"{name} {each.name}:", *(f"{title} {getattr(each, title):.4g}" for title in _RANGE_TITLES)) for each in ranges
    ]


def _range_table(name: str, ranges: Sequence[ChannelRange]) -> str:
    rows = [(each.name, *(f"{getattr(each, title):.4g}" for title in _RANGE_TITLES)) for each in ranges]
    return table_html([name, *_RANGE_TITLES], rows) if rows else ""
