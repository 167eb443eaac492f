"""Reverse-mode differentiation over ONNX graphs: the tape, and helpers that the rules of several operators share.

Not here: the rules of operators (`operators`), losses and optimisers (`training`).
"""

from fedprune_export.autodiff.tape import RULES, Tape

__all__ = ["RULES", "Tape"]
