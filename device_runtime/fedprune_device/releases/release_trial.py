"""A release on trial, as the new release itself sees it: its checks, and keeping or giving up the release."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from fedprune.core.disk import storage_errors
from fedprune.core.errors import FedpruneError, RuntimeUnavailableError
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_device.launcher.state import TRIAL, DamagedError, LauncherState

# Packages that the runtime requires, by the names of their modules.
REQUIRED_MODULES = (
    *("numpy", "paho", "safetensors", "cryptography", "msgspec", "onnxruntime", "PIL"),
    *(("tomli",) if sys.version_info < (3, 11) else ()),
)

_LOG = logging.getLogger("fedprune.device")


class ReleaseTrial:
    """The trial of release `number`, which runs in this process from its slot."""

    def __init__(self, home: SlotStore, number: int, slot: str) -> None:
        self._home = home
        self.number = number
        self._slot = slot

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> ReleaseTrial | None:
        """The trial that the launcher began with this process, if any."""
        root, slot = environment.get("FEDPRUNE_ROOT", ""), environment.get("FEDPRUNE_SLOT", "")
        if not root or not slot:
            return None
        home = SlotStore(Path(root))
        state = home.load()
        if state is None or state.phase != TRIAL or state.other_slot != slot:
            return None
        return cls(home, state.highest, slot)

    def check(self, health: Callable[[], object]) -> None:
        """Run the checks that need no broker. A failure rolls the release back, and the stable slot starts."""
        try:
            health()
        except FedpruneError as error:
            reason = str(error)
            self._change_state(lambda s: s.roll_back(reason))
            raise
        # Reported if the attempt ends without a message.
        self._change_state(lambda s: replace(s, trouble="its checks passed, but it had not reached the broker"))

    def commit(self) -> None:
        """Keep the release, which is healthy: its slot becomes the stable one."""
        self._change_state(LauncherState.commit)
        _LOG.info("release %d is healthy and stays", self.number)

    def check_packages(self) -> None:
        try:
            system = self._home.record(self._slot).system
        except DamagedError as error:
            raise RuntimeUnavailableError(str(error)) from error
        if system is not None:
            check_packages(self._home.root / self._slot, system)

    def _change_state(self, change: Callable[[LauncherState], LauncherState]) -> None:
        current = TRIAL, self.number, self._slot
        with storage_errors(f"can't write {self._home.folder}"), self._home.lock_state():
            state = self._home.load()
            if state is not None and (state.phase, state.highest, state.other_slot) == current:
                self._home.save(change(state))


def check_packages(slot: Path, system: Collection[str] = ()) -> None:
    """Check that the runtime's packages come with the release, not from the board's own Python, except `system`.

    Those stay importable, for a data source that needs them (a camera); but a dependency that isn't declared is lost
    with the next `apt` or `pip`, when there is no release to roll back to. Raises `RuntimeUnavailableError`, which
    names the package.
    """
    for name in REQUIRED_MODULES:
        if name in system:
            continue
        spec = importlib.util.find_spec(name)
        locations = [] if spec is None else [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
        if not any(Path(location).resolve().is_relative_to(slot.resolve()) for location in locations):
            raise RuntimeUnavailableError(
                f"{name} is not in the release" + (f": it would come from {locations[0]}" if locations else ""),
                hint="Make the release with a wheel of it, or with --system for what the board's own Python has.",
            )
