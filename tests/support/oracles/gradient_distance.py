"""How far the gradients of a whole network are from torch's in float64, ours beside torch's own in float32.

The reference is a torch module where there is one, else the inference graph of a submodel, run by torch. Batch
normalisations take the batch's statistics; everything else is as in evaluation.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fedprune.model import step_contract
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.oracles.torch_graph import run

Arrays = dict[str, np.ndarray[Any, Any]]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The loss of a batch's outputs and labels, in torch."""

FLOOR = 2.0**-21  # a relative distance that counts as none: four steps of float32

FLIPS = 10  # times the least distance (or 1e-6), from which on a decision must have fallen to the other side

SPARE_FLIPS = 2  # so many more batches may flip than torch's do: which ones do is chance

CAP = 1e-2
"""No batch may be further off than this, unless torch's float32 is half as far off in one.

What a flip costs is less, but in deep networks of few channels, for either engine.
"""

TENSOR = 4
"""Times torch's distance, up to which a single tensor may be off: few numbers, in which luck doesn't average out."""

TANH_STEP = 2.0**-24
"""A step of float32 below 1, relative to 1: what a tanh may be off that is not rounded to the nearest number.

torch's is; onnxruntime's is off by one step (root mean square), at most 4.2. Its slope 1 - y² is then off by
2 y² / (1 - y²) steps, 150 where x is 2.9. In a cut to one channel a bias puts all numbers there, and on the same side.
"""

TENSOR_FLOOR = 1e-6  # a relative distance of a single tensor that counts as none: few terms, which may cancel in part

NOTHING = 1e-10
"""Up to this share of all gradients' size in float64, a tensor's gradient cancels to nothing.

What float32 gives for it is rounding alone, so that neither engine's is near: it's measured by all gradients' size, and
may be `TENSOR` times `TENSOR_FLOOR` of that.
"""


@dataclass
class Distances:
    """Relative L2 distances from float64, one per batch of samples.

    Attributes:
        ours: All gradients as one vector.
        torch: The same of torch's float32.
        ours_each: Each tensor by itself.
        torch_each: The same of torch's float32.
        step_each: What a step of all tanhs (`TANH_STEP`) makes each tensor; 0 without tanhs.
        sizes: Numbers of samples of the batches.
    """

    ours: list[float] = field(default_factory=list)
    torch: list[float] = field(default_factory=list)
    ours_each: dict[str, list[float]] = field(default_factory=dict)
    torch_each: dict[str, list[float]] = field(default_factory=dict)
    step_each: dict[str, list[float]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether every distance is a number."""
        each = (*self.ours_each.values(), *self.torch_each.values())
        return all(math.isfinite(d) for far in (self.ours, self.torch, *each) for d in far)

    def flipped_batches(self, far: list[float]) -> list[float]:
        """The batches of an engine in which a decision of a ReLU or maximum fell to the other side.

        They are off by a multiple of what is the least for either engine: a gradient that is wrong is so in each batch.
        """
        return [d for d in far if not self._stayed(d)]

    def calm(self, far: list[float]) -> float:
        """The median of an engine's other batches; of all, where there are none."""
        return self._median(far, far)

    @property
    def is_near(self) -> bool:
        """Whether ours is no further off than twice torch's: by medians of the batches in which nothing flipped.

        No batch may be far off, and each batch size must have a batch in which nothing flipped, unless torch has none
        there: what is wrong at one size is no flip.
        """
        if not self.is_finite:
            return False
        return (
            len(self.flipped_batches(self.ours)) - len(self.flipped_batches(self.torch)) <= SPARE_FLIPS
            and max(self.ours) <= max(CAP, 2 * max(self.torch))
            and self._calm_sizes(self.ours) >= self._calm_sizes(self.torch)
            and self.calm(self.ours) <= max(FLOOR, 2 * self.calm(self.torch))
        )

    def excess(self, tensor: str) -> float:
        """How many times as far off as torch's (or the floor, or what a step of its tanhs makes) our gradient of a
        tensor is.

        By medians of the batches in which nothing flipped; infinitely, where one isn't a number.
        """
        ours, torchs = self.ours_each[tensor], self.torch_each[tensor]
        if not all(map(math.isfinite, (*ours, *torchs))):
            return math.inf
        step = self._median(self.step_each[tensor], self.ours)
        return self._median(ours, self.ours) / max(TENSOR_FLOOR, self._median(torchs, self.torch), step)

    def _stayed(self, distance: float) -> bool:
        return distance <= FLIPS * max(1e-6, min(*self.ours, *self.torch))

    def _median(self, distances: list[float], far: list[float]) -> float:
        """The median of the distances at the batches in which nothing flipped."""
        return statistics.median([d for d, f in zip(distances, far, strict=True) if self._stayed(f)] or distances)

    def _calm_sizes(self, far: list[float]) -> set[int]:
        return {size for size, d in zip(self.sizes, far, strict=True) if self._stayed(d)}

    @property
    def worst_tensor(self) -> str:
        """The tensor whose gradient is off most beside torch's."""
        return max(self.ours_each, key=self.excess)


class Trained:
    """A model with its training step (gradients are added to its features), and the same loss in torch."""

    def __init__(
        self, model: Model, features: Features | None = None, loss: Loss = torch.nn.functional.cross_entropy
    ) -> None:
        self.model, self.loss = model, loss
        self.names = [t.name for t in model.architecture.trainable if t.name not in model.frozen]
        self.graph = training_graph(model, replace(features or Features(), gradients=True))
        self._session = OnnxSession(self.graph.to_bytes(), training=True)
        self._has_tanh = any(n.op == "Tanh" for n in model.graph.nodes)

    def gradients(self, tensors: Arrays, x: Any, y: Any) -> Arrays:
        """Our gradients of the loss at these tensors, of any width."""
        feeds: Arrays = {**tensors, step_contract.X: x, step_contract.Y: y}
        for name in self._session.inputs:
            if name not in feeds:  # momentum and learning rate, which gradients don't depend on
                owner = name.rpartition("::")[0]
                feeds[name] = np.zeros_like(tensors[owner]) if owner in tensors else np.array(0, np.float32)
        got = self._session.run(feeds, [*map(step_contract.gradient_name, self.names)])
        return {n: got[step_contract.gradient_name(n)] for n in self.names}

    def distances(self, net: torch.nn.Module | Graph, tensors: Arrays, samples: Iterable[tuple[Any, Any]]) -> Distances:
        """Distances from float64 over some batches of samples and labels."""
        distances = Distances()
        for x, y in samples:
            exact = torchs_gradients(net, tensors, self.names, x, y, torch.float64, self.loss)
            usual = torchs_gradients(net, tensors, self.names, x, y, torch.float32, self.loss)
            shifted = exact
            if self._has_tanh:
                with _ShiftedTanhs():
                    shifted = torchs_gradients(net, tensors, self.names, x, y, torch.float64, self.loss)
            self._add(distances, (self.gradients(tensors, x, y), usual, shifted), exact, len(x))
        return distances

    def _add(self, distances: Distances, results: tuple[Arrays, Arrays, Arrays], exact: Arrays, size: int) -> None:
        """One batch's distances, from our gradients, torch's, those of tanhs that are a step off, and exact ones."""
        distances.sizes.append(size)
        exact_norm = norm(exact.values())
        kinds = distances.ours_each, distances.torch_each, distances.step_each
        for result, far, each in zip(results, (distances.ours, distances.torch, []), kinds, strict=True):
            apart = {n: difference(result[n], exact[n]) for n in self.names}
            far.append(norm(apart.values()) / exact_norm)
            for n in self.names:
                length = norm([exact[n]])
                each.setdefault(n, []).append(
                    norm([apart[n]]) / (length if length > NOTHING * exact_norm else exact_norm)
                )


class _ShiftedTanh(torch.autograd.Function):
    """A tanh that is a step off, and its slope as any engine computes it: 1 - y²."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x) * (1 + TANH_STEP)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return dy[0] * (1 - y * y)


class _ShiftedTanhs(TorchFunctionMode):
    """Shifts all tanhs that torch computes in it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tanh, torch.Tensor.tanh):
            return _ShiftedTanh.apply(*args)
        return func(*args, **(kwargs or {}))


def torchs_gradients(
    net: torch.nn.Module | Graph,
    tensors: Arrays,
    names: Iterable[str],
    x: Any,
    y: Any,
    dtype: torch.dtype,
    loss: Loss = torch.nn.functional.cross_entropy,
) -> Arrays:
    """torch's gradients of the loss of a module, or of an inference graph."""
    state = {n: torch.tensor(v, dtype=dtype) for n, v in tensors.items()}
    leaves = {n: state[n].requires_grad_() for n in names}
    data, labels = (torch.tensor(a, dtype=dtype if a.dtype.kind == "f" else None) for a in (x, y))
    if isinstance(net, Graph):
        outputs = run(net, state, data, training=True)
    else:
        outputs = of_rows(only_norms_train(copy.deepcopy(net).to(dtype)), data, state)
    loss(outputs, labels).backward()
    return {n: np.zeros(tuple(w.shape)) if w.grad is None else w.grad.numpy() for n, w in leaves.items()}


def of_rows(net: torch.nn.Module, x: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """A module's outputs as an imported model gives them: several inputs are parts of a row, and so are outputs."""
    shapes: Any = net.input_shape
    if not isinstance(shapes, dict):
        outputs = torch.func.functional_call(net, state or {}, x)
    else:
        kinds: Any = getattr(net, "input_dtype", {})
        rows = x.split([math.prod(shapes[name]) for name in sorted(shapes)], 1)
        inputs = {n: values.reshape(-1, *shapes[n]) for n, values in zip(sorted(shapes), rows, strict=True)}
        inputs = {n: values.long() if kinds.get(n) == "int64" else values for n, values in inputs.items()}
        outputs = torch.func.functional_call(net, state or {}, (), inputs)
    outputs = tuple(outputs.values()) if isinstance(outputs, dict) else outputs
    return torch.cat([values.flatten(1) for values in outputs], 1) if isinstance(outputs, tuple) else outputs


def only_norms_train(module: torch.nn.Module) -> torch.nn.Module:
    """The module in evaluation mode, but batch normalisations take the batch's statistics."""
    module.eval()
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.train()
    return module


def difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64, of arrays of one shape."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return a.astype(np.float64) - b


def norm(arrays: Iterable[np.ndarray[Any, Any]]) -> float:
    """The length of arrays as one vector."""
    return float(np.sqrt(sum(float(np.sum(a.astype(np.float64) ** 2)) for a in arrays)))
