"""A release on trial, seen from inside: what it must show before it may stay."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from importlib import resources
from pathlib import Path

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.disk import storage_errors
from fedprune.core.errors import FedpruneError, RuntimeUnavailableError
from fedprune_device.hardware.probe import check_runtime
from fedprune_device.launcher.launcher import signal_name
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_device.launcher.state import TRIAL, DamagedError, LauncherState, line
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor

PACKAGES = (
    *("numpy", "paho", "safetensors", "cryptography", "onnxruntime", "PIL"),
    *(("tomli",) if sys.version_info < (3, 11) else ()),
)
"""Modules that the runtime is made of beside its own."""

_LOG = logging.getLogger("fedprune.device")
_TIMEOUT_S = 300


class ReleaseTrial:
    """A trial under way in this process.

    Args:
        home: The folder of the slots.
        number: The release's number.
        slot: The slot that it is in.
    """

    def __init__(self, home: SlotStore, number: int, slot: str) -> None:
        self._home = home
        self.number = number
        self._slot = slot

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> ReleaseTrial | None:
        """The trial that the launcher began with this process; None where there is none.

        Args:
            environment: Where the launcher says which slot this is.
        """
        root, slot = environment.get("FEDPRUNE_ROOT", ""), environment.get("FEDPRUNE_SLOT", "")
        if not root or not slot:
            return None
        home = SlotStore(Path(root))
        state = home.load()
        if state is None or state.phase != TRIAL or state.other != slot:
            return None
        return cls(home, state.highest, slot)

    def check(self, serving: Path | None, health: Callable[[Path | None], None] | None = None) -> None:
        """All that can be seen without a broker. What fails here fails always: the release is rolled back at once.

        Args:
            serving: The folder of the models that serve, if there is one.
            health: The checks; `check_health` and `check_packages` by default.

        Raises:
            FedpruneError: Something is wrong; the launcher knows it, and starts the stable slot next.
        """
        try:
            (health or self._check)(serving)
        except FedpruneError as error:
            reason = str(error)
            self._change(lambda s: s.roll_back(reason))
            raise
        self._change(lambda s: s.note("its checks passed, but it had not reached the broker"))

    def commit(self) -> None:
        """The release is healthy: it stays.

        Raises:
            StorageError: The disk fails; the trial goes on.
        """
        self._change(LauncherState.commit)
        _LOG.info("release %d is healthy and stays", self.number)

    def _check(self, serving: Path | None) -> None:
        check_health(serving)
        try:
            system = self._home.record(self._slot).system
        except DamagedError as error:
            raise RuntimeUnavailableError(str(error)) from error
        if system is not None:
            check_packages(self._home.root / self._slot, system)

    def _change(self, change: Callable[[LauncherState], LauncherState]) -> None:
        with storage_errors(f"can't write {self._home.folder}"), self._home.changing():
            state = self._home.load()
            if state is not None and state.phase == TRIAL and state.highest == self.number:
                self._home.save(change(state))


def check_packages(slot: Path, system: Collection[str] = ()) -> None:
    """Whether what the runtime is made of comes with the release, and not from what else the board has.

    The board's own packages stay in sight, for a data source that reads a camera by them; but what a release takes from
    there unsaid is gone with the next `apt` or `pip`, when nothing goes back any more.

    Args:
        slot: The folder of the release.
        system: Modules that it takes from the board's own Python.

    Raises:
        RuntimeUnavailableError: One comes from elsewhere; the message names it.
    """
    for name in PACKAGES:
        if name in system:
            continue
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
        if not any(Path(place).resolve().is_relative_to(slot.resolve()) for place in places):
            raise RuntimeUnavailableError(
                f"{name} is not in the release" + (f": it would come from {places[0]}" if places else ""),
                hint="Make the release with a wheel of it, or with --system for what the board's own Python has.",
            )


def check_health(serving: Path | None = None, python: str = sys.executable) -> None:
    """Whether onnxruntime loads and computes here, and the model that serves can be served.

    It happens in a process of its own: an instruction that the processor lacks kills the process that meets it.

    Args:
        serving: The folder of the models that serve, if there is one.
        python: The interpreter.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        RuntimeUnavailableError: It can't be loaded, or computes nothing; the message says how it failed.
    """
    command = [python, "-c", "from fedprune_device.releases.release_trial import _answer; _answer()"]
    asked = json.dumps({"serving": None if serving is None else str(serving)})
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603  # nosec B603  # our own code, in this Python
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailableError(f"a small graph doesn't run within {_TIMEOUT_S} s") from error
    except OSError as error:
        raise RuntimeUnavailableError(f"can't start {python}: {error.strerror}") from error
    if done.returncode:
        check_runtime(python)  # reports the cause, if onnxruntime itself doesn't load
    if done.returncode < 0:
        name = signal_name(-done.returncode)
        raise RuntimeUnavailableError(
            f"onnxruntime kills the process that runs a small graph ({name})",
            hint="This version uses instructions that this processor lacks.",
        )
    if done.returncode:
        raise RuntimeUnavailableError(
            f"the check failed: {line((done.stderr.strip().splitlines() or ['no message'])[-1])}"
        )


def _answer() -> None:
    """The other side of `check_health`; what is wrong comes as the last line of stderr."""
    asked = json.loads(sys.stdin.read())
    try:
        _run_small_graph()
        if asked["serving"] is not None:
            slots = ModelSlots(Path(asked["serving"]))
            if slots.current() is not None:
                predictor, record = slots.open()
                predictor.check(record.classes)
    except FedpruneError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.exit_code))


def _run_small_graph() -> None:
    assets = resources.files("fedprune_device") / "assets"
    reference = json.loads((assets / "probe.json").read_text())
    tensors = {name: np.full(shape, 0.01, np.float32) for name, shape in reference["tensors"].items()}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GRAPH).write_bytes((assets / "probe_inference.onnx").read_bytes())
        (Path(folder) / WEIGHTS).write_bytes(tensorfile.encode(tensors))
        Predictor(Path(folder)).check(reference["classes"])
