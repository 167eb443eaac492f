"""Bringing a user's model in: reading, normalising, lowering, telling weights from constants."""

from fedprune_export.importing.load import PARAMETERS_KEY, export_torch, import_onnx, load, read_source

__all__ = ["PARAMETERS_KEY", "export_torch", "import_onnx", "load", "read_source"]
