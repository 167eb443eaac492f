"""`to-onnx` and `to-torch`: write models of bundles, boards and fleets as files that other programs read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune.core.atomic_file import write_atomically
from fedprune.core.cli import add_json_option, positive_integer, print_json
from fedprune.core.errors import UsageError
from fedprune.core.text import quantity
from fedprune.output import tables
from fedprune.runtime.bundle import FILES, MANIFEST
from fedprune_export.cli.options import MODEL_HELP, read_model
from fedprune_export.model_options import add_model_options

if TYPE_CHECKING:
    from fedprune_export.bundles.conversion import ConversionSource

_SOURCE_HELP = f"the folder of a bundle, the state folder of a board, or a whole model: {MODEL_HELP}"
_BOARD_HINT = "A board doesn't know which channels of the whole model it has: take the global model from the server."
_WEIGHTS_HELP = "weights of the whole model, such as fedprune-server export-model writes"


def register(subparsers: Any) -> None:
    # Both commands register here, whichever is asked for: they share their last options.
    onnx: argparse.ArgumentParser = subparsers.add_parser(
        "to-onnx",
        description="Write a bundle's submodel, the model that a board serves, or a whole model with given weights as "
        "one ONNX file with the weights inside. Its input is x, its output logits. The outputs of file and source are "
        "compared on random samples.",
    )
    onnx.add_argument("source", metavar="SOURCE", help=_SOURCE_HELP)
    onnx.add_argument("out", type=Path, metavar="OUT.onnx")
    onnx.add_argument("--opset", type=positive_integer, metavar="N", help="opset of the file, 13 to 23 (default: 17)")
    onnx.set_defaults(function=to_onnx)
    torch: argparse.ArgumentParser = subparsers.add_parser(
        "to-torch",
        description="Write weights as a state dict by their original names. Those of a bundle or a board have the "
        "submodel's shapes; with --into a bundle's are put at their places in the whole model. A model with the state "
        "dict is compared with the source on random samples, in torch where a module is named.",
    )
    torch.add_argument("source", metavar="SOURCE", help=_SOURCE_HELP)
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
        parser.add_argument("--weights", type=Path, metavar="FILE.safetensors", help=_WEIGHTS_HELP)
        add_json_option(parser)
        add_model_options(parser)


def to_onnx(arguments: argparse.Namespace) -> None:
    """Write an ONNX file."""
    from fedprune_export.bundles import conversion

    # Before the import of a model, which may take minutes.
    _check_result_path(arguments, ".onnx")
    source = _read_source(arguments)
    with tables.progress(f"writing {arguments.out}") as tell:
        raw = conversion.onnx_file(source.graph, source.tensors, arguments.name or "model", arguments.opset)
        # Compared before it is written: a file that computes something else never exists.
        tell("comparing outputs")
        error = conversion.check_onnx_parity(raw, source.graph)
        write_atomically(arguments.out, raw)
    text = (
        f"{len(raw):,} bytes, {source.title}; {conversion.agreement_text(error)}{conversion.ports_text(source.graph)}"
    )
    if source.bundle is not None and (note := conversion.lost_draws_note(source.bundle)):
        text += f"\nnote: {note}"
    _print_result(arguments, source.title, len(raw), error, text)


def to_torch(arguments: argparse.Namespace) -> None:
    """Write a state dict."""
    from fedprune_export.bundles import conversion
    from fedprune_export.importing import torch_module

    _check_result_path(arguments, ".safetensors", ".pt", ".pth")
    source = _read_source(arguments)
    graph, tensors, module_source, hint = source.graph, source.tensors, None, ""
    if arguments.into is not None:
        if source.bundle is None:
            hint = "A whole model's weights are in their places already." if source.is_whole else _BOARD_HINT
            raise UsageError("--into is for bundles", hint=hint)
        whole_model = read_model(arguments, arguments.into, source.bundle.architecture.name, source.bundle.recipe)
        tensors = conversion.scatter_bundle(source.bundle, whole_model, keep=arguments.others == "keep")
        graph, module_source = whole_model.graph, arguments.into
        hint = (
            "Channels of zeros count in a layer norm or group norm: use --others keep, or leave out --into and build "
            "the module as narrow (fedprune_export.narrowed)."
        )
    elif source.is_whole:
        module_source = arguments.source
    state = conversion.state_dict(tensors, graph)
    comparison = ""
    error: float | None = None
    # With other weights in the missing channels the whole model computes something else by intention.
    if arguments.into is None or arguments.others == "zero":
        with tables.progress("comparing outputs"):
            # A new instance, as whoever loads the file has one: the exported one has what the state dict may lack.
            # A module has no fixed inputs: it would have to be called with more.
            module = None if module_source is None or arguments.fix else torch_module(module_source)
            error = conversion.check_state_parity(state, graph, source.graph, module, hint)
        comparison = f"; {conversion.agreement_text(error)}{'' if module is None else ' in torch'}"
    size = conversion.write_state_dict(arguments.out, state)
    text = f"{quantity(len(state), 'tensor')}, {size:,} bytes, {source.title}{comparison}"
    _print_result(arguments, source.title, size, error, text)


def _print_result(arguments: argparse.Namespace, title: str, size: int, error: float | None, text: str) -> None:
    """`error` is the largest difference of outputs; None if they weren't compared."""
    if arguments.json:
        print_json({"file": str(arguments.out), "bytes": size, "source": title, "difference": error})
    else:
        print(f"{arguments.out}: {text}")


def _check_result_path(arguments: argparse.Namespace, *endings: str) -> None:
    """Refuse another kind of file name, and one that would overwrite a source."""
    if arguments.out.suffix not in endings:
        expected = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise UsageError("OUT", expected=f"a file name that ends in {expected}", got=str(arguments.out))
    if not arguments.out.exists():
        return
    for source in (arguments.source, arguments.weights, getattr(arguments, "into", None)):
        if source is None:
            continue
        path = Path(source)
        files = [path / name for name in (*FILES, MANIFEST)] if path.is_dir() else [path]
        if any(p.exists() and arguments.out.samefile(p) for p in files):
            raise UsageError(f"{arguments.out} is read and would be written over", hint="Give the result another name.")


def _read_source(arguments: argparse.Namespace) -> ConversionSource:
    """The folder of a bundle or a board, or else a whole model."""
    from fedprune_export.bundles import conversion
    from fedprune_export.importing.hub_folder import is_hub_folder

    if Path(arguments.source).is_dir() and not is_hub_folder(Path(arguments.source)):
        if arguments.weights is not None:
            raise UsageError("--weights is for whole models", hint=f"The weights of {arguments.source} are in it.")
        return conversion.read_folder(arguments.source)
    with tables.progress() as tell:
        tell(f"importing {arguments.source}")
        return conversion.full_model_source(read_model(arguments, arguments.source), arguments.weights)
