"""The systemd unit of a board's service: restarts, a watchdog, a sandbox, and limits that leave room for other
services.

A CPU board gets a strict sandbox. On a Jetson CUDA needs the GPU's device files and generates code, so the unit allows
these devices and memory that is both writable and executable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fedprune.core.errors import ConfigError
from fedprune.core.validation import matching, whole
from fedprune_device.launcher.sd_notify import START_S

_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_PATH = re.compile(r"(?!.*/\.\.(/|$))/[A-Za-z0-9_./@+-]{0,200}")
_MEMORY = re.compile(r"[1-9][0-9]{0,11}[KMG]?|[1-9][0-9]?%|100%")

JETSON_DEVICES = (
    "/dev/nvmap",
    "/dev/nvhost-as-gpu",
    "/dev/nvhost-ctrl",
    "/dev/nvhost-ctrl-gpu",
    "/dev/nvhost-ctxsw-gpu",
    "/dev/nvhost-dbg-gpu",
    "/dev/nvhost-gpu",
    "/dev/nvhost-prof-gpu",
    "/dev/nvhost-sched-gpu",
    "/dev/nvhost-tsg-gpu",
    "/dev/nvidia0",
    "/dev/nvidiactl",
    "/dev/nvidia-modeset",
    "/dev/nvidia-uvm",
    "/dev/nvidia-uvm-tools",
)
"""The GPU's files under JetPack 5 and 6 (nvhost) and later (nvidia). systemd ignores those that a board lacks."""

JETSON_CLASSES = ("char-nvidia", "char-nvhost", "char-drm")  # their drivers in /proc/devices


HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  # nosec B108  # names alone
"""Folders that the service doesn't see, or sees empty (ProtectHome, PrivateTmp)."""


_UNIT = """\
[Unit]
Description=fedprune: federated learning on this board
Wants=network-online.target
After=network-online.target
# Half an hour of restarts in a row, then it stays down; passing troubles are over by then.
StartLimitIntervalSec=3600
StartLimitBurst=60
{needs}
[Service]
Type=notify
NotifyAccess=all
WatchdogSec=180
TimeoutStartSec={start}
TimeoutStopSec=45
Restart=always
RestartSec=30
User={unit.user}
StateDirectory={unit.state}
EnvironmentFile=-{unit.environment}
ExecStart={command}
# The application has priority; training gets the rest.
CPUWeight=20
{quota}Nice=10
IOSchedulingClass=idle
IOWeight=20
MemoryMax={unit.memory_max}
MemorySwapMax=0
OOMScoreAdjust=500
OOMPolicy=continue
TasksMax=256
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ReadWritePaths={unit.root}/a {unit.root}/b {unit.root}/incoming {unit.root}/state
ProtectHome=yes
PrivateTmp=yes
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
UMask=0027
{kind}
[Install]
WantedBy=multi-user.target
"""
"""OOMPolicy: if a child that builds an engine takes too much memory, the agent continues."""

_CPU = """\
PrivateDevices=yes
PrivateUsers=yes
ProtectKernelTunables=yes
MemoryDenyWriteExecute=yes
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources @obsolete
SystemCallFilter=setpriority sched_setaffinity sched_setscheduler
"""

_DEVICES = "".join(f"DeviceAllow={name} rw\n" for name in (*JETSON_CLASSES, *JETSON_DEVICES))
_JETSON = f"""\
# CUDA generates code, uses the GPU's device files, and sets its clocks through sysfs.
SupplementaryGroups=video render
DevicePolicy=closed
{_DEVICES}SystemCallFilter=@system-service
SystemCallFilter=~@obsolete
"""


@dataclass(frozen=True)
class ServiceUnit:
    """The settings of a unit.

    `arguments` are those of `fedprune-device`, `state` the name of the folder under /var/lib. `memory_max` is a share
    or bytes, as systemd writes it; `cpu_quota` per cent of one core, 0 for no limit. Without the file `needs` it isn't
    started.
    """

    jetson: bool = False
    arguments: tuple[str, ...] = field(default=("run", "--patient"))
    root: str = "/opt/fedprune"
    state: str = "fedprune"
    user: str = "fedprune"
    environment: str = "/etc/fedprune/device.env"
    memory_max: str = "75%"
    cpu_quota: int = 0
    needs: str = ""

    def __post_init__(self) -> None:
        for name in ("state", "user"):
            matching(name, getattr(self, name), _NAME, "small letters, digits, - and _")
        for name in ("root", "environment", *(["needs"] if self.needs else [])):
            matching(name, getattr(self, name), _PATH, "an absolute path of letters, digits and _./@+-, without ..")
        matching("memory limit", self.memory_max, _MEMORY, "such as 75% or 512M")
        whole("processor limit in per cent, 0 for none", self.cpu_quota, 0, 100_000)
        if any("\n" in a or "\0" in a for a in self.arguments):
            raise ConfigError("arguments of a service", expected="one line each")

    def text(self) -> str:
        command = " ".join(map(quoted, ("/usr/bin/python3", "-I", f"{self.root}/launcher.pyz", *self.arguments)))
        return _UNIT.format(
            unit=self,
            start=START_S,
            needs=f"ConditionPathExists={self.needs}\n" if self.needs else "",
            command=command,
            quota=f"CPUQuota={self.cpu_quota}%\n" if self.cpu_quota else "",
            kind=_JETSON if self.jetson else _CPU,
        )


def quoted(word: str) -> str:
    """A word of a command line in systemd's quoting."""
    escaped = word.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[A-Za-z0-9_./:@=,+%$-]+", escaped):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'
