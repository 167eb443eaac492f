"""Takes fused operators apart, which optimisers such as onnxruntime's write: each becomes operators of the standard.

An operator is a function in one of this package's files, registered in `fused_node.RULES`. It emits the forms of opset
17; `decomposition` writes them at the file's own opset. The result is compared with onnxruntime's run of the file, as
every import is.
"""

from fedprune_export.importing.fused_operators.decomposition import DECOMPOSED, decompose_fused
from fedprune_export.importing.fused_operators.stand_ins import name_early_norms, restore_early_norms

__all__ = ["DECOMPOSED", "decompose_fused", "name_early_norms", "restore_early_norms"]
