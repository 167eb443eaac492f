"""Inference graphs run by torch, as a `fedprune.runtime.session.Session` of them is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedprune.core.errors import ModelError
from fedprune.training import step_contract
from fedprune_export.eager.context import Context, Tensor
from fedprune_export.eager.program import Program
from fedprune_export.eager.stacks import Stacks
from fedprune_export.eager.widths import widths_of
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model

Array = npt.NDArray[Any]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]

_PROGRAMS = 64


class Predictions:
    """What submodels of one model predict.

    Args:
        model: The model.
        device: `cpu`, `cuda` or `cuda:1`.

    Raises:
        ModelError: The model has an operator that torch is not told about here.
    """

    def __init__(self, model: Model, device: str = "cpu") -> None:
        self._model = model
        self._device = torch.device(device)
        self._names = tuple(t.name for t in model.architecture.tensors)
        self._statistics = frozenset(t.name for t in model.architecture.statistics)
        self._stacks = Stacks(self._device)
        self._programs: dict[Shapes, Program] = {}

    @property
    def input(self) -> tuple[str, tuple[int | str | None, ...]]:
        """Type and shape of the samples, as onnxruntime says them."""
        port = self._model.graph.inputs[0]
        return ("tensor(int64)" if port.dtype == np.int64 else "tensor(float)"), port.shape

    def logits(self, tensors: Sequence[Mapping[str, Array]], x: Sequence[Array]) -> list[Array]:
        """Logits of every device's samples [n, K].

        Args:
            tensors: Weights of every device, all of equal widths.
            x: Its samples [n, ...].

        Raises:
            ModelError: Weights and samples don't fit the model, or torch fails on them.
        """
        program = self._program(tensors[0])
        run = Context(statistics=self._statistics)
        try:
            with torch.inference_mode():
                if len(x) == 1:
                    own = {n: self._stacks.single(tensors[0][n]) for n in self._names}
                    return [program(own, self._stacks.single(x[0]), run).cpu().numpy()]
                stacks = {n: self._stacks.stacked(n, [t[n] for t in tensors]) for n in self._names}
                samples = self._stacks.padded(x, max(map(len, x)))

                def one(own: dict[str, Tensor], mine: Tensor) -> Tensor:
                    return program(own, mine, run)

                found = torch.func.vmap(one)(stacks, samples).cpu().numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise ModelError(f"torch couldn't run the model ({str(error).strip().splitlines()[0][:300]})") from error
        return [np.array(rows[: len(mine)]) for rows, mine in zip(found, x, strict=True)]

    def shapes(self, tensors: Mapping[str, Array]) -> Shapes:
        """What devices must have in common to be worked out together.

        Raises:
            ModelError: A tensor is missing.
        """
        missing = [n for n in self._names if n not in tensors]
        if missing:
            raise ModelError("tensors are missing from the weights", got=", ".join(missing[:5]))
        return tuple((n, tuple(tensors[n].shape)) for n in self._names)

    def _program(self, tensors: Mapping[str, Array]) -> Program:
        key = self.shapes(tensors)
        if key not in self._programs:
            while len(self._programs) >= _PROGRAMS:
                del self._programs[next(iter(self._programs))]
            graph = at_widths(self._model, widths_of(self._model.architecture, dict(key)))
            self._programs[key] = Program(graph, self._names, self._device)
        return self._programs[key]


class Inference:
    """One submodel, used as a session of its inference graph is.

    Args:
        predictions: Runs it.
        tensors: Its weights and statistics.

    Attributes:
        inputs: Type and shape of the samples, as onnxruntime says them.
        outputs: The logits' name.
        metadata: Nothing.
        tensors: Its weights and statistics.
    """

    def __init__(self, predictions: Predictions, tensors: Mapping[str, Array]) -> None:
        self._predictions = predictions
        self.tensors = dict(tensors)
        self.inputs = {step_contract.X: predictions.input}
        self.outputs = (step_contract.LOGITS,)
        self.metadata: dict[str, str] = {}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The logits of some samples.

        Args:
            feeds: The samples, by the input's name.
            outputs: The logits' name, or None.

        Raises:
            ModelError: See `Predictions.logits`.
        """
        return {step_contract.LOGITS: self._predictions.logits([self.tensors], [feeds[step_contract.X]])[0]}
