"""Stores the samples that an application adds, in a folder of bounded size: they are the board's training data.

samples/set.json            the set's key, and the shares of samples for training, tests and validation
samples/model.json          the input shape of the last round's model
samples/segment-*.log       the samples (`data.segment_log`)

`Reservoir` decides which samples stay. Only a keyed hash of a sample's name decides which samples are held out, so that
a sample never moves from one split to another.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import atomic_file
from fedprune.core.closeable import Closeable
from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, DataError, StorageError
from fedprune.core.validation import check_whole
from fedprune.model.input_type import FLOATS, InputType
from fedprune.model.lengths import Shape, shape_to_json
from fedprune.model.lengths import shape_from_json as read_shape
from fedprune_device.data import stored_samples
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.data.reservoir import UNLABELLED, Reservoir, ReservoirDecision, SampleLimits, sample_counts
from fedprune_device.data.sample_log import SEGMENTS, SampleLog
from fedprune_device.data.segment_log import HEAD_BYTES, Kind, LogRecord, RecordPosition, counts_in, payload_name
from fedprune_device.data.splits import SplitShares, claim_folder
from fedprune_device.data.stored_array import FILE_STRIDE, Array, OpenFiles

MAX_LABEL = 2**24 - 1

_LOG = logging.getLogger("fedprune.device")

_MODEL_FILE = "model.json"

# Share of the space that samples take; the rest is for records that no longer count, and for reclaiming a segment.
_LIVE_SHARE = 5 / 8
# At least this many different labels are allowed, or as many as samples: a count is kept of each label for ever.
_MIN_LABEL_LIMIT = 1000
# Declined samples (or a hundredth of all) after which the counts are written: a flood of samples wears no card.
_MIN_DECLINED = 64


class SampleConflictError(DataError):
    """A sample exists already with another label."""


class NoSampleError(DataError):
    """There is no sample of that name."""


@dataclass(frozen=True)
class AddedSample:
    """A sample after its addition. `id` is a digest of type, shape and numbers, `part` is `train`, `val` or `test`."""

    id: str
    kept: bool
    duplicate: bool
    label: int | None
    part: str


def checked_label(label: int | None) -> int:
    """A label as the set writes it: `UNLABELLED` for None."""
    return UNLABELLED if label is None else check_whole("label", label, 0, MAX_LABEL, error=DataError)


class SampleStore(Closeable):
    """The set of samples on the disk. All methods may be called from any thread.

    `input_shape` is the shape that the model of the last round takes, also if that round found nothing to train on;
    None before the first round. Raises `ConfigError` if the set was made with other shares, or its space is too small.
    """

    def __init__(self, root: Path, limits: SampleLimits, shares: SplitShares | None = None) -> None:
        self._root, self._limits, self._shares = root, limits, shares or SplitShares()
        self._lock = threading.RLock()
        segment = limits.bytes // SEGMENTS
        if segment <= HEAD_BYTES or limits.samples < 2:
            raise ConfigError(
                "room for samples", expected="at least 2 samples and 16 kB", got=f"{limits.samples}, {limits.bytes} B"
            )
        self._segment_bytes = segment
        key = claim_folder(root, self._shares)
        live_limits = SampleLimits(limits.samples, int(limits.bytes * _LIVE_SHARE), limits.unlabelled)
        self._reservoir = Reservoir(live_limits, self._shares.seed)
        self._log = SampleLog(root, key, limits.bytes, self._reservoir, self._drop_damaged)
        self._declined = 0
        self._training_names = set[str]()  # of the samples that would be trained on
        self.input_shape: Shape | None = None
        try:
            body = atomic_file.read_document(self._root / _MODEL_FILE) or {"input": None, "unlabelled": False}
            shape, unlabelled = body["input"], body["unlabelled"] is True
            self.input_shape = None if shape is None else read_shape(shape)
            self._reservoir.unlabelled_wait = not unlabelled
        except (DataError, StorageError, KeyError, TypeError) as error:
            _LOG.warning("what the last model takes is unknown until the next round (%s)", error)
        self._replay()

    @property
    def max_sample_bytes(self) -> int:
        """Bytes that one sample may take."""
        return self._segment_bytes - HEAD_BYTES

    @property
    def samples(self) -> int:
        """Samples that would be trained on now. Never waits for the disk, so that the agent's loop may ask.

        Before the first model, samples without a label count as well: that model may need none, and a server offers
        one only to boards that have samples.
        """
        return len(self._training_names)

    @property
    def notes(self) -> tuple[str, ...]:
        """See `SampleSource`."""
        return ()

    def add(self, x: Array, label: int | None = None) -> AddedSample:
        """Add a sample, if it is to stay.

        Raises `SampleConflictError` if it exists with another label, `DataError` if it or its label is invalid,
        `StorageError` if the disk fails or is full; then nothing changed.
        """
        payload = stored_samples.encode_sample(x)
        if len(payload) > self.max_sample_bytes:
            raise DataError(
                "size of a sample",
                expected=f"at most {self.max_sample_bytes} bytes",
                got=len(payload),
                hint="Give the set more room (--samples-bytes).",
            )
        number = checked_label(label)
        name = payload_name(payload).hex()
        with self._lock:
            self._check_label_count(number)
            if name in self._reservoir:
                old = self._reservoir.label(name)
                if number in (UNLABELLED, old):
                    return self._added_sample(name, old, kept=True, duplicate=True)
                if old != UNLABELLED:
                    raise SampleConflictError(
                        f"sample {name} is there already", expected=f"label {old}", got=number,
                        hint=f"To change it, POST to /v1/samples/{name}/label.",
                    )  # fmt: skip
                return self._relabel(name, number, payload)
            return self._add_new(name, number, payload)

    def label(self, name: str, label: int) -> AddedSample:
        """Label or relabel a sample; raises `NoSampleError` if it doesn't exist, `DataError` for an invalid label."""
        number = checked_label(label)
        with self._lock:
            self._check_exists(name)
            self._check_label_count(number)
            if self._reservoir.label(name) == number:
                return self._added_sample(name, number, kept=True, duplicate=True)
            return self._relabel(name, number, self._payload(name))

    def read(self, name: str) -> Array:
        """The numbers of a sample; raises `NoSampleError` if it doesn't exist."""
        with self._lock:
            self._check_exists(name)
            payload = self._payload(name)
        like = stored_samples.sample_outline(payload)
        return np.frombuffer(payload[-like.nbytes :] if like.size else b"", like.dtype).reshape(like.shape)

    def unlabelled_names(self, limit: int) -> list[str]:
        """Samples without a label, the newest first."""
        with self._lock:
            return list(self._reservoir.unlabelled_names())[: -limit - 1 : -1]

    def delete(self, name: str) -> None:
        """Delete a sample; raises `NoSampleError` if it doesn't exist."""
        with self._lock:
            self._check_exists(name)
            self._log.write([LogRecord(Kind.DELETED, bytes.fromhex(name))])
            self._reservoir.drop(name, unseen=True)
            self._remove_position(name)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._reservoir)

    def counts(self) -> dict[str, Any]:
        with self._lock:
            return {**sample_counts(self._reservoir, self._shares), "disk_bytes": self._log.size}

    def snapshot(
        self, shape: Shape | None = None, targets: Targets | None = None, input_type: InputType = FLOATS
    ) -> LocalData:
        """All labelled samples of this shape, as they are now; later changes don't affect them.

        A model whose outputs are compared with its inputs takes all samples, without their labels.
        """
        reproduces = targets is not None and shape is not None and stored_samples.reproduces_inputs(targets, shape)
        with self._lock:
            if targets is not None and shape is not None:
                self._write_model(tuple(shape), reproduces)
            classes = self._reservoir.names_by_class().items()
            labels = {name: label for label, names in classes if label != UNLABELLED or reproduces for name in names}
            positions = {name: self._log.positions[name] for name in labels}
            segments = sorted({position.segment for position in positions.values()})
            # Open files stay readable when their segment is reclaimed meanwhile.
            files = self._log.open_segments(segments)
        stored = []
        for name, label in labels.items():
            sample = self._read_stored(name, label, positions[name], files, segments.index(positions[name].segment))
            if sample is not None:
                stored.append(sample)
        samples_by_split: dict[str, list[stored_samples.StoredSample]] = {"train": [], "test": [], "val": []}
        fitting = stored_samples.select_one_kind(stored, shape)
        for sample in fitting:
            samples_by_split[self._shares.split_of(sample.name)].append(sample)
        if len(fitting) < len(stored):
            left_out = len(stored) - len(fitting)
            _LOG.warning("%d samples have another shape than the rest, or the model: left out", left_out)
        if not samples_by_split["train"]:
            raise DataError(
                "there is nothing to train on yet",
                expected="samples" if reproduces else "samples with labels",
                got=f"{len(fitting)}, none of them for training",
                hint="Add some: POST /v1/samples" + ("" if reproduces else "?label=..., or label those that wait."),
            )
        splits = list(samples_by_split.values())
        return stored_samples.local_data(splits, files, shape, inputs_are_labels=reproduces, spool=self._root)

    def _read_stored(
        self, name: str, label: int, position: RecordPosition, files: OpenFiles, file_index: int
    ) -> stored_samples.StoredSample | None:
        """The shape and place of a sample in the open files; None, and the sample is dropped, if it is damaged."""
        with storage_errors(f"can't read {self._root}"):
            payload = os.pread(files.descriptors[file_index], position.size, position.offset)
        if payload_name(payload).hex() != name:
            with self._lock:
                self._drop_damaged(name)
            return None
        outline = stored_samples.sample_outline(payload)
        end = FILE_STRIDE * file_index + position.offset + position.size
        return stored_samples.StoredSample(name, label, outline, end - outline.nbytes)

    def close(self) -> None:
        """Write the counts of seen samples, and close the files."""
        with self._lock:
            if self._declined:
                self._write_counts()
            self._log.close()

    def _add_new(self, name: str, label: int, payload: bytes) -> AddedSample:
        decision = self._reservoir.decide(name, label, HEAD_BYTES + len(payload))
        if decision.is_kept:
            self._log.positions[name] = self._write_sample(decision, payload)
        else:
            self._declined += 1
        if self._declined >= max(_MIN_DECLINED, sum(self._reservoir.seen_counts.values()) // 100):
            self._write_counts()
        return self._apply(decision)

    def _apply(self, decision: ReservoirDecision) -> AddedSample:
        self._reservoir.apply(decision)
        for evicted in decision.evicted:
            self._remove_position(evicted)
        if decision.is_kept and self._is_for_training(decision.id, decision.label):
            self._training_names.add(decision.id)
        return self._added_sample(decision.id, decision.label, kept=decision.is_kept, duplicate=False)

    def _relabel(self, name: str, label: int, payload: bytes) -> AddedSample:
        old, size = self._reservoir.label(name), HEAD_BYTES + len(payload)
        seen_count = self._reservoir.seen_counts[old]
        self._reservoir.drop(name, unseen=True)
        decision = self._reservoir.decide(name, label, size)
        self._reservoir.restore(name, old, size)  # until it is on the disk
        self._reservoir.set_seen_count(old, seen_count)
        if decision.is_kept:
            position = self._write_sample(decision, payload)
        else:
            self._log.write([LogRecord(Kind.DELETED, bytes.fromhex(name))])
        self._reservoir.drop(name, unseen=True)
        self._remove_position(name)
        if decision.is_kept:
            self._log.positions[name] = position
        return self._apply(decision)

    def _write_sample(self, decision: ReservoirDecision, payload: bytes) -> RecordPosition:
        """Write a sample that is kept, and what makes room for it."""
        dropped = [LogRecord(Kind.DROPPED, bytes.fromhex(n)) for n in decision.evicted]
        record = LogRecord(Kind.SAMPLE, bytes.fromhex(decision.id), decision.label, decision.seen_count, payload)
        # The new sample comes first: if a power cut tears the end off, there is one sample too many, not too few.
        return self._log.write([record, *dropped])[0]

    def _replay(self) -> None:
        for record, position in self._log.replay():
            name = record.name.hex()
            if record.kind == Kind.COUNTS:
                try:
                    for label, seen_count in counts_in(record).items():
                        self._reservoir.set_seen_count(label, seen_count)
                except ValueError as error:
                    _LOG.warning("counts of samples are damaged (%s)", error)
                continue
            is_known = name in self._reservoir
            if is_known:
                leaves_class = record.kind == Kind.DELETED or self._reservoir.label(name) != record.label
                self._reservoir.drop(name, unseen=leaves_class and record.kind != Kind.DROPPED)
                del self._log.positions[name]
            if record.kind == Kind.SAMPLE:
                if record.seen_count:
                    self._reservoir.set_seen_count(record.label, record.seen_count)
                self._reservoir.restore(name, record.label, HEAD_BYTES + position.size)
                self._log.positions[name] = position
        # After a torn end, lost bits, or with a smaller limit than before there are more samples than may be.
        while (surplus := self._reservoir.surplus()) is not None:
            self._reservoir.drop(surplus)
            del self._log.positions[surplus]
        self._collect_training()

    def _collect_training(self) -> None:
        classes = self._reservoir.names_by_class().items()
        self._training_names = {n for c, names in classes for n in names if self._is_for_training(n, c)}

    def _write_model(self, shape: Shape, unlabelled: bool) -> None:
        """Keep the input shape of a round's model: the number of its training samples is reported before the next."""
        if (shape, not unlabelled) == (self.input_shape, self._reservoir.unlabelled_wait):
            return
        atomic_file.write_document(self._root / _MODEL_FILE, {"input": shape_to_json(shape), "unlabelled": unlabelled})
        self.input_shape, self._reservoir.unlabelled_wait = shape, not unlabelled
        self._collect_training()

    def _payload(self, name: str) -> bytes:
        """A sample's bytes; a damaged sample is dropped."""
        payload = self._log.read(name)
        if payload is None:
            raise NoSampleError(f"sample {name} is damaged and was given up")
        return payload

    def _write_counts(self) -> None:
        self._declined = 0
        self._log.write_counts()

    def _drop_damaged(self, name: str) -> None:
        _LOG.warning("sample %s is damaged: going on without it", name)
        if name in self._reservoir:
            self._reservoir.drop(name)
            self._remove_position(name)

    def _remove_position(self, name: str) -> None:
        del self._log.positions[name]
        self._training_names.discard(name)

    def _is_for_training(self, name: str, label: int) -> bool:
        waits = label == UNLABELLED and self._reservoir.unlabelled_wait and self.input_shape is not None
        return not waits and self._shares.split_of(name) == "train"

    def _check_exists(self, name: str) -> None:
        if name not in self._reservoir:
            raise NoSampleError(
                f"there is no sample {name[:40]!r}", hint="It may have made room for others; GET /v1/samples counts."
            )

    def _check_label_count(self, label: int) -> None:
        """Bound the number of counted classes, also before a model defines them."""
        max_labels = max(self._limits.samples, _MIN_LABEL_LIMIT)
        if label != UNLABELLED and not self._reservoir.has_seen(label) and self._reservoir.class_count >= max_labels:
            raise DataError("label", expected=f"at most {max_labels} different ones", got=f"{label} in addition")

    def _added_sample(self, name: str, label: int, *, kept: bool, duplicate: bool) -> AddedSample:
        return AddedSample(name, kept, duplicate, None if label == UNLABELLED else label, self._shares.split_of(name))
