"""The predicted cost of a submodel's round on a board."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.planning.costs import MemoryBreakdown


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of a submodel's round on a board.

    Attributes:
        forward_macs: MACs of one sample's forward pass; `training_macs` those of its training step.
        wire_bytes: Size of its weights file.
        first_bytes: The most bytes of weights that are sent whole, to a board that has no earlier weights to which a
            difference could be sent.
        down_bytes: The most bytes of weights that are sent in every other round.
        up_bytes: The most bytes of its update.
        memory_bytes: Peak memory of the training process, local data included; `memory` is the same by what takes it.
        inference_bytes: Peak memory of a process that predicts one sample at a time.
        storage_bytes: What the board's disk must hold.
        step_s: Mean time of a full training step over the widths at which the recipe trains.
        train_s: Time of all steps of a round.
        evaluate_s: Time of measuring the received model, the trained one and the board's average on its test samples.
        transfer_s: Time on the link, down and up, of a round that sends all that any round sends.
        latency_s: Time of the prediction of one sample.
        step_j: Energy of a step beyond what the idle board takes, in joules; None where the profile doesn't say.
            `train_j` is that of all steps of a round, `latency_j` that of the prediction of one sample.
    """

    parameters: int
    forward_macs: int
    training_macs: int
    wire_bytes: int
    memory_bytes: int
    memory: MemoryBreakdown
    inference_bytes: int
    storage_bytes: int
    step_s: float
    steps: int
    train_s: float
    transfer_s: float
    latency_s: float
    step_j: float | None = None
    train_j: float | None = None
    latency_j: float | None = None
    evaluate_s: float = 0.0
    first_bytes: int = 0
    down_bytes: int = 0
    up_bytes: int = 0

    @property
    def computing_s(self) -> float:
        """Time between a round's two transfers. Simulated boards take it, too, so that plans and simulations have the
        same parts."""
        return self.train_s + self.evaluate_s

    @property
    def round_s(self) -> float:
        """Time of the longest round: one that sends whole weights and graphs."""
        return self.computing_s + self.transfer_s

    @property
    def round_bytes(self) -> int:
        """The most bytes of a round, down plus up; graphs, which are sent once, are not counted."""
        return max(self.first_bytes, self.down_bytes) + self.up_bytes
