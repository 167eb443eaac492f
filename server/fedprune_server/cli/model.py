"""`fedprune-server export-model`: take the model out."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode, UsageError


def export_model(arguments: argparse.Namespace) -> int:
    """Write the global model of a state folder."""
    from fedprune.core.atomic_file import write_whole
    from fedprune_export.bundles import conversion
    from fedprune_server.engine.state_directory import global_model, model_after

    out: Path = arguments.out
    if out.suffix not in (".onnx", ".safetensors", ".pt", ".pth"):
        raise UsageError("--out", expected="a file name that ends in .onnx, .safetensors, .pt or .pth", got=str(out))
    digest = None if arguments.round is None else model_after(arguments.state, arguments.round)
    model, weights = global_model(arguments.state, digest)
    model = conversion.with_weights(model, tensorfile.decode(weights), str(arguments.state))
    if out.suffix == ".safetensors":
        write_whole(out, weights)
        size, compared = len(weights), ""
    elif out.suffix == ".onnx":
        raw = conversion.onnx_file(model.graph, model.tensors, model.architecture.name, arguments.opset)
        compared = f"; {conversion.agreement(conversion.onnx_parity(raw, model.graph))}"
        write_whole(out, raw)
        size = len(raw)
    else:
        state = conversion.state_dict(model.tensors, model.graph)
        compared = f"; {conversion.agreement(conversion.state_parity(state, model.graph, model.graph))}"
        size = conversion.write_state_dict(out, state)
    print(f"{out}: {size:,} bytes{compared}")
    return int(ExitCode.OK)
