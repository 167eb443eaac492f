"""The plan of a TensorRT engine: which graph, how precise, for which batches, and with which limits.

A bundle may carry a plan as `engine.json`. It is the exporter's wish: a board checks every field, and takes the
defaults if there is none.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from fedprune.core import validation as check
from fedprune.core.errors import ConfigError, value_text
from fedprune.core.settings import bounded, check_fields, choice_of
from fedprune.core.tensorfile import sha256_hex

ENGINE_PLAN_FORMAT = "fedprune.engine/1"
# The name of a plan's file in a bundle.
ENGINE_PLAN_FILE = "engine.json"

# The precisions of an engine, and how far its outputs may then be from onnxruntime's in float32, relative to 1 plus the
# largest output. TF32 rounds factors to 10 bits of mantissa, as float16 has, but keeps float32's range.
TOLERANCES = {"float32": 1e-3, "tf32": 1e-2, "float16": 3e-2}

_GRAPH = re.compile(r"[a-z0-9][a-z0-9._-]{0,59}\.onnx")
_MIB = 2**20
# Bytes of a plan; ours have some 200. It comes from another machine.
_MAX_PLAN_BYTES = 10_000

MAX_BATCH = 4096


@dataclass(frozen=True)
class EnginePlan:
    """How an engine is built. Raises `ConfigError` if a field is out of range.

    Attributes:
        graph: The graph, in the folder of the weights. From TensorRT 10 on an engine's types are the graph's, so that
            one in float16 needs a graph with float32 inputs and outputs and float16 between; TensorRT 8 chooses types
            itself.
        precision: One of `TOLERANCES`.
        batch: The least, the usual and the most samples at once; larger batches are predicted in parts.
        pool_bytes: Memory that a layer's implementation may take for itself while the engine is built and runs.
        timeout_s: Seconds after which a build is abandoned.
        level: TensorRT's builder optimisation level, 0 to 5; versions without it ignore it.
        refit: Whether an engine may be built so that it takes new weights, which can cost some of its speed.
    """

    graph: str = "inference.onnx"
    precision: str = choice_of("float32", TOLERANCES)
    batch: tuple[int, int, int] = bounded((1, 1, 64), 1, MAX_BATCH)
    pool_bytes: int = bounded(256 * _MIB, _MIB, 64 * 2**30)
    timeout_s: float = bounded(1800.0, 1, 86_400)
    level: int = bounded(3, 0, 5)
    refit: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.graph, str) or not _GRAPH.fullmatch(self.graph):
            raise ConfigError(
                "graph", expected="the name of an .onnx file in the folder of the weights", got=value_text(self.graph)
            )
        if not isinstance(self.batch, tuple) or len(self.batch) != 3:
            raise ConfigError("batch", expected="the least, the usual and the most samples", got=value_text(self.batch))
        check_fields(self, ())
        if sorted(self.batch) != list(self.batch):
            raise ConfigError("batch", expected="ascending numbers", got=", ".join(map(str, self.batch)))

    @property
    def tolerance(self) -> float:
        """How far outputs may be from onnxruntime's, see `TOLERANCES`."""
        return TOLERANCES[self.precision]

    @property
    def digest(self) -> str:
        return sha256_hex(self.to_json().encode())

    def to_json(self) -> str:
        return json.dumps({"format": ENGINE_PLAN_FORMAT, **asdict(self)}, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, raw: bytes, where: str = ENGINE_PLAN_FILE) -> EnginePlan:
        """Read and check; a missing field has its default. Raises `ConfigError`, which names `where`, if it is no plan,
        of another version, or a field is unknown or out of range."""
        try:
            if len(raw) > _MAX_PLAN_BYTES:
                raise ValueError(f"{len(raw)} bytes")
            body: Any = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is no plan of an engine", expected="a small JSON object") from error
        if not isinstance(body, dict) or body.pop("format", None) != ENGINE_PLAN_FORMAT:
            raise ConfigError(
                f"{where} is no plan of an engine that is known here", expected=f"format {ENGINE_PLAN_FORMAT}"
            )
        fields = check.check_table(cls, body, where)
        if isinstance(fields.get("batch"), list):
            fields["batch"] = tuple(fields["batch"])
        try:
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.what}", expected=error.expected, got=error.got) from error
