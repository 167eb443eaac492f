"""The file in which a job under Flower is kept between rounds, and from which it continues after a restart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.client_update import check_fold_base
from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_atomically
from fedprune.core.errors import FedpruneError, StorageError
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Tensors
from fedprune.strategies.values import NewMemory

FORMAT = "fedprune.flower-state/1"

# The tensor that holds the state's head as JSON: one file, so that it is replaced in one step.
_HEAD_TENSOR = "fedprune"

_HEAD_TYPES = {
    "format": str, "architecture": str, "strategy": str, "round": int, "samples": dict, "last": dict, "memory": list,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class FlowerState:
    """What the next round continues from: the model, what the strategy remembers, and the counts of each node."""

    model: Tensors
    memory: NewMemory
    round: int
    samples_of_node: dict[str, int]
    last_counted_round: dict[str, int]


def write_state(path: Path, state: FlowerState, architecture: str, strategy: str) -> None:
    """Write a job's state, with the digest of its architecture and the name of its strategy."""
    head = {
        "format": FORMAT,
        "architecture": architecture,
        "strategy": strategy,
        "round": state.round,
        "samples": state.samples_of_node,
        "last": state.last_counted_round,
        "memory": list(state.memory),
    }
    text = np.frombuffer(json.dumps(head, sort_keys=True).encode(), np.uint8)
    tensors: dict[str, npt.NDArray[Any]] = {_HEAD_TENSOR: text}
    tensors |= {f"model/{n}": v for n, v in state.model.items()}
    for number, tensors_of_memory in enumerate(state.memory.values()):
        tensors |= {f"memory/{number}/{key}": np.asarray(v) for key, v in tensors_of_memory.items()}
    write_atomically(path, tensorfile.encode(tensors))


def read_state(path: Path, architecture: Architecture, strategy: str) -> FlowerState:
    """Read what `write_state` wrote. Raises `StorageError` if it is damaged, or of another model or strategy."""
    try:
        stored = tensorfile.decode(path.read_bytes())
        head = json.loads(stored.pop(_HEAD_TENSOR).tobytes())
        if {k: type(head[k]) for k in _HEAD_TYPES} != _HEAD_TYPES:
            raise ValueError("its head")
        model = {n.removeprefix("model/"): v for n, v in stored.items() if n.startswith("model/")}
        memory: NewMemory = {}
        for number, name in enumerate(head["memory"]):
            prefix = f"memory/{number}/"
            memory[str(name)] = {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(prefix)}
        expected = {"format": FORMAT, "architecture": architecture.digest, "strategy": strategy}
        for key, value in expected.items():
            if head[key] != value:
                raise StorageError(f"{path}: {key} of the state", expected=value[:24], got=repr(head[key])[:24])
        model = check_fold_base(architecture, model)
    except StorageError:
        raise
    except (FedpruneError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{path} is no state of a job under Flower ({type(error).__name__}: {error})"
        raise StorageError(what, hint="Name another file, or start again without it.") from error
    return FlowerState(model, memory, head["round"], head["samples"], head["last"])
