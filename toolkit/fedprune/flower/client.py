"""A node's part in a round: what it was sent, and the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedprune.core.errors import ConfigError, FedpruneError, ProtocolError
from fedprune.core.tensorfile import float32_array
from fedprune.flower.messages import FORMAT, RECORD_NAME, STEPS_METRIC, check_format
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors


@dataclass(frozen=True, eq=False)
class NodePart:
    """The input of a node, for training or evaluation.

    Attributes:
        tensors: The submodel's weights and statistics, by their names in the whole model.
        widths: Channels per group that it has.
        device: What the server calls the node; with seed and round it keys the order of samples in
            `fedprune_device.training.trainer.Trainer`.
        classes: Entries of the model's output; 0 where it is no row of logits.
        recipe: How the strategy would have it train. A training graph obeys it; a loop of one's own takes from it what
            it can.
        graph: The training graph for that recipe, as `fedprune_device.training.trainer.Trainer` takes it; empty where
            the server sends none.
        config: What else the server said: Flower's own configuration of the round.
    """

    tensors: Tensors
    widths: tuple[int, ...]
    density: float
    round: int
    device: str
    seed: int
    classes: int
    recipe: Recipe
    graph: bytes
    config: dict[str, Any]
    message: Message

    @classmethod
    def of(cls, message: Message) -> NodePart:
        """The part that a message of `FedpruneStrategy` describes. Raises `ProtocolError` if it is no such message."""
        content = message.content
        record = content.get(RECORD_NAME)
        check_format(record)
        try:
            # Names of records are settings of the server's strategy, so that they travel in the message.
            arrays = content[str(record["arrays"])]
            names = [str(n) for n in record["tensors"]]
            config = dict(content[str(record["config"])])
            tensors = {n: float32_array(arrays[n].data, arrays[n].shape, f"tensor {n}") for n in names}
            return cls(
                tensors=tensors,
                widths=tuple(int(w) for w in record["widths"]),
                density=float(record["density"]),
                round=int(record["round"]),
                device=str(record["device"]),
                seed=int(record["seed"]),
                classes=int(record["classes"]),
                recipe=Recipe.from_dict(json.loads(str(record["recipe"]))),
                graph=bytes(record.get("graph", b"")),
                config=config,
                message=message,
            )
        except FedpruneError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"record {RECORD_NAME!r} of a message is damaged ({type(error).__name__}: {error})"
            ) from error

    def reply(self, tensors: Mapping[str, Any], *, samples: int, steps: int = 1, **metrics: float) -> Message:
        """The answer to a message that asked for training.

        Raises `ConfigError` if a tensor is missing or has another shape than was sent.

        Args:
            tensors: What was made of the submodel: arrays or torch tensors by name, such as a module's `state_dict()`.
                What the submodel doesn't have (counters of batch norms) stays behind.
            metrics: Further numbers, which Flower averages by samples.
        """
        arrays = {}
        for name, sent in self.tensors.items():
            if name not in tensors:
                raise ConfigError(f"the reply lacks tensor {name}", expected=f"float32 {sent.shape}")
            # An array, or the values of a torch tensor on any device.
            value = tensors[name]
            if hasattr(value, "detach"):
                value = value.detach().cpu().numpy()
            array = np.ascontiguousarray(value, dtype=np.float32)
            if array.shape != sent.shape:
                raise ConfigError(f"shape of {name} in the reply", expected=sent.shape, got=array.shape)
            arrays[name] = Array(array)
        key = str(self.message.content[RECORD_NAME]["arrays"])
        return self._reply({key: ArrayRecord(arrays)}, samples, {STEPS_METRIC: int(steps), **metrics})

    def reply_to_evaluation(self, *, samples: int, **metrics: float) -> Message:
        """The answer to a message that asked for evaluation."""
        return self._reply({}, samples, metrics)

    def _reply(self, records: dict[str, Any], samples: int, metrics: Mapping[str, float]) -> Message:
        # Flower averages metrics by the record that the server's strategy names.
        weight = str(self.message.content[RECORD_NAME]["weight"])
        metric_record = MetricRecord(
            {weight: int(samples), **{k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}}
        )
        return Message(RecordDict({**records, "metrics": metric_record}), reply_to=self.message)


def answer(
    message: Message, *, density: float | None = None, profile: str | None = None, samples: int | None = None
) -> Message:
    """The answer to the question what a node carries.

    Raises `ConfigError` if neither or both of density and profile are given.

    Args:
        density: The share of the model's channels that it can train.
        profile: Or the name of the board that it is, for which the server plans widths, by the training `samples`.
    """
    if (density is None) == (profile is None):
        raise ConfigError("what a node carries", expected="a density or a profile", got=(density, profile))
    body = {"format": FORMAT, "density": density, "profile": profile, "samples": samples}
    record = ConfigRecord({k: v for k, v in body.items() if v is not None})
    return Message(RecordDict({RECORD_NAME: record}), reply_to=message)
