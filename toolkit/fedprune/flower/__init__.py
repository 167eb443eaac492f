"""fedprune's strategies for users of Flower: a strategy for a ServerApp, a part for a ClientApp.

Not here: anything that another room needs. No other room imports Flower or this package.
"""

from fedprune.core.errors import MissingExtraError

try:
    import flwr.serverapp.strategy  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "fedprune.flower needs Flower, which is not installed here or is older than 1.41", extra="flower"
    ) from error

from fedprune.flower.client import NodePart, answer
from fedprune.flower.presets import PRESETS
from fedprune.flower.strategy import FedpruneStrategy

__all__ = ["PRESETS", "FedpruneStrategy", "NodePart", "answer"]
