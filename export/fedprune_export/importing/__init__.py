"""Import of a user's model: read, checked, normalised, weights separated from constants.

Not here: writing models back out (`bundles.conversion`).
"""

from fedprune_export.importing.load import check_input, import_onnx, load, read_source, torch_module
from fedprune_export.importing.metadata import PARAMETERS_KEY
from fedprune_export.importing.torch_export import export_torch
from fedprune_export.importing.user_graphs import with_graphs_of

__all__ = [
    "PARAMETERS_KEY",
    "check_input",
    "export_torch",
    "import_onnx",
    "load",
    "read_source",
    "torch_module",
    "with_graphs_of",
]
