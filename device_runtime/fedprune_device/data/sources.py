"""Opens the source of a board's samples that its options name: files, a table, a class or the sample store."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.disk import path_exists
from fedprune_device.data.array_source import open_arrays
from fedprune_device.data.audio_decoding import Audio
from fedprune_device.data.colours import WHITE, Colour
from fedprune_device.data.dataset import SampleSource
from fedprune_device.data.image_decoding import Pixels
from fedprune_device.data.other_files import WAY_OUT
from fedprune_device.data.reservoir import SampleLimits
from fedprune_device.data.sample_folder import SampleFolder
from fedprune_device.data.sample_store import SampleStore
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.table_options import TableOptions
from fedprune_device.data.table_windows import TableFile, is_table

LOCAL = "local"  # name of the source that applications on the board fill

_MAX_STORE_BYTES = 2**40

_FILE_ENDINGS = (*Pixels.endings, *Audio().endings, *WAY_OUT)


def is_sample_folder(path: Path) -> bool:
    """Whether a path is a folder of samples, or a picture or recording, which counts as a folder of one."""
    return path.is_dir() or (path.suffix.lower() in _FILE_ENDINGS and path_exists(path, file=True))


@dataclass(frozen=True)
class SampleOptions:
    """The options of a board's samples: their source, their conversion, and how many are kept and held out."""

    data: str
    device: str
    seed: int
    validation_share: float
    test_share: float
    class_names: tuple[str, ...]
    image_mean: tuple[float, ...]
    image_deviation: tuple[float, ...]
    audio_rate: int
    samples_most: int
    samples_bytes: int = 0
    missing: str = "error"
    step: float | None = None
    columns: tuple[str, ...] = ()
    image_background: Colour = WHITE

    @property
    def pixels(self) -> Pixels:
        return Pixels(self.image_mean, self.image_deviation, self.image_background)

    @property
    def shares(self) -> SplitShares:
        return SplitShares(self.test_share, self.validation_share, self.seed, self.device)

    def open(self, state: Path, stack: ExitStack) -> SampleSource:
        """The samples of a board with this state directory; `stack` closes them."""
        if self.data == LOCAL:
            limits = SampleLimits(self.samples_most, min(self.samples_bytes, _MAX_STORE_BYTES))
            return stack.enter_context(SampleStore(state / "samples", limits, self.shares))
        return self.fixed(spool=state)

    def fixed(self, class_names: tuple[str, ...] = (), spool: Path | None = None) -> SampleSource:
        """The samples of a file, a table, a class or a folder of files, with copies of large arrays in `spool`."""
        source, names = Path(self.data), self.class_names or class_names
        if is_sample_folder(source):
            formats = self.pixels, Audio(self.audio_rate)
            return SampleFolder(source, formats, self.shares, self.samples_most, names, spool)
        if is_table(source):
            table = TableOptions(self.missing, self.step, self.columns)
            return TableFile(source, self.shares, self.samples_most, names, spool, options=table)
        return open_arrays(self.data, self.shares, self.samples_most, names, spool)
