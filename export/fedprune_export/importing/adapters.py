"""Adds low-rank adapters to frozen weights (LoRA, Hu et al. 2022, eq. 3): y = x Wᵀ + α/r · x Aᵀ Bᵀ.

Tensors are named as PEFT names them: `NAME.lora_A.weight` [r, inputs] and `NAME.lora_B.weight` [outputs, r] next to
`NAME.weight`. The r ranks are a channel group. Boards hold some of them, and since the product is a sum over ranks, the
sum of what several boards hold is exact. Everything else is frozen and kept whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune.core.validation import check_number, check_texts, check_whole
from fedprune_export.importing.metadata import FROZEN_KEY, PARAMETERS_KEY
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.pruning.model import Model

_A, _B = "lora_A", "lora_B"

# A limit against typing errors: adapters are used with ranks of 1 to 256.
_MAX_RANK = 4096


@dataclass(frozen=True)
class Lora:
    """Which weights get adapters, and of which rank.

    Attributes:
        rank: Ranks of the global model; boards hold some of them.
        patterns: Names of weights of linear layers, with `*` for any letters; by default all layers but the last.
        alpha: The adapter's output is scaled by `alpha / rank`, also on boards with fewer ranks; None for `rank`.
        seed: Seed of the initial values of A. B starts at 0, so that the first model computes what the base does.
    """

    rank: int
    patterns: tuple[str, ...] = ()
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("lora: rank", self.rank, 1, _MAX_RANK, error=ModelError)
        object.__setattr__(self, "patterns", tuple(check_texts("lora: patterns", self.patterns, error=ModelError)))
        if self.alpha is not None:
            check_number("lora: alpha", self.alpha, 0, above=True, error=ModelError)
        check_whole("lora: seed", self.seed, 0, error=ModelError)

    @classmethod
    def parse(cls, text: str) -> Lora:
        """From `RANK` or `RANK:PATTERN,PATTERN`. Raises `ModelError` if it is something else."""
        rank, _, names = text.partition(":")
        if not (rank.isascii() and rank.isdigit() and len(rank) < 6):
            expected = "RANK or RANK:PATTERN,PATTERN, such as 8 or 8:*.q.weight,*.v.weight"
            raise ModelError("lora", expected=expected, got=value_text(text))
        return cls(int(rank), tuple(n.strip() for n in names.split(",") if n.strip()))


def uncut_tensors(parameters: Iterable[str], frozen: Sequence[str]) -> frozenset[str]:
    """The frozen tensors of a model with adapters, fedprune's or PEFT's, of which no channel is cut."""
    adapted = any(f".{_A}." in f".{name}." for name in parameters)
    return frozenset(frozen) if adapted else frozenset()


def with_adapters(model: Model, lora: Lora) -> bytes:
    """A model's file with adapters, in which everything else is frozen.

    Raises `ModelError` if a pattern matches no weight of a linear layer, or a weight has fewer rows or columns than
    there are ranks.
    """
    layers = _linear_layers(model)
    chosen = _matching_layers(list(layers), lora.patterns)
    graph = model.graph.copy()
    adapters: dict[str, Array] = {}
    for name in chosen:
        for key, value in _adapter_tensors(name, layers[name], model.graph.initializers[name].shape, lora).items():
            if key in graph.initializers:
                raise ModelError(f"{name} has an adapter already", got=key, hint="Leave --lora (lora=) out.")
            adapters[key] = value
    graph.initializers |= adapters
    scale = (lora.rank if lora.alpha is None else lora.alpha) / lora.rank
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        graph.nodes.append(node)
        weight = next((n for n in chosen if node.outputs[0] in layers[n]), None)
        if weight is not None:
            _emit_adapter(graph, node, weight, scale)
    base = list(model.tensors)
    graph.metadata[PARAMETERS_KEY] = json.dumps([*base, *adapters])
    graph.metadata[FROZEN_KEY] = json.dumps(base)
    return graph.to_bytes()


def _linear_layers(model: Model) -> dict[str, dict[str, bool]]:
    """Weights of linear layers: for each the outputs of its layers, and whether it is stored as [inputs, outputs].

    A weight that anything else reads is left out, such as an embedding that is tied to the last layer.
    """
    weights = {t.name for t in model.architecture.tensors if len(t.shape) == 2}
    transposed: dict[str, str] = {}
    layers: dict[str, dict[str, bool]] = {}
    read_elsewhere: set[str] = set()
    for node in model.graph.nodes:
        if node.op == "Transpose" and node.inputs[0] in weights and node.attrs.get("perm") in (None, [1, 0]):
            transposed[node.outputs[0]] = node.inputs[0]
            continue
        straight = node.op == "MatMul" or (
            node.op == "Gemm" and not node.attrs.get("transA", 0) and node.attrs.get("alpha", 1.0) == 1.0
        )
        for i, value in enumerate(node.inputs):
            name = transposed.get(value, value)
            if name not in weights:
                continue
            # Only as the second factor of a product does a weight follow the equation above.
            if not straight or i != 1:
                read_elsewhere.add(name)
                continue
            # A weight that is transposed by a node and by `transB` is stored as it is used.
            flips = (value in transposed) + bool(node.attrs.get("transB", 0))
            layers.setdefault(name, {})[node.outputs[0]] = flips % 2 == 0
    return {n: uses for n, uses in layers.items() if n not in read_elsewhere and len(set(uses.values())) == 1}


def _matching_layers(layers: list[str], patterns: Sequence[str]) -> list[str]:
    if not layers:
        raise ModelError("lora", expected="a model with linear layers whose weights nothing else reads")
    if not patterns:
        # The last layer gives the logits; PEFT's "all-linear" leaves it out, too.
        return layers[:-1] or layers
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in layers):
            raise ModelError(
                f"lora: no weight of a linear layer is called {value_text(pattern)}",
                expected="a pattern that matches some of " + first_few(layers, max_names=8),
            )
    return [n for n in layers if any(fnmatchcase(n, p) for p in patterns)]


def _adapter_tensors(name: str, uses: Mapping[str, bool], shape: Sequence[int], lora: Lora) -> dict[str, Array]:
    """A weight's adapter: A with the variance of 1 / inputs, and B of zeros."""
    inputs, outputs = shape if next(iter(uses.values())) else tuple(reversed(shape))
    if lora.rank > min(inputs, outputs):
        raise ModelError(f"lora: the rank of {name}", expected=f"at most {min(inputs, outputs)}", got=lora.rank)
    # Seeded by the name, so that a layer starts from the same values whichever others have adapters.
    rng = np.random.default_rng([lora.seed, *name.encode()])
    first = rng.standard_normal((lora.rank, inputs), np.float32) / np.float32(math.sqrt(inputs))
    return {_adapter_name(name, _A): first, _adapter_name(name, _B): np.zeros((outputs, lora.rank), np.float32)}


def _adapter_name(weight: str, matrix: str) -> str:
    return f"{weight.removesuffix('.weight')}.{matrix}.weight"


def _emit_adapter(graph: Graph, node: Node, weight: str, scale: float) -> None:
    """Add an adapter to a layer's output. The layer's own output gets another name."""
    output, value = node.outputs[0], node.inputs[0]
    node.outputs[0] = graph.fresh(output)
    for matrix in (_A, _B):
        transposed = graph.emit("Transpose", _adapter_name(weight, matrix), attrs={"perm": [1, 0]})
        value = graph.emit("MatMul", value, transposed)
        if matrix == _A and scale != 1:
            value = graph.emit("Mul", value, graph.scalar(scale))
    graph.emit("Add", node.outputs[0], value, out=output)
