"""Instance norms with running statistics. In imported graphs each is a BatchNormalization, as torch evaluates it.

ONNX has no operator that normalises a sample by itself in training and by running statistics in evaluation: the graph's
metadata says which norms do.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedprune_export.ir.graph import decode_metadata

# The key of a graph's metadata for the running means of instance norms, a list of names.
INSTANCE_NORMS_KEY = "fedprune.instance_norms"


def instance_means(texts: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the running means of instance norms. Raises `ModelError` if the text is something else."""
    return decode_metadata(texts, INSTANCE_NORMS_KEY, tuple[str, ...], "a list of names") or ()
