"""How each layer of a training graph for one x86 board is computed: layouts with channels in blocks.

Not here: what is computed (`autodiff`). All widths of the graph are fixed.

onnxruntime's convolutions are fastest with channels in blocks. It uses them by itself only where weights are constants;
in a training graph weights are inputs, so layouts are written into the graph.
"""

from fedprune_export.formulation import (
    convolutions,
    elementwise,
    kernel_gradients,
    norms,
)
from fedprune_export.formulation.forms import Forms
from fedprune_export.formulation.formulator import formulated, intended

RULE_MODULES = (convolutions, elementwise, kernel_gradients, norms)

__all__ = ["Forms", "formulated", "intended"]
