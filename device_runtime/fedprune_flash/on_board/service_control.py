"""Control of the board's service: commands to systemd, and the service's state and errors."""

from __future__ import annotations

import os
import subprocess  # nosec B404  # lists of words, never a shell
import time
from pathlib import Path

from fedprune.core.errors import BoardSetupError, DataError, StorageError, error_reason
from fedprune_flash.on_board.kit_folder import SERVICE_NAME

_POLL_INTERVAL_S = 0.5  # between two looks at a service that starts
_CALL_TIMEOUT_S = 120.0  # systemctl stop waits for the agent, which saves its state before it ends


class ServiceControl:
    """systemd on this board. A `root` other than / is a trial: its usr/bin/systemctl is used, or nothing is started."""

    def __init__(self, root: Path) -> None:
        systemctl = root / "usr/bin/systemctl"
        self._systemctl = "systemctl" if root == Path("/") else str(systemctl) if systemctl.exists() else ""

    @property
    def is_available(self) -> bool:
        return bool(self._systemctl)

    def call_systemctl(self, *words: str, must: bool = True) -> None:
        if self.is_available:
            run_command_line([self._systemctl, *words], must=must)

    def state(self) -> dict[str, str]:
        """The service's properties; empty without systemd."""
        if not self.is_available:
            return {}
        properties = "--property=ActiveState,SubState,ConditionResult"
        lines = run_command_line([self._systemctl, "show", properties, SERVICE_NAME], must=False).splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}

    @property
    def is_up(self) -> bool:
        return self.state().get("ActiveState") in ("active", "activating", "reloading")

    @property
    def may_run(self) -> bool:
        """Whether a process of the service may exist."""
        return self.state().get("ActiveState") not in (None, "inactive", "failed")

    def wait_until_active(self, seconds: float, samples: str) -> None:
        """Wait for the service. Raises `BoardSetupError` with its last error, `DataError` if it lacks its samples."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.state()
            active, sub = state.get("ActiveState", ""), state.get("SubState", "")
            if active == "active":
                return
            if active == "inactive" and state.get("ConditionResult") == "no":
                raise DataError(
                    f"the service waits for its samples at {samples}",
                    hint=f"Put them there, readable to its user, then `systemctl start {SERVICE_NAME}`.",
                )
            if active == "failed" or sub == "auto-restart":
                raise BoardSetupError(
                    f"the service ends: {self._last_error()}", hint=f"On the board: journalctl -u {SERVICE_NAME}"
                )
            if time.monotonic() > deadline:
                raise BoardSetupError(
                    f"the service is not ready after {seconds:g} s ({active or 'unknown'}): {self._last_error()}",
                    hint="Is the server there to let the board in? It goes on trying; run this again to look.",
                )
            time.sleep(_POLL_INTERVAL_S)

    def _last_error(self) -> str:
        """The last error that the service logged, or its last line if it logged no error."""
        command = ["journalctl", "--unit", SERVICE_NAME, "--lines", "50", "--output", "cat", "--no-pager"]
        try:
            lines = run_command_line(command, must=False).strip().splitlines()
        except StorageError:
            lines = []
        errors = [line for line in lines if "error:" in line]
        return "".join(c for c in (errors or lines or ["it logged nothing"])[-1] if c.isprintable())[:300]


def run_command_line(command: list[str], *, must: bool = True) -> str:
    """Run a program and return its output; raises `StorageError`, with its last line, if it fails and `must` not."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        result = subprocess.run(  # noqa: S603  # nosec B603  # systemctl, and the name of our unit
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=clean, timeout=_CALL_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StorageError(f"can't run {command[0]}: {error_reason(error)}") from error
    if must and result.returncode:
        error_text = (
            result.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit status {result.returncode}"]
        )[-1]
        raise StorageError(f"{Path(command[0]).name} failed: {error_text[:300]}")
    return result.stdout.decode("utf-8", "replace")
