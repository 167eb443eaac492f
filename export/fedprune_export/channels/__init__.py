"""Channel analysis: which channels of a graph can only be kept or cut together.

Not here: the cut itself (`pruning`). Importing the package registers all rules.
"""

from fedprune_export.channels import elementwise, norms, products, reductions, reshapes, shapes
from fedprune_export.channels.analysis import Analysis, analyse

RULE_MODULES = (elementwise, norms, products, reductions, reshapes, shapes)  # where the channel rules live

__all__ = ["RULE_MODULES", "Analysis", "analyse"]
