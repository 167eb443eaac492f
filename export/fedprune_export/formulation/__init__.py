"""From intents to operators: how each layer of a training graph for one board is computed there.

The graph's widths are fixed. onnxruntime's convolutions are fastest with channels in blocks (`Layouts`), which it uses
by itself only where weights are constants; here they are inputs, so layouts are written into the graph.
"""

from fedprune_export.formulation import (
    convolutions,
    elementwise,
    group_norms,
    kernel_gradients,
    norms,
    pooling,
    updates,
)
from fedprune_export.formulation.forms import Forms
from fedprune_export.formulation.formulator import formulated, intended

RULE_MODULES = (convolutions, elementwise, group_norms, kernel_gradients, norms, pooling, updates)

__all__ = ["Forms", "formulated", "intended"]
