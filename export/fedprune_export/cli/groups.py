"""`groups MODEL`: which channels can only be cut together, and what stays."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fedprune.core.errors import ExitCode
from fedprune.model.architecture import FIXED, Architecture
from fedprune.terminal import tables
from fedprune_export.cli.options import MODEL_HELP, add_model_options, read_model

if TYPE_CHECKING:  # heavy imports wait until the command line is known to make sense
    from fedprune_export.pruning.model import Model


def register(subparsers: Any) -> None:
    """Add the command `groups`; its function takes the parsed arguments and returns an exit code.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "groups",
        help="the channel groups of a model, and what stays",
        description="Print the groups of channels that can only be kept or cut together, every axis on which each "
        "lives (conv1.weight[0] is the first one), the axes that stay whole, and why.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_options(parser)
    parser.set_defaults(function=groups)


def groups(arguments: argparse.Namespace) -> int:
    """Print a model's channel groups.

    Raises:
        FedpruneError: The model can't be imported.
    """
    with tables.progress() as tell:
        tell(f"importing {arguments.model}")
        model = read_model(arguments)
    if arguments.json:
        tables.print_json(_body(model))
        return int(ExitCode.OK)
    architecture = model.architecture
    for i, group in enumerate(architecture.groups):
        print(f"{group.name}: {group.size} channels: {', '.join(architecture.summary(i))}")
    whole = staying(architecture)
    print(f"stays: {', '.join(f'{place} ({size})' for place, size in whole) if whole else 'nothing'}")
    print("why: inputs and outputs of a model stay; notes name what else keeps channels")
    for note in model.notes:
        print(f"note: {note}")
    return int(ExitCode.OK)


def _body(model: Model) -> dict[str, Any]:
    architecture = model.architecture
    return {
        "model": architecture.name,
        "digest": architecture.digest,
        "groups": [
            {"name": g.name, "channels": g.size, "members": list(architecture.members(i))}
            for i, g in enumerate(architecture.groups)
        ],
        "stays": [{"place": place, "indices": size} for place, size in staying(architecture)],
        "notes": list(model.notes),
    }


def staying(architecture: Architecture) -> list[tuple[str, int]]:
    """Channel axes of weights that stay, in whole or in part: places such as `fc.weight[0]`, and how many indices.

    Windows of convolutions are no channels; of a layer's weight the axes that it reads and makes are looked at.
    """
    kernels = {n.weight: n.op for n in architecture.layers if n.weight in architecture.by_name}
    out = []
    for spec in architecture.tensors:
        axes = spec.axes[:2] if "Conv" in kernels.get(spec.name, "") else spec.axes
        for i, axis in enumerate(axes):
            size = sum(s.length for s in axis.segments if s.group == FIXED)
            # A depthwise filter reads one channel: an axis of length 1 is none that could be cut.
            if size and not (size == 1 and axis.length == 1):
                out.append((f"{spec.name}[{i}]", size))
    return out
