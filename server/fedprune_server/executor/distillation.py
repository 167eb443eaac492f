"""Self-distillation: all widths of the global model learn from their mean, on the server's unlabelled samples.

Where boards have several widths, few of them train the channels that only wide models have, so that the whole model
lags behind its submodels. The mean of all widths' outputs is better than most of them, and learning it takes no labels
and no bytes. Widths that learn from one another: Yu and Huang, "Universally slimmable networks and improved
training techniques", ICCV 2019; distillation on the server's samples: Lin et al., "FedDF", NeurIPS 2020.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DivergedError
from fedprune.model import step_contract
from fedprune.model.features import DISTILL_LOSS, labels_of
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.planning.costs import costs_at
from fedprune.strategies.values import SelfDistillation
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_step
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.evaluator import ModelSessions

log = logging.getLogger("fedprune.server")

Widths = tuple[int, ...]

# Narrower widths of boards that learn from one another; where a fleet has more, some of them do.
MAX_NARROW_WIDTHS = 4

_BATCH_SIZE = 128

# Large for Adam: a gradient that is nothing but rounding moves no weight.
_EPSILON = 1e-3


class Distiller:
    """Trains global models towards the mean of the outputs of all their widths, a random width in every step.

    It is the board's own trainer, with ordered dropout: teachers' outputs are the labels.

    Args:
        model: The model; its architecture and graph are used, not its weights.
        calibration: Measures the statistics of every width, and has the samples.
        recipe: The job's local training: what it freezes, and whether its loss takes classes.
    """

    def __init__(
        self, model: Model, calibration: Calibration, settings: SelfDistillation, recipe: Recipe, seed: int
    ) -> None:
        self._architecture, self._calibration, self._seed = model.architecture, calibration, seed
        classes = labels_of(recipe.loss) == "classes" and self._architecture.classes > 1
        self._recipe = Recipe(
            loss=DISTILL_LOSS if classes else "mse",
            distill_temperature=1.0,
            optimizer="adam",
            lr=settings.lr,
            epsilon=_EPSILON,
            batch_size=_BATCH_SIZE,
            epochs=settings.steps,
            max_steps=settings.steps,
            ordered_dropout=(1.0,),  # widths are each round's own
            frozen=recipe.frozen,
            trainable=recipe.trainable,
        )
        self._settings = settings
        self._trainer = Trainer(training_step(model, self._recipe.features).to_bytes())
        self._sessions = ModelSessions(model, 1 + MAX_NARROW_WIDTHS + len(settings.densities))

    def __call__(
        self, tensors: Tensors, ranks: Sequence[npt.ArrayLike], round_: int, trained: Iterable[Widths] = ()
    ) -> Tensors:
        """Train a round's new model. Returns it as it is if it diverges or has no narrower width; otherwise its
        statistics have to be measured again.

        Args:
            ranks: Per group its channels, best first.
            trained: The widths that boards trained in the round. Without any, the whole model's are the widest.
        """
        widest, densities = self._widths_of(set(trained))
        axes = self._trainer.axes
        plans = [widest] if axes is None else axes.step_widths(widest, densities)
        # A single width has no other to learn from.
        if len(plans) == 1:
            return tensors
        selection = Selection.of(self._architecture, widest, ranks)
        x, teacher_outputs = self._calibration.samples, self._teacher_outputs(tensors, selection, plans)
        if not np.isfinite(teacher_outputs).all():
            log.warning("round %d: no self-distillation, because outputs are not finite", round_)
            return tensors
        recipe = replace(self._recipe, ordered_dropout=densities)
        task = TrainingTask(recipe, self._architecture.classes, self._seed, "", round_, selection.widths)
        try:
            result = self._trainer.train(
                selection.gather(tensors), LocalData(x, teacher_outputs, x[:0], teacher_outputs[:0]), task
            )
        except DivergedError as error:
            log.warning("round %d: no self-distillation: %s", round_, error)
            return tensors
        macs_per_sample = sum(costs_at(self._architecture, p).training_macs for p in plans) / len(plans)
        log.info(
            "round %d: self-distillation took %.1f s, %d steps and about %.2g MACs; its loss went from %.3g to %.3g",
            round_, result.seconds, result.steps, self._settings.steps * min(_BATCH_SIZE, len(x)) * macs_per_sample,
            result.loss_first, result.loss_last,
        )  # fmt: skip
        return selection.scatter(result.tensors, tensors)

    def _widths_of(self, trained: set[Widths]) -> tuple[Widths, tuple[float, ...]]:
        """The widest width, and the narrower ones as shares of the whole model's. They are the whole model and the
        strategy's densities; or else those that boards trained, at most `MAX_NARROW_WIDTHS` and in 64ths."""
        sizes = self._architecture.sizes
        if self._settings.densities or not trained:
            return sizes, self._settings.densities
        ratios = (max(w / n for w, n in zip(widths, sizes, strict=True)) for widths in trained)
        shares = sorted({math.ceil(64 * ratio) / 64 for ratio in ratios})
        chosen_shares = {shares[i] for i in np.linspace(0, len(shares) - 1, MAX_NARROW_WIDTHS + 1).astype(int)}
        return tuple(map(max, zip(*trained, strict=True))), tuple(sorted(chosen_shares))

    def _teacher_outputs(
        self, tensors: Tensors, selection: Selection, plans: Sequence[Widths]
    ) -> npt.NDArray[np.float32]:
        """The mean of the outputs of all widths, each with its own statistics."""
        outputs = []
        for widths in plans:
            # Each width with statistics of its own: the whole model's fit no narrower one, and teachers would be worse
            # than need be.
            submodel = self._calibration(selection.with_widths(widths).gather(tensors))
            feeds = {step_contract.X: self._calibration.samples, **submodel}
            outputs.append(self._sessions.session_at(widths).run(feeds, [step_contract.LOGITS])[step_contract.LOGITS])
        return np.asarray(np.mean(outputs, axis=0), np.float32)
