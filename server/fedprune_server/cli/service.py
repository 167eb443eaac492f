"""`fedprune-server service print|install`: the systemd unit that keeps a server running."""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shutil
import subprocess  # nosec B404  # lists of words, never a shell
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.cli import option_names, options_of
from fedprune.core.disk import is_there, storage_errors
from fedprune.core.errors import ConfigError, StorageError, UsageError, meant, reason, shown
from fedprune_device.releases.unit import quoted
from fedprune_server.cli.run import add_run_options
from fedprune_server.config.environment import variables

NAME = "fedprune-server.service"
_UNITS = Path("/etc/systemd/system")
_SYSTEMD = Path("/run/systemd/system")
"""There where systemd is the machine's first process (sd_booted(3))."""


_HOME = re.compile(r"^home *= *(.+?) *$", re.MULTILINE)
"""The folder of the Python that a virtual environment was made with, in its `pyvenv.cfg`."""

_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./@+-]{0,200}")
_STATE_ROOT = "/var/lib/"
_CONFIG = "/etc/fedprune/fleet.toml"
_HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # noqa: S108  # nosec B108  # nothing is made there
"""Folders that the sandbox empties (ProtectHome=, PrivateTmp=)."""

_LINE = 1024
"""Bytes of a script's line that are read: a kernel takes interpreters of at most 255."""


@dataclass(frozen=True)
class ServerUnit:
    """A server's unit.

    Attributes:
        environment: A file with further settings, which may be missing.
        user: Runs the server, and owns the state folder.
        state: The state folder, in /var/lib.
        config: Its configuration file.
        arguments: Further options of `run`.
        credentials: Files with secrets by setting, such as `server.database`; root may own them alone.
        memory_max: Most memory, as systemd writes it (share or bytes).
    """

    program: str
    config: str = _CONFIG
    environment: str = "/etc/fedprune/server.env"
    user: str = "fedprune"
    state: str = "/var/lib/fedprune"
    arguments: tuple[str, ...] = ()
    credentials: tuple[tuple[str, str], ...] = ()
    memory_max: str = "90%"

    def __post_init__(self) -> None:
        if not _PLAIN_NAME.fullmatch(self.user):
            raise ConfigError("--user", expected="small letters, digits, - and _", got=shown(self.user))
        paths = {f"--{n}": getattr(self, n) for n in ("program", "config", "environment", "state")}
        for option, path in (*paths.items(), *(("--credential", p) for _, p in self.credentials)):
            if not _PLAIN_PATH.fullmatch(path) or ".." in path.split("/"):
                raise ConfigError(option, expected="an absolute path of letters, digits and _./@+-", got=shown(path))
        if not _PLAIN_NAME.fullmatch(self.state.removeprefix(_STATE_ROOT)) or not self.state.startswith(_STATE_ROOT):
            raise ConfigError(
                "--state", expected=f"a folder of {_STATE_ROOT}, such as {_STATE_ROOT}fedprune", got=self.state
            )
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
        _check_arguments(self.arguments)

    def check_seen(self) -> None:
        """Make sure that the service sees what it names. Raises `ConfigError`."""
        further = [("arguments of a service", a.rpartition("=")[2]) for a in self.arguments]
        program = [("--program", path) for path in (self.program, *interpreters(Path(self.program)))]
        for option, path in (*program, ("--config", self.config), *further):
            place = os.path.realpath(path) if path.startswith("/") else path
            if path.startswith(_HIDDEN) or place.startswith(_HIDDEN):
                raise ConfigError(
                    option, expected=f"a path that the service sees, not in {', '.join(_HIDDEN)}",
                    got=shown(path if path == place or path.startswith(_HIDDEN) else f"{path}, which is {place}"),
                    hint="Install fedprune in /opt, and put files into /etc/fedprune (docs/deploy.md#systemd).",
                )  # fmt: skip

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
                "# Retrying doesn't mend a wrong setting, but it waits for a broker that starts at the same time.",
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
                f"StateDirectory={self.state.removeprefix(_STATE_ROOT)}",
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


def interpreters(program: Path) -> list[str]:
    """Files and folders of the Python that runs an installed program, as its first lines and its virtual environment
    name them; of a program that isn't such a script, or can't be read, none."""
    try:
        with program.open("rb") as file:
            first, second = (file.readline(_LINE).decode(errors="replace") for _ in range(2))
    except OSError:
        return []
    if not first.startswith("#!"):
        return []
    words = first[2:].split()[:1]
    if second.startswith("'''exec'"):  # a shell starts an interpreter whose path is too long for the first line
        words += [word.strip("\"'") for word in second.split()[1:2]]
    places = []
    for word in words:
        environment = Path(word).parent.parent / "pyvenv.cfg"
        text = environment.read_text(errors="replace") if is_there(environment, file=True) else ""
        places += [word, *_HOME.findall(text)]
    return places


def _check_arguments(arguments: Sequence[str]) -> None:
    """Make sure that a service's command understands these options. Raises `UsageError`."""
    hint = "See `fedprune-server run --help`."
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_run_options(parser)
    try:
        found, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(str(error), hint=hint) from error
    if unknown:
        near = meant(unknown[0], option_names(parser))
        raise UsageError(f"`run` has no option {shown(unknown[0])}{near}", hint=hint)
    if found.config is not None or vars(found)["server.state"] is not None:
        raise UsageError("--config and --state of a service", expected="them before --")


def program_of(executable: Path, prefix: Path) -> Path:
    """The installed `fedprune-server`, which a unit starts; raises `ConfigError` if it is missing."""
    for path in (prefix / "bin" / "fedprune-server", executable):
        if path.name == "fedprune-server" and path.is_file():
            return path.absolute()
    raise ConfigError("--program", expected="the path of fedprune-server", got="none: it isn't installed here")


def add_service(service: argparse.ArgumentParser) -> None:
    actions = service.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (("print", "print the unit"), ("install", "write the unit, and let systemd read it")):
        action = actions.add_parser(name, help=text)
        action.add_argument("--config", default=ServerUnit.config, metavar="FILE", help="default: %(default)s")
        action.add_argument(
            "--environment", default=ServerUnit.environment, metavar="FILE", help="default: %(default)s"
        )
        action.add_argument("--user", default=ServerUnit.user, metavar="NAME", help="its user (default: %(default)s)")
        action.add_argument("--state", default=ServerUnit.state, metavar="DIR", help="default: %(default)s")
        action.add_argument(
            "--memory",
            dest="memory_max",
            default=ServerUnit.memory_max,
            metavar="MOST",
            help="such as 8G (default: 90%%)",
        )
        action.add_argument("--program", metavar="FILE", help="default: the fedprune-server of this environment")
        action.add_argument(
            "--credential", action="append", default=[], dest="credentials", metavar="TABLE.KEY=FILE",
            help="a setting in a file that root owns, such as server.database=/etc/fedprune/database",
        )  # fmt: skip
        action.add_argument("arguments", nargs="*", metavar="-- OPTION", help="further options of `run`")
        action.set_defaults(function=_service)
    actions.choices["install"].add_argument(
        "--units", type=Path, default=_UNITS, metavar="DIR", help="folder of the units (default: %(default)s)"
    )


def _service(arguments: argparse.Namespace) -> None:
    unit = options_of(
        ServerUnit,
        arguments,
        program=arguments.program or str(program_of(Path(sys.argv[0]), Path(sys.prefix))),
        arguments=tuple(arguments.arguments),
        credentials=tuple(text.partition("=")[::2] for text in arguments.credentials),
    )
    if arguments.action == "print":
        print(unit.text(), end="")
        try:
            unit.check_seen()
        except ConfigError as error:
            print(f"warning: {error}", file=sys.stderr)
    else:
        unit.check_seen()
        _install(unit, arguments.units)


def _install(unit: ServerUnit, folder: Path) -> None:
    try:
        pwd.getpwnam(unit.user)
    except KeyError:
        raise ConfigError(
            "--user", expected="a user of this machine", got=unit.user,
            hint=f"Make one: useradd --system --home-dir {unit.state} --shell /usr/sbin/nologin {unit.user}",
        ) from None  # fmt: skip
    for needed in (unit.program, unit.config, *(p for _, p in unit.credentials)):
        if not Path(needed).is_file():
            raise UsageError(needed, expected="a file that exists", got="none")
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}", hint="Name that of systemd's units with --units.")
    path = folder / NAME
    with storage_errors(f"can't write {path}"):
        write_whole(path, unit.text().encode())
        path.chmod(0o644)
    print(f"{path} is written")
    systemctl = shutil.which("systemctl")
    if folder == _UNITS and _SYSTEMD.is_dir() and systemctl is not None:
        done = subprocess.run([systemctl, "daemon-reload"], capture_output=True, text=True, check=False)  # noqa: S603  # nosec B603  # systemctl daemon-reload
        if done.returncode:
            raise StorageError(f"systemctl daemon-reload: {reason(RuntimeError(done.stderr))}")
    print(f"start it, now and with the machine: systemctl enable --now {NAME.removesuffix('.service')}")
