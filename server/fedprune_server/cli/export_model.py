"""`fedprune-server export-model`: write the global model of a state folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_whole
from fedprune.core.cli import add_json, print_json, whole_number
from fedprune.core.errors import UsageError
from fedprune.core.text import amount
from fedprune_export.bundles import conversion
from fedprune_server.cli.state_option import add_state
from fedprune_server.engine.state_directory import global_model, model_after


def add_export_model(export: argparse.ArgumentParser) -> None:
    add_state(export)
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="model.onnx, weights.safetensors, or state.pt; written over if it is there",
    )
    export.add_argument("--opset", type=whole_number, metavar="N", help="opset of the .onnx file (default: 17)")
    export.add_argument("--round", type=int, metavar="N", help="after this round, if its model is still kept")
    add_json(export)
    export.set_defaults(function=_export_model)


def _export_model(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.suffix not in (".onnx", ".safetensors", ".pt", ".pth"):
        raise UsageError("--out", expected="a file name that ends in .onnx, .safetensors, .pt or .pth", got=str(out))
    digest = None if arguments.round is None else model_after(arguments.state, arguments.round)
    model, weights = global_model(arguments.state, digest)
    model = conversion.with_weights(model, tensorfile.decode(weights), str(arguments.state))
    error: float | None = None
    if out.suffix == ".safetensors":
        write_whole(out, weights)
        size = len(weights)
    elif out.suffix == ".onnx":
        raw = conversion.onnx_file(model.graph, model.tensors, model.architecture.name, arguments.opset)
        error = conversion.onnx_parity(raw, model.graph)
        write_whole(out, raw)
        size = len(raw)
    else:
        state = conversion.state_dict(model.tensors, model.graph)
        error = conversion.state_parity(state, model.graph, model.graph)
        size = conversion.write_state_dict(out, state)
    if arguments.json:
        print_json({"file": str(out), "bytes": size, "difference": error})
        return
    compared = "" if error is None else f"; {conversion.agreement(error)}"
    print(f"{out}: {amount(size, 'bytes')}{compared}")
