"""`fedprune-server export-model`: take the model out."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedprune import tensorfile
from fedprune.errors import ExitCode, UsageError


def export_model(arguments: argparse.Namespace) -> int:
    """Write the global model of a state folder."""
    from fedprune.disk import write_whole
    from fedprune_export.conversion import model_onnx, state_dict, with_weights, write_state_dict
    from fedprune_server.store.state_folder import global_model, model_after

    out: Path = arguments.out
    if out.suffix not in (".onnx", ".safetensors", ".pt", ".pth"):
        raise UsageError("--out", expected="a file name that ends in .onnx, .safetensors, .pt or .pth", got=str(out))
    digest = None if arguments.round is None else model_after(arguments.state, arguments.round)
    model, weights = global_model(arguments.state, digest)
    tensors = tensorfile.decode(weights)
    if out.suffix in (".pt", ".pth"):
        size = write_state_dict(out, state_dict(model.architecture, tensors, model.graph))
    else:
        if out.suffix == ".onnx":
            weights = model_onnx(with_weights(model, tensors, str(arguments.state)), arguments.opset)
        write_whole(out, weights)
        size = len(weights)
    print(f"{out}: {size} bytes")
    return int(ExitCode.OK)
