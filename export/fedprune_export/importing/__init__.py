"""Import of a user's model: read, checked, normalised, weights separated from constants.

Not here: writing models back out (`bundles.conversion`).
"""

from fedprune_export.importing.load import check_input, import_onnx, load, read_source, with_choices
from fedprune_export.importing.metadata import PARAMETERS_KEY
from fedprune_export.importing.sources import compare_models, drawn_tensors, is_factory_source, torch_module
from fedprune_export.importing.torch_export import export_torch
from fedprune_export.model_options import ImportChoices

__all__ = [
    "PARAMETERS_KEY",
    "ImportChoices",
    "check_input",
    "compare_models",
    "drawn_tensors",
    "export_torch",
    "import_onnx",
    "is_factory_source",
    "load",
    "read_source",
    "torch_module",
    "with_choices",
]
