"""A site whose boards are connected to aggregators: processes of this machine, each aggregator with its own broker."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.processes.machine import free_port, listens
from support.processes.real_site import Site


class TieredSite(Site):
    """A server, aggregators below it, and boards.

    Args:
        regions: By aggregator its devices.
        below: By aggregator the one that is its parent; the server of those that aren't named.
        settings: Options of all aggregators in addition; `{region}` stands for their names.
    """

    def __init__(
        self,
        material: Path,
        folder: Path,
        config: str,
        regions: Mapping[str, Sequence[str]],
        patience_s: float,
        *,
        below: Mapping[str, str] | None = None,
        settings: Sequence[str] = (),
        direct: Sequence[str] = (),
        secure: bool = False,
        may_hold: bool = False,
    ) -> None:
        self.regions, self.below, self.settings = dict(regions), dict(below or {}), tuple(settings)
        self.ports = {name: (free_port(), free_port()) for name in ("server", *regions)}
        """Of each server of the tier: its broker's, and that where aggregators connect."""
        names = [*direct, *(d for devices in regions.values() for d in devices)]
        super().__init__(material, folder, config, names, patience_s, secure=secure, may_hold=may_hold)
        self.port = self.ports["server"][0]
        for region, devices in regions.items():
            self.board_ports |= dict.fromkeys(devices, self.ports[region][0])
            if secure:
                shutil.copytree(self.state / "identity", self.folder / region / "identity")

    def command(self, name: str) -> list[str]:
        if name not in self.ports:
            return super().command(name)
        command = super().command("server")
        port, tier = self.ports[name]
        command[command.index("--port") + 1] = str(port)
        if name != "server":
            above = self.ports[self.below.get(name, "server")][1]
            command[command.index("run")] = "aggregate"
            at = command.index("--config")
            command[at : at + 2] = ["--parent", f"{'wss' if self.secure else 'ws'}://127.0.0.1:{above}"]
            command[command.index("--state") + 1] = str(self.folder / name)
            command += ["--region", name, *(text.format(region=name) for text in self.settings)]
        return [*command, "--aggregators", str(tier)]

    def start_all(self) -> None:
        for name, ports in self.ports.items():
            self.start(name)
            self.wait_for(lambda ports=ports: all(map(listens, ports)), f"{name} listens")  # type: ignore[misc]
        for name in self.devices:
            self.start(name)

    def move(self, device: str, region: str) -> None:
        """Start a board anew, at the broker of another region."""
        self.processes[device].kill()
        self.processes[device].wait()
        self.board_ports[device] = self.ports[region][0]
        self.start(device)
