"""Instance norms with running statistics. In imported graphs each is a BatchNormalization, as torch evaluates it.

ONNX has no operator that normalises a sample by itself in training and by running statistics in evaluation: the graph's
metadata says which norms do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from fedprune.core.errors import ModelError, value_text

# The key of a graph's metadata for the running means of instance norms, a list of names.
INSTANCE_NORMS_KEY = "fedprune.instance_norms"


def instance_means(texts: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the running means of instance norms. Raises `ModelError` if the text is something else."""
    try:
        names = json.loads(texts.get(INSTANCE_NORMS_KEY, "[]"))
    # Deeply nested JSON ends in a RecursionError.
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"metadata {INSTANCE_NORMS_KEY}", expected="a list of names", got=value_text(texts[INSTANCE_NORMS_KEY])
        )
    return tuple(names)
