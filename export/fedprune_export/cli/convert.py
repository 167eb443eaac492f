"""`to-onnx` and `to-torch`: models out of bundles, boards and fleets, as files that other programs read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_whole
from fedprune.core.cli import whole_number
from fedprune.core.errors import ExitCode, UsageError
from fedprune.core.text import quantity
from fedprune.runtime.bundle import FILES, MANIFEST, WEIGHTS, Bundle, open_bundle
from fedprune.runtime.served_model import is_board_state, served_model
from fedprune.terminal import tables
from fedprune_export.cli.options import MODEL_HELP, add_model_options, read_model

if TYPE_CHECKING:  # heavy imports wait until the command line is known to make sense
    from fedprune_export.ir.graph import Graph
    from fedprune_export.pruning.model import Model

_SOURCE = f"the folder of a bundle, the state folder of a board, or a whole model: {MODEL_HELP}"
_WEIGHTS = "weights of the whole model, such as fedprune-server export-model writes"


@dataclass(frozen=True)
class _Source:
    """What is converted.

    Attributes:
        graph: The model, with its weights.
        names: Its weights and statistics, in their order.
        title: What it is.
        bundle: The bundle that it is of, if any.
        model: The whole model that it is, if it is one.
    """

    graph: Graph
    names: tuple[str, ...]
    title: str
    bundle: Bundle | None = None
    model: Model | None = None


def register(subparsers: Any) -> None:
    onnx: argparse.ArgumentParser = subparsers.add_parser(
        "to-onnx",
        help="a bundle, a board's model or a whole model as one ONNX file",
        description="Write a bundle's submodel, the model that a board serves, or a whole model with given weights as "
        "one ONNX file with the weights inside. Its input is x, its output logits. The outputs of file and source are "
        "compared on random samples.",
    )
    onnx.add_argument("source", metavar="SOURCE", help=_SOURCE)
    onnx.add_argument("out", type=Path, metavar="OUT.onnx")
    onnx.add_argument("--opset", type=whole_number, metavar="N", help="opset of the file, 13 to 23 (default: 17)")
    onnx.set_defaults(function=to_onnx)
    torch: argparse.ArgumentParser = subparsers.add_parser(
        "to-torch",
        help="the weights of a bundle, a board's model or a whole model as a torch state dict",
        description="Write weights as a state dict by their original names. Those of a bundle or a board have the "
        "submodel's shapes; with --into a bundle's are put at their places in the whole model. A model with the state "
        "dict is compared with the source on random samples, in torch where a module is named.",
    )
    torch.add_argument("source", metavar="SOURCE", help=_SOURCE)
    torch.add_argument("out", type=Path, metavar="OUT", help="a file name that ends in .safetensors, .pt or .pth")
    torch.add_argument(
        "--into", metavar="MODEL", help=f"the whole model at whose places a bundle's weights are put: {MODEL_HELP}"
    )
    torch.add_argument(
        "--others",
        choices=("zero", "keep"),
        default="zero",
        help="with --into, the weights of channels that the bundle lacks: 0, so that the whole model computes what the "
        "bundle computes, or those of MODEL (default: zero)",
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
    from fedprune_export.bundles import conversion

    _check_out(arguments)
    source = _source(arguments)
    raw = conversion.onnx_file(source.graph, source.names, arguments.name or "model", arguments.opset)
    error = conversion.onnx_parity(raw, source.graph)
    write_whole(arguments.out, raw)
    print(f"{arguments.out}: {len(raw):,} bytes, {source.title}; {conversion.agreement(error)}")
    return int(ExitCode.OK)


def to_torch(arguments: argparse.Namespace) -> int:
    """Write a state dict.

    Raises:
        FedpruneError: The source is damaged, doesn't fit the model, or the file can't be written.
    """
    from fedprune_export.bundles import conversion
    from fedprune_export.importing import torch_module

    _check_out(arguments)
    source = _source(arguments)
    graph, tensors, named, hint = source.graph, {n: source.graph.initializers[n] for n in source.names}, None, ""
    if arguments.into is not None:
        if source.bundle is None:
            raise UsageError("--into is for bundles", hint=_why_not_into(source))
        into = read_model(arguments, arguments.into, source.bundle.architecture.name)
        tensors, graph, named = (
            conversion.placed(source.bundle, into, keep=arguments.others == "keep"),
            into.graph,
            arguments.into,
        )
        hint = (
            "Channels of zeros count in a layer norm or group norm: use --others keep, or leave out --into and build "
            "the module as narrow (fedprune_export.narrowed)."
        )
    elif source.model is not None:
        named = arguments.source
    state = conversion.state_dict(tensors, graph)
    compared = ""
    if arguments.into is None or arguments.others == "zero":
        module = None if named is None else torch_module(named)
        error = conversion.state_parity(state, graph, source.graph, module, hint)
        compared = f"; {conversion.agreement(error)}{'' if module is None else ' in torch'}"
    size = conversion.write_state_dict(arguments.out, state)
    print(f"{arguments.out}: {quantity(len(state), 'tensor')}, {size:,} bytes, {source.title}{compared}")
    return int(ExitCode.OK)


def _why_not_into(source: _Source) -> str:
    if source.model is not None:
        return "A whole model's weights are in their places already."
    return "A board doesn't know which channels of the whole model it has: take the global model from the server."


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


def _source(arguments: argparse.Namespace) -> _Source:
    """What is converted.

    Raises:
        FedpruneError: It can't be read.
    """
    from fedprune_export.bundles import conversion
    from fedprune_export.bundles.inference import inference_graph

    folder = Path(arguments.source)
    if folder.is_dir():
        if arguments.weights is not None:
            raise UsageError("--weights is for whole models", hint=f"The weights of {folder} are in it.")
        if is_board_state(folder):
            served = served_model(folder)
            title = f"the board's model after round {served.round} of job {served.job}"
            return _Source(inference_graph(served.folder), _names(served.folder), title)
        bundle = open_bundle(folder)
        graph = inference_graph(bundle.folder)
        return _Source(graph, _names(bundle.folder), "the bundle's model", bundle=bundle)
    with tables.progress() as tell:
        tell(f"importing {arguments.source}")
        model = read_model(arguments, arguments.source)
    if arguments.weights is not None:
        model = conversion.with_weights(model, tensorfile.load(arguments.weights), str(arguments.weights))
    return _Source(model.graph, tuple(model.tensors), "the whole model", model=model)


def _names(folder: Path) -> tuple[str, ...]:
    """Names of the tensors in a folder's weights."""
    return tuple(tensorfile.load(folder / WEIGHTS))
