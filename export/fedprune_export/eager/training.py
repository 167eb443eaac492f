"""A training step by the contract of `fedprune.training.step_contract`, computed by torch: of one device, or of many at
once.

It is used as a `fedprune.runtime.session.Session` of the training graph is, so that a board's trainer drives it as it
drives onnxruntime; what it computes is what the training graph says, with torch's own differentiation of the inference
graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedprune.core.errors import ModelError
from fedprune.training import step_contract
from fedprune.training.recipe import Recipe
from fedprune_export.eager.context import Context, Tensor
from fedprune_export.eager.losses import judge
from fedprune_export.eager.optimisers import updated, used
from fedprune_export.eager.program import Program
from fedprune_export.eager.stacks import Row, Stacks
from fedprune_export.eager.widths import widths_of
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model
from fedprune_export.pruning.scaler import scaled_outputs

Array = npt.NDArray[Any]
Feeds = Mapping[str, Any]

_TYPES = {"float32": "tensor(float)", "float64": "tensor(double)", "int64": "tensor(int64)"}
_PROGRAMS = 64
"""How many widths' graphs are kept."""


class TrainingStep:
    """A step of a model's training.

    Args:
        model: The model.
        graph: The training graph whose step it is: what goes in and out is read from it.
        recipe: A recipe that the graph was made for; it names loss and optimiser.
        device: `cpu`, `cuda` or `cuda:1`.

    Attributes:
        inputs: Type and shape of each input, as onnxruntime says them.
        outputs: Names of the outputs.
        metadata: The training graph's metadata.

    Raises:
        ModelError: The model has an operator that torch is not told about here.
    """

    def __init__(self, model: Model, graph: Graph, recipe: Recipe, device: str = "cpu") -> None:
        self._model = model
        self._device = torch.device(device)
        self._loss, self._optimizer = recipe.loss, recipe.optimizer
        self.inputs = {p.name: (_TYPES[p.dtype.name], p.shape) for p in graph.inputs}
        self.outputs = tuple(p.name for p in graph.outputs)
        self.metadata = dict(graph.metadata)
        self._asked = set(self.outputs)
        names = [t.name for t in model.architecture.tensors]
        self._names = tuple(names)
        self._trained = tuple(n for n in names if step_contract.buffer(n) in self.inputs)
        self._statistics = frozenset(t.name for t in model.architecture.statistics)
        self._moving = frozenset(n for n in self._statistics if step_contract.following(n) in self._asked)
        self._observable = {
            step_contract.LOSS,
            step_contract.HITS,
            step_contract.SAMPLE_LOSSES,
            *map(step_contract.following, self._moving),
        }
        self._kept = _momenta(model.graph)
        self._scaled = scaled_outputs(model) if step_contract.OUTPUT_SCALE in self.inputs else frozenset[str]()
        self._programs: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Program] = OrderedDict()
        self._stacks = Stacks(self._device)
        self._program(model.tensors)  # an operator that is missing is better known at once

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """One device's step.

        Args:
            feeds: Arrays by input name.
                outputs: Names of the wanted outputs; all by default. What the forward pass alone gives (loss, hits,
                statistics) needs no inputs of the optimiser, and statistics no labels.

        Raises:
            ModelError: Feeds don't fit the graph, or torch fails on them.
        """
        wanted = self.outputs if outputs is None else tuple(outputs)
        observed = self._check(feeds, wanted)
        values = {n: self._stacks.single(v) for n, v in feeds.items()}
        values[step_contract.X] = _last(values[step_contract.X])
        program = self._program(feeds)
        try:
            if observed:
                with torch.no_grad():
                    found = self._forward(program, {n: used(n, values) for n in self._trained}, values)[1]
            else:
                found = self._differentiated(program, values)
        except (RuntimeError, IndexError, ValueError) as error:
            raise _failed(error) from error
        return {n: found[n].detach().cpu().contiguous().numpy() for n in wanted}

    def run_many(
        self, feeds: Sequence[Feeds], outputs: Sequence[str] | None = None, *, resident: bool = False
    ) -> list[dict[str, Any]]:
        """The steps of many devices of equal widths at once; their batches may differ in size.

        Args:
            feeds: Arrays of every device, by input name.
            outputs: Names of the wanted outputs; all by default.
            resident: Whether arrays stay on the device, as `Row`s that can be fed again.

        Raises:
            ModelError: Feeds don't fit the graph or each other, or torch fails on them.
        """
        wanted = self.outputs if outputs is None else tuple(outputs)
        observed = False
        for each in feeds:
            observed = self._check(each, wanted)
        program = self._program(feeds[0])
        sizes = [len(each[step_contract.X]) for each in feeds]
        values = {
            n: self._stacks.stacked(n, [each[n] for each in feeds], constant=self._constant(n))
            for n in feeds[0]
            if n not in step_contract.OF_SAMPLES
        }
        for n in step_contract.OF_SAMPLES.intersection(feeds[0]):
            values[n] = self._stacks.padded([each[n] for each in feeds], max(sizes))
        if min(sizes) != max(sizes):
            there = [[1.0] * size + [0.0] * (max(sizes) - size) for size in sizes]
            values[_PRESENT] = torch.tensor(there, device=self._device)

        def one(each: dict[str, Tensor]) -> dict[str, Tensor]:
            if observed:
                found = self._forward(program, {n: used(n, each) for n in self._trained}, each)[1]
            else:
                found = self._functional(program, each)
            return {n: found[n] for n in wanted}

        try:
            with torch.no_grad():
                found = torch.func.vmap(one, randomness="error")(values)
        except (RuntimeError, IndexError, ValueError) as error:
            raise _failed(error) from error
        out: list[dict[str, Any]] = [{} for _ in feeds]
        for name, stack in found.items():
            rows = Row.of(stack.detach()) if resident and stack.ndim > 1 else list(stack.detach().cpu().numpy())
            for mine, row in zip(out, rows, strict=True):
                mine[name] = row if isinstance(row, Row) else np.array(row)  # an array of its own, to be written to
        return out

    def _constant(self, name: str) -> bool:
        """Whether a round feeds the same array in every step."""
        kind = name.partition("::")[2]
        named = name in self._names or name in step_contract.OF_STEPS
        return kind in ("anchor", "mu", "mask", "threshold") or (not kind and not named)

    def _differentiated(self, program: Program, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """One device's step with gradients by torch.autograd."""
        with torch.no_grad():
            leaves = {n: _last(used(n, feeds)).detach().requires_grad_() for n in self._trained}
        loss, found = self._forward(program, leaves, feeds)
        parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        with torch.no_grad():
            gradients = {n: torch.zeros_like(feeds[n]) if g is None else g for n, g in zip(leaves, parts, strict=True)}
            found |= updated(self._trained, gradients, feeds, self._asked, self._optimizer)
        return found

    def _functional(self, program: Program, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same as a function that torch.func maps over devices."""
        leaves = {n: used(n, feeds) for n in self._trained}
        found: dict[str, Tensor]
        gradients, found = torch.func.grad(lambda w: self._forward(program, w, feeds), has_aux=True)(leaves)
        return found | updated(self._trained, gradients, feeds, self._asked, self._optimizer)

    def _forward(
        self, program: Program, leaves: Mapping[str, Tensor], feeds: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and everything that is known of a step but for what its gradients say."""
        tensors = {n: leaves[n] if n in leaves else feeds[n] for n in self._names}
        present = feeds.get(_PRESENT)
        run = Context(training=True, statistics=self._statistics, moving=self._moving, present=present)
        logits = program(tensors, feeds[step_contract.X], run, feeds.get(step_contract.OUTPUT_SCALE))
        found: dict[str, Tensor] = {}
        loss = logits
        if step_contract.Y in feeds:
            judged = judge(self._loss, logits, feeds[step_contract.Y], feeds, present)
            loss = (judged.rows / judged.divisor).sum()
            found[step_contract.LOSS] = loss.detach()
            if judged.hits is not None:
                found[step_contract.HITS] = judged.hits
            found[step_contract.SAMPLE_LOSSES] = judged.rows.detach()
        for name, value in run.measured.items():
            keep = self._kept[name]
            found[step_contract.following(name)] = feeds[name] * keep + value.detach() * (1 - keep)
        return loss, found

    def _program(self, feeds: Feeds) -> Program:
        """The graph at the widths that tensors have."""
        shapes = {n: tuple(feeds[n].shape) for n in self._names}
        key = tuple(shapes.items())
        if key not in self._programs:
            graph = at_widths(self._model, widths_of(self._model.architecture, shapes))
            self._programs[key] = Program(graph, self._names, self._device, scaled=self._scaled)
            while len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _check(self, feeds: Feeds, wanted: Collection[str]) -> bool:
        """Make sure that what is wanted can be had; whether the forward pass alone gives it."""
        observed = self._observable.issuperset(wanted)
        needed = {step_contract.X, *self._names} if observed else set(self.inputs)
        if set(feeds) - set(self.inputs) or needed - set(feeds) or set(wanted) - set(self.outputs):
            raise ModelError(
                "a training step can't be run",
                expected=sorted(needed - set(feeds))[:5] or "no other inputs and outputs",
                got=sorted((set(feeds) - set(self.inputs)) | (set(wanted) - set(self.outputs)))[:5] or "none of these",
            )
        return observed


_PRESENT = "::present"
"""Beside the inputs: which rows of a batch are samples, and which are padding."""


def _momenta(graph: Graph) -> dict[str, float]:
    """Per statistic, the share of the old one that a step keeps."""
    nodes = [n for n in graph.nodes if n.op == "BatchNormalization"]
    return {name: float(n.attrs.get("momentum", 0.9)) for n in nodes for name in n.inputs[3:5]}


def _last(value: Tensor) -> Tensor:
    """Maps and kernels with their channels last, as convolutions on a CPU are fastest; another tensor as it is."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 and not value.is_cuda else value


def _failed(error: Exception) -> ModelError:
    return ModelError(f"torch couldn't run the training step ({str(error).strip().splitlines()[0][:300]})")
