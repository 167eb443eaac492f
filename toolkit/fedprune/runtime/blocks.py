"""How many channels onnxruntime's convolutions compute at once on this processor, found by a numeric check.

Training graphs for one board lay channels out in blocks (the operators of `com.microsoft.nchwc`). How long a block is
depends on processor and build; with a wrong one these operators compute garbage and say nothing. So each length is
tried with a small graph that compares a convolution in blocks with a plain one. The wheels for Arm have none.
`FEDPRUNE_NO_BLOCKS=1` in the environment turns them off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np

from fedprune.core.errors import ConfigError, ModelError, shown
from fedprune.core.rng import keyed
from fedprune.model import step_contract
from fedprune.planning.kernel_workload import BLOCKS
from fedprune.runtime.onnx_subgraph import metadata_of
from fedprune.runtime.session import Session

X, W, PLAIN, IN_BLOCKS = "x", "w", "plain", "in_blocks"
"""The check's inputs and outputs."""

SAMPLES, CHANNELS, PLACES = 2, 32, 6
"""Of the check: whole blocks of any length, so that a wrong one reads nothing beyond its arrays."""

_CLOSE = 1e-3


OFF = "FEDPRUNE_NO_BLOCKS"
"""In the environment: whether blocks are switched off here."""

_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
"""What it may say, in capitals or not."""

_INSTEAD = "Use the graph of standard operators (training.onnx), which every board runs."


def block_size() -> int:
    """Channels of a block; 0 where there are none, none that give right numbers, or where they are turned off.

    Raises:
        ConfigError: The environment variable is invalid.
        MissingExtraError: onnxruntime is not installed.
    """
    return 0 if turned_off() else measured_block()


def turned_off() -> bool:
    """Whether the environment turns blocks off. Raises `ConfigError` if it sets neither yes nor no."""
    said = os.environ.get(OFF, "").strip().lower()
    if said not in _YES + _NO:
        raise ConfigError(
            f"{OFF} in the environment",
            expected="1, true, yes or on, or 0, false, no or off",
            got=shown(os.environ[OFF]),
        )
    return said in _YES


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
    """Make sure that a training graph of this metadata computes right numbers here. Raises `ModelError` if it was made
    for blocks of another length."""
    wanted = metadata.get(step_contract.BLOCK)
    if wanted is not None:
        check_length(wanted)


def check_graph(graph: Path | bytes) -> None:
    """Make sure that a training graph (a file or its bytes) computes right numbers here, before it is loaded.

    onnxruntime itself refuses some graphs for other blocks, in words of its own. What is no graph passes. Raises as
    `check_block`.
    """
    try:
        metadata = metadata_of(graph if isinstance(graph, bytes) else graph.read_bytes())
    except (ModelError, OSError):
        return
    check_block(metadata)


def check_length(block: int | str, hint: str = _INSTEAD) -> None:
    """Make sure that a training step in blocks of this length computes right numbers here. Raises `ModelError`, with
    this hint."""
    here = block_size()
    if str(block) == str(here):
        return
    if not here and turned_off():
        raise ModelError(
            f"channels in blocks are switched off here ({OFF} or --no-blocks)",
            expected="a training step of standard operators",
            got=f"blocks of {shown(block)}",
            hint=hint,
        )
    raise ModelError(
        "the training graph was made for another kind of processor",
        expected=f"blocks of {here} channels" if here else "standard operators (no blocks here)",
        got=f"blocks of {shown(block)}",
        hint=hint,
    )


def file_name(block: int) -> str:
    """The asset that checks blocks of this length."""
    return f"blocks_{block}.onnx"
