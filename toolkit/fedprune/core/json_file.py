"""JSON files: what people and other programs write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedprune.core.disk import MOST_BYTES, read_file
from fedprune.core.errors import FedpruneError, reason, remedy


def read_json(path: Path, error: type[FedpruneError], most: int = MOST_BYTES) -> Any:
    """The value of a JSON file of at most `most` bytes. Raises `error`, which names the file, if it can't be read or is
    no JSON."""
    try:
        return json.loads(read_file(path, most))
    except OSError as cause:
        raise error(f"can't read {path}: {cause.strerror}", hint=remedy(cause)) from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON ({reason(cause)})") from cause
