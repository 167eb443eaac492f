"""Install fedprune on this board from the kit that this file is in, without a network.

    sudo python3 -I install.pyz             install, or continue after a power cut; a second run changes nothing
    sudo python3 -I install.pyz --remove    undo it; the board's state stays in /var/lib/fedprune, unless --purge

It runs on Python 3.10 or newer and imports only the standard library.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import zipfile
from pathlib import Path

from fedprune.core.errors import ExitCode, FedpruneError, UsageError, did_you_mean, error_reason
from fedprune_flash.on_board.board_system import SERVICE_USER, BoardSystem
from fedprune_flash.on_board.installation import Installation
from fedprune_flash.on_board.key_options import read_claim_option, trusted_key
from fedprune_flash.on_board.kit_folder import SERVICE_NAME, KitFolder, key_fingerprint
from fedprune_flash.on_board.removal import remove_installation


def install_kit(installation: Installation, wait: float) -> None:
    installation.check()
    try:
        installation.install()
    except BaseException:
        installation.restart_service()
        raise
    data = str(installation.kit.manifest["data"])
    if wait and installation.start:
        installation.system.control.wait_until_active(wait, data)
        print(f"running: {SERVICE_NAME}", flush=True)
    elif data.startswith("/") and not installation.system.path_of(data).exists():
        print(
            f"The samples are to come: put them at {data}, readable to {SERVICE_USER}, then `systemctl start "
            f"{SERVICE_NAME}`."
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--remove", action="store_true", help="undo an installation; what was learnt stays")
    parser.add_argument("--purge", action="store_true", help="with --remove: what was learnt goes, too")
    parser.add_argument("--no-start", action="store_true", help="don't start the service: the board reboots next")
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="see the service run within S seconds")
    parser.add_argument("--key", metavar="KEY", help="the server's key, or its file (default: as this board knows it)")
    parser.add_argument("--claim", metavar="FILE", help="the board's one-time claim (default: the kit's; - for stdin)")
    parser.add_argument("--device", metavar="NAME", help="the board's name (default: the kit's)")
    parser.add_argument("--unsigned", action="store_true", help="install a kit that no server has signed")
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="for trials: all paths begin here")
    arguments, unknown = parser.parse_known_args(argv)
    os.umask(0o022)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup ignores SIGHUP: that stays.
        if signal.getsignal(number) != signal.SIG_IGN:
            # As an exception, so that a service that was stopped is started again.
            signal.signal(number, signal.default_int_handler)
    try:
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], parser._option_string_actions)
            raise UsageError(f"there is no option {unknown[0][:60]}{near}", hint="See --help.")
        if arguments.purge and not arguments.remove:
            raise UsageError("--purge without --remove")
        system = BoardSystem(arguments.root.resolve())
        system.check_root()
        if arguments.remove:
            remove_installation(system, purge=arguments.purge)
        else:
            kit = KitFolder(Path(sys.argv[0]).resolve().parent)
            device = arguments.device or kit.manifest["device"]
            claim = None if arguments.claim is None else read_claim_option(arguments.claim, device)
            key = trusted_key(kit, system, arguments.key, unsigned=arguments.unsigned)
            kit.check_files()
            print(f"signed with key {key_fingerprint(kit.signer_key)}" if key else "not signed", flush=True)
            installation = Installation(
                kit, system, start=not arguments.no_start, key=key, claim=claim, device=arguments.device
            )
            install_kit(installation, arguments.wait)
    except FedpruneError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted: run it again to go on", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else error_reason(error)
        print(f"error: {what}", file=sys.stderr)
        return int(ExitCode.STORAGE_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ExitCode.STORAGE)
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: the kit is damaged ({error}). Make it again.", file=sys.stderr)
        return int(ExitCode.KIT)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
