"""`fedprune-server export-model`: write the global model of a state folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_atomically
from fedprune.core.cli import print_json
from fedprune.core.errors import StorageError, UsageError
from fedprune.core.metrics import METRICS
from fedprune.core.text import amount
from fedprune_export.bundles import conversion
from fedprune_export.bundles.hub_repository import save_pretrained
from fedprune_export.importing.hub_folder import HUB_FILES
from fedprune_export.pruning.model import Model
from fedprune_server.config.stored_code import stored_job
from fedprune_server.engine.stored_job import BEST_ROUND, finished_round, global_model
from fedprune_server.monitoring.round_rows import RoundNotes
from fedprune_server.simulation.results.job_record import job_record
from fedprune_server.simulation.results.model_card import model_card
from fedprune_server.simulation.results.record import Record
from fedprune_server.storage.storage import Storage


def run_export_model(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    # The hub's layout is a folder: a name without a suffix means one that is to be made.
    hub = not out.suffix or out.is_dir()
    if not hub and out.suffix not in (".onnx", ".safetensors", ".pt", ".pth"):
        expected = "a folder, or a file name that ends in .onnx, .safetensors, .pt or .pth"
        raise UsageError("--out", expected=expected, got=str(out))
    if hub and arguments.opset is not None:
        raise UsageError("--opset is for .onnx files", hint=f"{out} is a folder.")
    digest = metric = score = round_asked = None
    if arguments.round is not None:
        row, metric = finished_round(arguments.state, arguments.round)
        digest, round_asked, score = str(row["model"]), int(row["round"]), row["metrics"].get(metric)
    model, weights, ranks, last_round = global_model(arguments.state, digest, arguments.allow)
    round_ = last_round if round_asked is None else round_asked
    model = conversion.with_weights(model, tensorfile.decode(weights), str(arguments.state), ranks)
    error: float | None = None
    if hub:
        card = model_card(_record(arguments.state, model, round_asked, arguments.allow))
        size = sum((save_pretrained(model, out, card=card) / name).stat().st_size for name in HUB_FILES)
    elif out.suffix == ".safetensors":
        write_atomically(out, weights)
        size = len(weights)
    elif out.suffix == ".onnx":
        # The file is run next to the graph that it was made from, so that a wrong conversion never leaves here unseen.
        raw = conversion.onnx_file(model.graph, model.tensors, model.architecture.name, arguments.opset)
        error = conversion.check_onnx_parity(raw, model.graph)
        write_atomically(out, raw)
        size = len(raw)
    else:
        state = conversion.state_dict(model.tensors, model.graph)
        error = conversion.check_state_parity(state, model.graph, model.graph)
        size = conversion.write_state_dict(out, state)
    if arguments.json:
        score_fields = {"metric": metric, "score": score}
        print_json({"file": str(out), "bytes": size, "difference": error, "round": round_} | score_fields)
        return
    compared = "" if error is None else f"; {conversion.agreement_text(error)}"
    compared += conversion.ports_text(model.graph) if out.suffix == ".onnx" else ""
    best = "best " if arguments.round == BEST_ROUND else ""
    scored = "" if metric is None or score is None else f" ({METRICS[metric].titled_value(score)})"
    subject = f"the {best}global model after round {round_}{scored}"
    subject = subject if round_ else "the initial model: no round has ended yet"
    print(f"{out}: {amount(size, 'bytes')}, {subject}{compared}")


def _record(folder: Path, model: Model, round_: int | None, allowed: Sequence[str]) -> Record:
    """The record of a server's job, up to a round if one is given. Raises `StorageError` if it has no finished one,
    `ConfigError` if the job's strategy is code that isn't allowed."""
    with Storage.open_existing(folder) as storage:
        settings, state, traffic = storage.settings(), storage.load(), storage.traffic()
    if settings is None or state is None:
        raise StorageError(f"{folder} holds no job yet")
    job = stored_job(settings, allowed, str(folder))
    # A server counts the bytes of a device since the job's start.
    down, up = (sum(byte_counts[direction] for byte_counts in traffic.values()) for direction in (0, 1))
    notes = {entry["round"]: RoundNotes(down, up) for entry in state.history[-1:]}
    record = job_record(job.name, job, model.architecture, state, notes=notes)
    return replace(record, rounds=tuple(row for row in record.rounds if round_ is None or row.round <= round_))
