"""Channel analysis: which channels of a graph can only be kept or cut together.

Not here: the rules of operators (`operators`), and the cut itself (`pruning`).
"""

from fedprune_export.channels.analysis import Analysis, analyse

__all__ = ["Analysis", "analyse"]
