"""`to-onnx` and `to-torch`: a bundle, or a model with weights of a fleet, as files that other programs read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune import tensorfile, terminal
from fedprune.bundle import FILES, MANIFEST, Bundle, open_bundle
from fedprune.cli import whole_number
from fedprune.disk import write_whole
from fedprune.errors import ExitCode, UsageError
from fedprune.quantity import quantity
from fedprune_export.options import MODEL_HELP, add_model_options, read_model

if TYPE_CHECKING:  # heavy imports wait until the command line is known to make sense
    from fedprune_export.imported import Model

_SOURCE = f"a bundle's folder, or a whole model: {MODEL_HELP}"
_WEIGHTS = "weights of the whole model, such as fedprune-server export-model writes"


def register(subparsers: Any) -> None:
    """Add `to-onnx` and `to-torch`; their functions take the parsed arguments and return an exit code.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
    """
    onnx: argparse.ArgumentParser = subparsers.add_parser(
        "to-onnx",
        help="a bundle or model as one ONNX file",
        description="Write a bundle's submodel, or a whole model with given weights, as one ONNX file with the weights "
        "inside. Its input is x, its output logits.",
    )
    onnx.add_argument("source", metavar="SOURCE", help=_SOURCE)
    onnx.add_argument("out", type=Path, metavar="OUT.onnx")
    onnx.add_argument("--opset", type=whole_number, metavar="N", help="opset of the file, 13 to 23 (default: 17)")
    onnx.set_defaults(function=to_onnx)
    torch: argparse.ArgumentParser = subparsers.add_parser(
        "to-torch",
        help="a bundle's weights as a torch state dict",
        description="Write the weights of a bundle, or of a whole model, as a state dict by their original names. "
        "A bundle's tensors have the submodel's shapes; with --into they are put at their places in the whole model.",
    )
    torch.add_argument("source", metavar="SOURCE", help=_SOURCE)
    torch.add_argument("out", type=Path, metavar="OUT", help="a file name that ends in .safetensors, .pt or .pth")
    torch.add_argument(
        "--into", metavar="MODEL", help=f"the whole model whose weights a bundle's replace: {MODEL_HELP}"
    )
    torch.set_defaults(function=to_torch)
    for parser in (onnx, torch):
        parser.add_argument("--weights", type=Path, metavar="FILE.safetensors", help=_WEIGHTS)
        add_model_options(parser)


def to_onnx(arguments: argparse.Namespace) -> int:
    """Write an ONNX file.

    Raises:
        FedpruneError: The source is damaged, its graph has no form in the opset, or the file can't be written.
    """
    from fedprune_export import conversion

    _check_out(arguments)
    source = _source(arguments)
    if isinstance(source, Bundle):
        raw = conversion.bundle_onnx(source, arguments.opset)
    else:
        raw = conversion.model_onnx(source, arguments.opset)
    write_whole(arguments.out, raw)
    print(f"{arguments.out}: {len(raw):,} bytes")
    return int(ExitCode.OK)


def to_torch(arguments: argparse.Namespace) -> int:
    """Write a state dict.

    Raises:
        FedpruneError: The source is damaged, doesn't fit the model, or the file can't be written.
    """
    from fedprune_export import conversion
    from fedprune_export.bundle_graph import inference_graph

    _check_out(arguments)
    source = _source(arguments)
    if isinstance(source, Bundle):
        into = None if arguments.into is None else read_model(arguments, arguments.into, source.architecture.name)
        tensors, graph = conversion.bundle_tensors(source, into), inference_graph(source)
    elif arguments.into is not None:
        raise UsageError("--into is for bundles", hint="A whole model's weights are in their places already.")
    else:
        tensors, graph = source.tensors, source.graph
    state = conversion.state_dict(source.architecture, tensors, graph)
    size = conversion.write_state_dict(arguments.out, state)
    print(f"{arguments.out}: {quantity(len(state), 'tensor')}, {size:,} bytes")
    return int(ExitCode.OK)


def _check_out(arguments: argparse.Namespace) -> None:
    """Refuse to write over what is read.

    Raises:
        UsageError: The result would take the place of a file that it is made from.
    """
    if not arguments.out.exists():
        return
    for read in (arguments.source, arguments.weights, getattr(arguments, "into", None)):
        if read is not None and any(p.exists() and arguments.out.samefile(p) for p in _files(Path(read))):
            raise UsageError(f"{arguments.out} is read and would be written over", hint="Give the result another name.")


def _files(source: Path) -> list[Path]:
    """A file, or the files of a bundle."""
    return [source / name for name in (*FILES, MANIFEST)] if source.is_dir() else [source]


def _source(arguments: argparse.Namespace) -> Bundle | Model:
    """What is converted.

    Raises:
        FedpruneError: It can't be read.
    """
    from fedprune_export import conversion

    folder = Path(arguments.source)
    if folder.is_dir():
        if arguments.weights is not None:
            raise UsageError("--weights is for whole models", hint=f"The weights of {folder} are in it.")
        return open_bundle(folder)
    with terminal.progress() as tell:
        tell(f"importing {arguments.source}")
        model = read_model(arguments, arguments.source)
        if arguments.weights is None:
            return model
        return conversion.with_weights(model, tensorfile.load(arguments.weights), str(arguments.weights))
