"""Writes a run to TensorBoard's event files, without its `SummaryWriter`, which imports more of the package."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprune_server.trackers.tracker import TrackedRun, Tracker, plain_name


class TensorBoardTracker(Tracker):
    """A folder of event files for each run, within the destination; each start writes a file of its own."""

    destination_form = "FOLDER"
    takes_folder = True

    def __init__(self, destination: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summaries, self._record_writer = event_pb2, summary_pb2, RecordWriter
        self._tensors, self._shapes, self._types = tensor_pb2, tensor_shape_pb2, types_pb2
        self._destination = destination

    def open(self, run: TrackedRun, name: str, rounds: int) -> int:
        folder = Path(self._destination) if self._destination else run.folder / "tensorboard"
        folder /= f"{plain_name(run.title)}-{name[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads a run's files in the order of their names.
        path = folder / f"events.out.tfevents.{int(now):010d}.{plain_name(socket.gethostname())}.{time.time_ns()}"
        self._file = self._record_writer(path.open("xb"))
        self._add(wall_time=now, file_version="brain.Event:2")
        # A round that a kill has cut off is written again. This entry tells TensorBoard to drop the first half.
        restart = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(wall_time=now, step=rounds + 1, session_log=restart)
        if not rounds:
            self._add(wall_time=now, summary=self._text("configuration", run.parameters))
        self._file.flush()
        return rounds

    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        scalars = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(wall_time=at, step=number, summary=self._summaries.Summary(value=scalars))
        self._file.flush()  # a killed server must not lose the rounds that it has noted as written

    def keep(self, folder: Path) -> None:
        """TensorBoard keeps no files."""

    def close(self, *, finished: bool) -> None:
        self._file.close()

    def _add(self, **event: Any) -> None:
        self._file.write(self._events.Event(**event).SerializeToString())

    def _text(self, tag: str, parameters: Mapping[str, Any]) -> Any:
        rows = "\n".join(f"| {key} | {value} |" for key, value in parameters.items())
        tensor = self._tensors.TensorProto(
            dtype=self._types.DT_STRING,
            string_val=[f"| parameter | value |\n|---|---|\n{rows}".encode()],
            tensor_shape=self._shapes.TensorShapeProto(),
        )
        kind = self._summaries.SummaryMetadata(
            plugin_data=self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        )
        return self._summaries.Summary(value=[self._summaries.Summary.Value(tag=tag, metadata=kind, tensor=tensor)])
