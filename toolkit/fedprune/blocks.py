"""How many channels onnxruntime's convolutions compute at once on this processor, found by a numeric check.

Training graphs for one board lay channels out in blocks (the operators of `com.microsoft.nchwc`). How long a block is
depends on processor and build; with a wrong one these operators compute garbage and say nothing. So each length is
tried with a small graph that compares a convolution in blocks with a plain one. The wheels for Arm have none.
A machine whose environment says `FEDPRUNE_NO_BLOCKS=1` has none either.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

import numpy as np

from fedprune import step
from fedprune.chance import keyed
from fedprune.errors import ModelError, shown
from fedprune.session import Session
from fedprune.workload import BLOCKS

X, W, PLAIN, IN_BLOCKS = "x", "w", "plain", "in_blocks"
"""The check's inputs and outputs."""

SAMPLES, CHANNELS, PLACES = 2, 32, 6
"""Of the check: whole blocks of any length, so that a wrong one reads nothing beyond its arrays."""

_CLOSE = 1e-3


OFF = "FEDPRUNE_NO_BLOCKS"
"""In the environment, with the value 1: there are no blocks here."""


def block_size() -> int:
    """Channels of a block; 0 where there are none, none that give right numbers, or where they are turned off.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    return 0 if os.environ.get(OFF) == "1" else measured_block()


def turn_off() -> None:
    """Do without blocks, in this process and in those that it starts from now on."""
    os.environ[OFF] = "1"


@lru_cache(maxsize=1)
def measured_block() -> int:
    """Channels of a block, as the check finds it."""
    random = keyed(0, "blocks")
    feeds = {
        X: random.standard_normal((SAMPLES, CHANNELS, PLACES, PLACES)).astype(np.float32),
        W: random.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32),
    }
    for block in sorted(BLOCKS[1:], reverse=True):
        raw = (resources.files("fedprune") / "assets" / file_name(block)).read_bytes()
        try:
            found = Session(raw, training=True).run(feeds)
        except ModelError:
            continue  # this build has no such operators, or not for this processor
        plain, in_blocks = found[PLAIN], found[IN_BLOCKS]
        if plain.shape == in_blocks.shape and np.abs(plain - in_blocks).max() <= _CLOSE * np.abs(plain).max():
            return block
    return 0


def check_block(metadata: Mapping[str, str]) -> None:
    """Make sure that a training graph computes right numbers here.

    Args:
        metadata: The graph's.

    Raises:
        ModelError: It was made for blocks of another length.
    """
    wanted = metadata.get(step.BLOCK)
    if wanted is None:
        return
    here = block_size()
    if wanted != str(here):
        raise ModelError(
            "the training graph was made for another kind of processor",
            expected=f"blocks of {here} channels" if here else "standard operators (no blocks here)",
            got=f"blocks of {shown(wanted)}",
            hint="Use the graph of standard operators (training.onnx), which every board runs.",
        )


def file_name(block: int) -> str:
    """The asset that checks blocks of this length."""
    return f"blocks_{block}.onnx"
