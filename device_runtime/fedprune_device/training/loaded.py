"""The training graph that is loaded, and how models are opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedprune_device.serving.predictor import Predictor
from fedprune_device.training.trainer import Trainer


class TrainerCache:
    """The training graph that was used last: another bench's round usually needs it again.

    Args:
        threads: Threads inside an operator.
        keep: Whether it stays loaded after training. A board lets it go: its memory is needed for the new model, and
            loading it again takes less than a step or two.
        cuda: Whether to compute on an NVIDIA GPU, if that works.
    """

    def __init__(self, threads: int = 1, *, keep: bool = False, cuda: bool = False) -> None:
        self.threads = threads
        self._cuda = cuda
        self._keep = keep
        self._loaded: tuple[str, Trainer] | None = None

    def of(self, sha256: str, read: Callable[[], bytes], blocked: Callable[[], bytes] | None = None) -> Trainer:
        """A trainer for a graph.

        Args:
            sha256: The graph.
            read: Gives its bytes, if they are needed.
            blocked: Gives those of a graph for whole batches on this processor, if there is one. It is read anew for
                every round, since it serves one round's widths alone.

        Raises:
            ModelError: onnxruntime doesn't accept the graph.
            TrainingError: It is not a training graph.
        """
        if self._loaded is None or self._loaded[0] != sha256 or blocked is not None:
            self._loaded = None  # two loaded models are more than a small board has memory for
            whole = None if blocked is None else blocked()
            self._loaded = (sha256, Trainer(read(), blocked=whole, threads=self.threads, cuda=self._cuda))
        return self._loaded[1]

    def predictor(self, model: Path) -> Predictor:
        """A staged model, opened.

        Args:
            model: Its folder.

        Raises:
            ModelError: onnxruntime doesn't accept it.
        """
        return Predictor(model, threads=self.threads, cuda=self._cuda)

    def release(self) -> None:
        """Training is over."""
        if not self._keep:
            self._loaded = None
