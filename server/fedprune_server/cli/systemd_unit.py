"""The systemd unit of a server: restarts, a watchdog, a sandbox, and passwords that only it may read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.errors import ConfigError, shown
from fedprune_device.releases.unit import quoted
from fedprune_server.config.environment import variables

_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_PATH = re.compile(r"/[A-Za-z0-9_./@+-]{0,200}")
_STATE = "/var/lib/"


@dataclass(frozen=True)
class ServerUnit:
    """A server's unit.

    Attributes:
        environment: A file with further settings, which may be missing.
        user: Runs the server, and owns the state folder.
        state: The state folder, in /var/lib.
        arguments: Further options of `run`.
        credentials: Files with secrets by setting, such as `server.database`; root may own them alone.
        memory_max: Most memory, as systemd writes it (share or bytes).
    """

    program: str
    config: str = "/etc/fedprune/fleet.toml"
    environment: str = "/etc/fedprune/server.env"
    user: str = "fedprune"
    state: str = "/var/lib/fedprune"
    arguments: tuple[str, ...] = ()
    credentials: tuple[tuple[str, str], ...] = ()
    memory_max: str = "90%"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.user):
            raise ConfigError("--user", expected="small letters, digits, - and _", got=shown(self.user))
        paths = {f"--{n}": getattr(self, n) for n in ("program", "config", "environment", "state")}
        for option, path in (*paths.items(), *(("--credential", p) for _, p in self.credentials)):
            if not _PATH.fullmatch(path) or ".." in path.split("/"):
                raise ConfigError(option, expected="an absolute path of letters, digits and _./@+-", got=shown(path))
        if not _NAME.fullmatch(self.state.removeprefix(_STATE)) or not self.state.startswith(_STATE):
            raise ConfigError("--state", expected=f"a folder of {_STATE}, such as {_STATE}fedprune", got=self.state)
        if not re.fullmatch(r"[1-9][0-9]{0,11}[KMG]?|[1-9][0-9]?%|100%", self.memory_max):
            raise ConfigError("--memory", expected="such as 75% or 8G", got=shown(self.memory_max))
        known = {".".join(path): name for name, (path, text) in variables().items() if text}
        for setting, _ in self.credentials:
            if setting not in known:
                raise ConfigError(
                    "--credential", expected=f"one of {', '.join(sorted(known))}, and = and a file", got=shown(setting)
                )
        if any("\n" in a or "\0" in a for a in self.arguments):
            raise ConfigError("arguments of a service", expected="one line each")

    def text(self) -> str:
        run = ("run", "--config", self.config, "--state", self.state, *self.arguments)
        secrets = []
        for setting, path in self.credentials:
            variable = f"FEDPRUNE_{setting.upper().replace('.', '_')}_FILE"
            secrets += [f"LoadCredential={setting}:{path}", f"Environment={variable}=%d/{setting}"]
        sections = {
            "Unit": [
                "Description=fedprune: the server of a fleet",
                "Wants=network-online.target",
                "After=network-online.target postgresql.service mosquitto.service",
                "# A wrong setting is no better the tenth time; a broker that starts beside it is there by then.",
                "StartLimitIntervalSec=600",
                "StartLimitBurst=10",
            ],
            "Service": [
                "Type=notify",
                "NotifyAccess=main",
                "WatchdogSec=180",
                "TimeoutStartSec=900",
                "TimeoutStopSec=90",
                "Restart=on-failure",
                "RestartSec=10",
                "# A command line, a setting, a model or data that can't be used, a missing extra, another server.",
                "RestartPreventExitStatus=2 3 10 13 14 23",
                f"User={self.user}",
                f"StateDirectory={self.state.removeprefix(_STATE)}",
                "StateDirectoryMode=0700",
                f"WorkingDirectory={self.state}",
                f"EnvironmentFile=-{self.environment}",
                "Environment=PYTHONUNBUFFERED=1 HOME=/tmp",
                *secrets,
                f"ExecStart={' '.join(map(quoted, (self.program, *run)))}",
                f"MemoryMax={self.memory_max}",
                "TasksMax=4096",
                "LimitNOFILE=65536",
                *_SANDBOX,
            ],
            "Install": ["WantedBy=multi-user.target"],
        }
        return "\n\n".join("\n".join([f"[{name}]", *lines]) for name, lines in sections.items()) + "\n"


_SANDBOX = (
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "ProtectSystem=strict",
    "ProtectHome=yes",
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "PrivateUsers=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "ProtectControlGroups=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "RemoveIPC=yes",
    "SystemCallArchitectures=native",
    "SystemCallErrorNumber=EPERM",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged @resources @obsolete",
    "SystemCallFilter=setpriority sched_setaffinity sched_setscheduler",
    "UMask=0077",
)


def program_of(executable: Path, prefix: Path) -> Path:
    """The installed `fedprune-server`, which a unit starts; raises `ConfigError` if there is none."""
    for path in (prefix / "bin" / "fedprune-server", executable):
        if path.name == "fedprune-server" and path.is_file():
            return path.absolute()
    raise ConfigError("--program", expected="the path of fedprune-server", got="none: it isn't installed here")
