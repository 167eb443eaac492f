"""A loaded training graph: its inputs, its outputs, and the run of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import ModelError, TrainingError
from fedprune.model import step_contract
from fedprune.model.features import CUSTOM_LOSS, Features
from fedprune.model.input_type import InputType
from fedprune.model.lengths import with_lengths
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.random_inputs import RandomInputs
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, ElementMask
from fedprune.model.step_feeds import divisor_share, term_feeds
from fedprune.runtime.onnx_subgraph import Subgraphs
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.batches import MicroBatch
from fedprune_device.data.labels import Targets, loss_terms
from fedprune_device.data.stored_array import Inputs
from fedprune_device.training.augmentation import SampleAugmentation
from fedprune_device.training.objective import Objective

Array = npt.NDArray[Any]

# onnxruntime's names of the types in which a frozen base is stored.
_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}


class StepResult(NamedTuple):
    """A step's result: the batch's data loss, its number of right samples, new values and requested gradients."""

    loss: float
    hits: int
    values: dict[str, Array]
    gradients: list[Array]


class StepGraph:
    """A training graph written to the contract of `fedprune.model.step_contract`.

    With one thread the same inputs give the same bits. `session` replaces that of onnxruntime; `cuda` lets that compute
    on an NVIDIA GPU. `subgraphs` are those of this graph that were cut before. With `keeps_arrays` the next training
    writes into the arrays of the last one, and into its result: they are neither allocated nor bound again.

    `trainable` tensors are moved by the optimiser, `statistics` measured by a step, `frozen` ones stay.
    `optimizer_states` are the optimiser's arrays, `updated_names` all that have a next value. `random_inputs`: the
    masks and noise that it takes. `counts_hits`: whether it counts right samples. `input_type`: the type of samples.
    `base` is the file of frozen weights that the graph reads in low precision. Raises `ModelError` if onnxruntime
    refuses the graph, `TrainingError` if it is not a training graph.
    """

    def __init__(
        self,
        graph: Path | bytes,
        *,
        threads: int = 1,
        session: OnnxSession | None = None,
        cuda: bool = False,
        base: Path | None = None,
        subgraphs: Subgraphs | None = None,
        keeps_arrays: bool = False,
    ) -> None:
        self._graph = graph
        self._keeps_arrays = keeps_arrays
        self._arrays: dict[tuple[str, str], Array] = {}
        self._threads = threads
        self._cuda = cuda
        self._given = session
        self._subgraphs = subgraphs or Subgraphs()
        self._session = session or OnnxSession(graph, threads=threads, training=True, cuda=cuda)
        self._forward: dict[tuple[str, ...], OnnxSession] = {}
        self._objective: tuple[Recipe, int, Objective] | None = None
        inputs, outputs = self._session.inputs, set(self._session.outputs)
        # The graph doesn't name its optimiser: of the three, Adam alone reads epsilon, and SGD alone no beta.
        optimizer = "adam" if step_contract.EPSILON in inputs else "lion" if step_contract.BETA1 in inputs else "sgd"
        required = {step_contract.X, step_contract.Y}
        numbers = step_contract.OPTIMIZER_NUMBERS.items()
        features = Features(optimizer=optimizer, decay=step_contract.WEIGHT_DECAY in inputs)
        required.update(name for name, number in numbers if number.is_read(features))
        missing = sorted(required - {*inputs}) + sorted({step_contract.LOSS} - outputs)
        if missing:
            raise TrainingError("this is not a training graph", got=f"no {', '.join(missing)}")
        self._classifies = inputs[step_contract.Y][0] == "tensor(int64)"
        self.counts_hits = step_contract.HITS in outputs
        self._result_names = (step_contract.LOSS, step_contract.HITS) if self.counts_hits else (step_contract.LOSS,)
        self.names = tuple(n for n in inputs if n not in step_contract.RESERVED_NAMES and "::" not in n)
        self.trainable = tuple(n for n in self.names if step_contract.momentum_name(n) in inputs)
        updated = (n for n in self.names if step_contract.next_name(n) in outputs)
        self.statistics = tuple(n for n in updated if n not in self.trainable)
        self.frozen = tuple(n for n in self.names if n not in {*self.trainable, *self.statistics})
        self.input_shape = with_lengths(inputs[step_contract.X][1][1:], self._session.metadata, TrainingError)
        self._target_shape = inputs[step_contract.Y][1][1:]
        self.input_type = InputType.of(inputs[step_contract.X][0])
        self.optimizer_states = [f(n) for n in self.trainable for f in step_contract.state_names(optimizer)]
        self._sums = [name for n in self.trainable if (name := step_contract.gradient_sum_name(n)) in inputs]
        gradients = [step_contract.gradient_name(n) for n in self.trainable]
        self.gradients = gradients if outputs.issuperset(gradients) else []
        self._base_path, self._base = base, dict[str, Array]()
        base_endings = step_contract.base_name(""), step_contract.base_scale_name("")
        self._base_names = {n for n in inputs if n.endswith(base_endings)}
        if self._base_names and base is None:
            raise TrainingError("the training graph reads a frozen base", expected="a file of it", got="none")
        self.random_inputs = RandomInputs.of(inputs, self._session.metadata)
        self.updated_names = [*self.trainable, *self.statistics, *self.optimizer_states]
        ignored = self._session.metadata.get(step_contract.IGNORED_METADATA)
        self._ignored = None if ignored is None else int(ignored)
        self._check_complete()

    def _check_complete(self) -> None:
        """Refuse a training graph with an input that nothing here feeds, or without an output that a step needs."""
        inputs, outputs = set(self._session.inputs), set(self._session.outputs)
        contract = step_contract
        of_tensors = [contract.anchor_name, contract.strength_name, contract.mask_name, contract.threshold_name]
        of_tensors += [contract.drift_name]
        fed = {*contract.INPUTS, *self.names, *self.optimizer_states, *self._sums, *self._base_names}
        fed |= {*self.random_inputs.draws, *(input_of(n) for n in self.trainable for input_of in of_tensors)}
        if inputs - fed:
            raise TrainingError(
                "the training graph has inputs that this device can't feed",
                got=", ".join(sorted(inputs - fed)[:5]),
                hint="Update fedprune on the device.",
            )
        missing_outputs = {step_contract.next_name(n) for n in (*self.updated_names, *self._sums)} - outputs
        if missing_outputs:
            raise TrainingError("the training graph lacks outputs", got=", ".join(sorted(missing_outputs)[:5]))

    def check(self, tensors: Mapping[str, Array]) -> None:
        """Check weights against the graph's inputs; raises `TrainingError`."""
        for name in self.names:
            if name not in tensors:
                raise TrainingError(f"tensor {name} is missing from the weights")
        for name in tensors:
            if name not in self.names:
                raise TrainingError(f"the training graph has no tensor {name}")
        sizes: dict[str, int] = {}
        for name, value in tensors.items():
            shape = self._session.inputs[name][1]
            if value.dtype != np.float32:
                raise TrainingError(f"type of {name}", expected="float32", got=value.dtype)
            if len(shape) != value.ndim:
                raise TrainingError(f"shape of {name}", expected=shape, got=value.shape)
            for dimension, size in zip(shape, value.shape, strict=True):
                # A free dimension has a name; the same name must mean the same width everywhere.
                expected = sizes.setdefault(dimension, size) if isinstance(dimension, str) and dimension else dimension
                if isinstance(expected, int) and expected != size:
                    raise TrainingError(f"shape of {name}", expected=f"{expected} ({dimension})", got=value.shape)

    @cached_property
    def axes(self) -> TensorAxes | None:
        """The channel groups of the tensors' axes; None if the graph doesn't give them."""
        text = self._session.metadata.get(step_contract.AXES_METADATA)
        return None if text is None else TensorAxes.from_json(text)

    @property
    def accumulates(self) -> bool:
        """Whether a batch can be split into parts."""
        return bool(self._sums)

    def constant_inputs(
        self, tensors: Mapping[str, Array], y: Inputs, recipe: Recipe, classes: int, mask: ElementMask = ALL_ACTIVE
    ) -> dict[str, Array]:
        """The inputs that are the same in every step; `y` are all training labels, converted by `targets`. Raises
        `TrainingError` if the graph was made for another kind of recipe, `DataError` if a label is out of range."""
        feeds = loss_terms(y, recipe, classes) | term_feeds(recipe, tensors, self.trainable)
        feeds |= self.mask_inputs(tensors, recipe, mask)
        step_inputs = {*step_contract.SAMPLE_INPUTS, step_contract.STEP_NUMBER, step_contract.DIVISOR}
        required = set(self._session.inputs) - step_inputs - {*self.names, *self.optimizer_states, *self._sums}
        required -= {*self._base_names, *self.random_inputs.draws}
        classifies = self._classifies if recipe.loss == CUSTOM_LOSS else recipe.features.has_class_labels
        scores = recipe.features.counts_hits
        cannot_accumulate = not self._sums and recipe.features.accumulate
        cannot_report_gradients = not self.gradients and recipe.report_squares
        if (
            required != set(feeds)
            or classifies != self._classifies
            or scores != self.counts_hits
            or cannot_accumulate
            or cannot_report_gradients
        ):
            raise TrainingError(
                "training graph and recipe don't fit each other",
                expected=", ".join(sorted(required - set(feeds))[:5]) or "no further inputs",
                got=", ".join(sorted(set(feeds) - required)[:5]) or f"no value for them (loss {recipe.loss})",
            )
        return feeds

    def targets(self, recipe: Recipe, classes: int) -> Targets:
        """The labels that the graph takes. Raises `TrainingError` if the recipe's loss takes others."""
        if recipe.loss != CUSTOM_LOSS and recipe.features.has_class_labels != self._classifies:
            raise TrainingError(
                "training graph and recipe don't fit each other",
                expected="whole numbers as labels" if self._classifies else "numbers as labels",
                got=f"loss {recipe.loss}",
            )
        return Targets.of(recipe, classes, self._target_shape, whole_numbers=self._classifies)

    def augmentation(self, recipe: Recipe) -> SampleAugmentation | None:
        """The augmentation of samples, if the recipe asks for it. Raises `TrainingError` if the graph lacks it."""
        return SampleAugmentation(self._session.metadata) if recipe.augment else None

    def objective(self, recipe: Recipe, classes: int) -> Objective:
        """The part of the graph after the model's outputs. The last one is kept, because loading takes some hundredths
        of a second."""
        if self._objective is None or self._objective[:2] != (recipe, classes):
            self._objective = (
                recipe,
                classes,
                Objective(self._graph_bytes(), recipe, classes, scores=self.counts_hits, subgraphs=self._subgraphs),
            )
        return self._objective[2]

    def divisor(self, y: Array, feeds: Mapping[str, Array]) -> float:
        """A batch part's share of the loss's divisor."""
        if not self.counts_hits:
            return float(len(y))
        return divisor_share(y, self._ignored, feeds.get(step_contract.CLASS_WEIGHT))

    def mask_inputs(self, tensors: Mapping[str, Array], recipe: Recipe, mask: ElementMask) -> dict[str, Array]:
        """Masks, thresholds and the scaler; those that the graph has and the recipe doesn't ask for change nothing."""
        feeds: dict[str, Array] = {}
        if recipe.features.scale or step_contract.OUTPUT_SCALE in self._session.inputs:
            feeds[step_contract.OUTPUT_SCALE] = np.array(recipe.scale, np.float32)
        for name in self.trainable:
            if recipe.features.element_mask or step_contract.mask_name(name) in self._session.inputs:
                active = mask.get(name)
                feeds[step_contract.mask_name(name)] = (
                    np.ones_like(tensors[name]) if active is None else active.astype(np.float32)
                )
            if recipe.features.threshold or step_contract.threshold_name(name) in self._session.inputs:
                threshold = recipe.mask_threshold if name in mask else 0.0
                feeds[step_contract.threshold_name(name)] = np.array(threshold, np.float32)
        return feeds

    def run_step(
        self,
        feeds: Mapping[str, Array],
        micro_batches: Sequence[MicroBatch],
        number: int,
        gradients: Sequence[str] = (),
        into: Mapping[str, Array] | None = None,
        draw_key: tuple[Any, ...] | None = None,
    ) -> StepResult:
        """Optimiser step `number`, from 1, on a batch in parts; `gradients` are further outputs.

        Args:
            into: Arrays that the next values of all of `updated_names` are written into; none of them may be a feed.
            draw_key: Seed and key of random inputs; None to draw nothing.
        """
        feeds = dict(feeds)
        if step_contract.STEP_NUMBER in self._session.inputs:
            feeds[step_contract.STEP_NUMBER] = np.array(number, np.int64)
        if step_contract.DIVISOR in self._session.inputs:
            divisor = sum(self.divisor(p.y, feeds) for p in micro_batches) or 1.0
            feeds[step_contract.DIVISOR] = np.array(divisor, np.float32)
        feeds |= {n: np.zeros(feeds[n.partition("::")[0]].shape, np.float32) for n in self._sums}
        loss, hits = 0.0, 0
        values: dict[str, Array] = {}
        gradient_arrays: list[Array] = []
        for count, micro_batch in enumerate(micro_batches, 1):
            is_last = count == len(micro_batches)
            names = self.updated_names if is_last else [*self.statistics, *self._sums]
            gradient_names = list(gradients) if is_last else []
            labels = {step_contract.Y: micro_batch.y}
            if draw_key is None:
                labels |= self.random_inputs.means(feeds, len(micro_batch.y))
            else:
                labels |= self.random_inputs.draw(feeds, len(micro_batch.y), *draw_key, count)
            if step_contract.Y_PARTNER in self._session.inputs:
                labels[step_contract.Y_PARTNER] = micro_batch.y if micro_batch.partner is None else micro_batch.partner
            labels[step_contract.X] = self.input_type.convert(micro_batch.x)
            output_names = [*self._result_names, *map(step_contract.next_name, names), *gradient_names]
            next_arrays = {step_contract.next_name(n): into[n] for n in names} if is_last and into else {}
            try:
                outputs = self._session.run({**feeds, **labels, **self._mapped_base()}, output_names, next_arrays)
            except ModelError as error:
                raise TrainingError(f"the training graph failed: {error}") from error
            loss += float(outputs[step_contract.LOSS])
            hits += int(outputs[step_contract.HITS]) if step_contract.HITS in outputs else 0
            values, gradient_arrays = (
                {n: outputs[step_contract.next_name(n)] for n in names},
                [outputs[n] for n in gradient_names],
            )
            if not is_last:
                # onnxruntime's outputs are stored among the activations in its arena: if they stayed, the next part's
                # activations would have to fit around them, and the arena would grow.
                feeds |= {n: np.array(value) for n, value in values.items()}
                del outputs
                values.clear()
        return StepResult(loss, hits, values, gradient_arrays)

    def empty_array(self, role: str, name: str, shape: tuple[int, ...]) -> Array:
        """A float32 array for a training to write into. If arrays are kept, it is that of the last training."""
        array = self._arrays.get((role, name))
        if array is None or array.shape != shape:
            array = np.empty(shape, np.float32)
            if self._keeps_arrays:
                self._arrays[role, name] = array
        return array

    def place(self, arrays: Mapping[str, Array], role: str) -> dict[str, Any]:
        """Arrays where steps are computed; see `OnnxSession.place`."""
        return self._session.place(arrays, role)

    def run_forward(self, feeds: dict[str, Array], outputs: Sequence[str]) -> Mapping[str, Array]:
        """Run what of the graph some outputs need, without drawing anything; feeds that aren't needed are left out."""
        session = self._given or self._forward.get(tuple(outputs))
        try:
            if session is None:
                subgraph = self._subgraphs.subgraph_for(self._graph_bytes, outputs)
                session = OnnxSession(subgraph, threads=self._threads, training=True, cuda=self._cuda)
                self._forward[tuple(outputs)] = session
            x = self.input_type.convert(feeds[step_contract.X])
            inputs = {**feeds, step_contract.X: x, **self._mapped_base(), **self.random_inputs.means(feeds, len(x))}
            return session.run({n: v for n, v in inputs.items() if n in session.inputs}, outputs)
        except ModelError as error:
            raise TrainingError(f"the training graph failed: {error}") from error

    def leave_gpu(self, error: Exception) -> None:
        """Compute on the processor from now on, because of an error."""
        self.release()
        for session in (self._session, *self._forward.values()):
            session.leave_gpu(error)

    def release(self) -> None:
        """Forget the arrays of a training, unless they are kept, and unmap the frozen base, whose pages count as the
        process's memory; the next run maps it again."""
        if not self._keeps_arrays:
            self._session.release()
        self._base = {}

    def _mapped_base(self) -> dict[str, Array]:
        """The frozen base, mapped and not read: it is never copied, and the system may drop its pages."""
        if self._base_names and not self._base and self._base_path is not None:
            base = tensorfile.map_tensors(self._base_path)
            for name in self._base_names:
                kind, shape = self._session.inputs[name]
                value = base.get(name)
                if value is None or value.shape != shape or _TYPES.get(value.dtype.name) != kind:
                    raise TrainingError(
                        f"{self._base_path}: {name} of the frozen base",
                        expected=f"{kind} {shape}",
                        got="nothing" if value is None else f"{value.dtype} {value.shape}",
                    )
            self._base = self._session.place({n: base[n] for n in self._base_names}, "base")
        return self._base

    def _graph_bytes(self) -> bytes:
        return self._graph if isinstance(self._graph, bytes) else self._graph.read_bytes()
