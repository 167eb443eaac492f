"""The service under which a board runs the agent: a systemd unit, and the environment that it is started with."""

from __future__ import annotations

from fedprune_flash.board_file import BoardFile
from fedprune_flash.installer import HOME, SETTINGS, STATE, USER
from fedprune_flash.target import Target

# Neither PrivateDevices nor MemoryDenyWriteExecute: CUDA needs /dev/nv* and makes code at run time, as may libffi.
_UNIT = """\
[Unit]
Description=fedprune: train on this board's own data as part of a fleet
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
{condition}
[Service]
User={user}
StateDirectory=fedprune
EnvironmentFile={settings}/board.env
EnvironmentFile=-{settings}/device.env
ExecStart={command}
Restart=always
RestartSec=10
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
CapabilityBoundingSet=
{groups}
[Install]
WantedBy=multi-user.target
"""


def unit(board: BoardFile, target: Target) -> str:
    """The systemd unit.

    Args:
        board: What the board is told; its values are of a kind that systemd takes literally.
        target: A Jetson's agent may use the GPU.
    """
    command = [f"{HOME}/bin/fedprune-device", "run", "--patient", "--site", board.site, "--device", board.device]
    if board.authority:
        command += ["--ca", f"{SETTINGS}/ca.pem"]
    command += ["--data", board.data, "--state", STATE]
    return _UNIT.format(
        # Without samples the agent would end and be started again every ten seconds.
        condition=f"ConditionPathExists={board.data}\n" if board.data.startswith("/") else "",
        groups="SupplementaryGroups=video render\n" if target.jetson else "",
        command=" ".join(command),
        user=USER,
        settings=SETTINGS,
    )


def environment(board: BoardFile) -> str:
    """The unit's environment: /etc/fedprune/device.env, which is read after it, may say otherwise."""
    return f"FEDPRUNE_BROKER={board.server}\n"
